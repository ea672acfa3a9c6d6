"""BlockPruner finds the attention and MLP blocks that a language model can do without, and removes them.

    import blockpruner as bp

    text = bp.calibration("alpaca", tokenizer, num_samples=256, seq_len=2048)
    found = bp.search(model, text, num_remove=8, strategy="lazy", on_step=print)
    small = bp.prune(model, found)
    bp.save(small, tokenizer, "pruned")

docs/python.md shows all of it. Importing this package is cheap: torch is imported when it is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockpruner.engine.errors import SearchFailed as SearchFailed
from blockpruner.engine.errors import UserError as UserError

if TYPE_CHECKING:
    from blockpruner.api.commands import compare as compare
    from blockpruner.api.commands import compensate_folder as compensate_folder
    from blockpruner.api.commands import evaluate as evaluate
    from blockpruner.api.commands import export as export
    from blockpruner.api.commands import latency as latency
    from blockpruner.api.commands import plan as plan
    from blockpruner.api.commands import recover as recover
    from blockpruner.api.commands import report as report
    from blockpruner.api.commands import sample as sample
    from blockpruner.api.commands import shrink as shrink
    from blockpruner.api.commands import times as times
    from blockpruner.api.models import load as load
    from blockpruner.api.perplexity import perplexity as perplexity
    from blockpruner.api.pruned import compensate as compensate
    from blockpruner.api.pruned import prune as prune
    from blockpruner.api.pruned import save as save
    from blockpruner.api.search import search as search
    from blockpruner.api.texts import calibration as calibration
    from blockpruner.api.texts import test_text as test_text
    from blockpruner.engine.calibration import Windows as Windows
    from blockpruner.searching.result import SearchResult as SearchResult

__all__ = [
    "SearchFailed",
    "SearchResult",
    "UserError",
    "Windows",
    "calibration",
    "compare",
    "compensate",
    "compensate_folder",
    "evaluate",
    "export",
    "latency",
    "load",
    "perplexity",
    "plan",
    "prune",
    "recover",
    "report",
    "sample",
    "save",
    "search",
    "shrink",
    "test_text",
    "times",
]

_WHERE = {
    "SearchResult": "searching.result",
    "Windows": "engine.calibration",
    "calibration": "api.texts",
    "compare": "api.commands",
    "compensate": "api.pruned",
    "compensate_folder": "api.commands",
    "evaluate": "api.commands",
    "export": "api.commands",
    "latency": "api.commands",
    "load": "api.models",
    "perplexity": "api.perplexity",
    "plan": "api.commands",
    "prune": "api.pruned",
    "recover": "api.commands",
    "report": "api.commands",
    "sample": "api.commands",
    "save": "api.pruned",
    "search": "api.search",
    "shrink": "api.commands",
    "test_text": "api.texts",
    "times": "api.commands",
}
"""The module of each name that is imported only when it is used."""


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"blockpruner.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'blockpruner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
