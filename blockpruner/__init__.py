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
    from blockpruner.api import calibration as calibration
    from blockpruner.api import compare as compare
    from blockpruner.api import compensate as compensate
    from blockpruner.api import compensate_folder as compensate_folder
    from blockpruner.api import evaluate as evaluate
    from blockpruner.api import export as export
    from blockpruner.api import latency as latency
    from blockpruner.api import load as load
    from blockpruner.api import perplexity as perplexity
    from blockpruner.api import plan as plan
    from blockpruner.api import prune as prune
    from blockpruner.api import recover as recover
    from blockpruner.api import report as report
    from blockpruner.api import sample as sample
    from blockpruner.api import save as save
    from blockpruner.api import search as search
    from blockpruner.api import shrink as shrink
    from blockpruner.api import test_text as test_text
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
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("blockpruner.api"), name)
    raise AttributeError(f"module 'blockpruner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
