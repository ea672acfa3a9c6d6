"""docs/reference.md lists every choice with its options as the classes state them.

`python -m tests.blockpruner.test_reference` writes it anew.
"""

from __future__ import annotations

import re

from blockpruner.comparing.method import Method
from blockpruner.engine.checkpoint.format import Format
from blockpruner.engine.compensation.method import Method as CompensationMethod
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.options import Choice
from blockpruner.engine.recovery.what import Trained
from blockpruner.engine.search.strategy import Strategy
from tests.processes import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "reference.md"
KINDS: dict[str, tuple[type[Choice], str]] = {
    "Strategies": (Strategy, "`search --strategy`: how to look for blocks"),
    "Metrics": (Metric, "`search --metric`: what a mask is scored by"),
    "Compared methods": (Method, "`compare --methods`"),
    "Compensation": (CompensationMethod, "`compensate --method`: how the blocks that remain are fitted"),
    "Recovery": (Trained, "`recover --train`: what a training changes"),
    "Export formats": (Format, "`export --format`"),
}


def flag(name: str) -> str:
    return f"`--{name.replace('_', '-')}`"


def reference() -> str:
    parts = [
        "# Choices",
        "Made from the classes by `python -m tests.blockpruner.test_reference`. Each choice is a class in the file "
        "named beside it; a new file in the same folder adds a choice.",
    ]
    for title, (kind, about) in KINDS.items():
        lines = ["| name | what it does | options | file |", "| --- | --- | --- | --- |"]
        for name, choice in kind.all().items():
            options = []
            for field, info in choice.model_fields.items():
                text = " ".join((info.description or "").split())
                text = re.sub(r"`([a-z_]+)(?:=([^`]*))?`", lambda match: flag(match[1]), text)
                default = "" if info.default is None else f" (default {info.default})"
                options.append(f"{flag(field)}: {text.rstrip('.')}{default}")
            module = choice.__module__.removeprefix("blockpruner.").replace(".", "/")
            file = f"{module}.py" if module.startswith("engine/") else f"blockpruner/{module}.py"
            lines.append(f"| `{name}` | {choice.about} | {'<br>'.join(options)} | `{file}` |")
        parts += [f"## {title}", f"{about}.", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def test_the_reference_says_what_the_classes_say() -> None:
    assert DOCUMENT.read_text() == reference(), "run `python -m tests.blockpruner.test_reference`"


if __name__ == "__main__":
    DOCUMENT.write_text(reference())
