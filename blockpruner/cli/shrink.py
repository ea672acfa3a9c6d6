"""`blockpruner shrink`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockpruner.cli.app import command
from blockpruner.showing.console import Reporter
from blockpruner.shrinking.config import ShrinkConfig


@command(
    "`blockpruner shrink smollm2 --ratio 0.2 --calibration builtin --num-windows 64 --seq-len 128 --out small`, or "
    "`blockpruner shrink MODEL --max-perplexity-increase 20% --calibration rows.jsonl --export deci --out small`",
    resumable=True,
)
def shrink(
    reporter: Reporter,
    config: ShrinkConfig,
    out: Annotated[
        Path, typer.Option(help="Folder for the smaller model and all else. Run the same command again to resume.")
    ],
) -> Any:
    """Search, prune, compensate, evaluate, measure the speed, report, export: the whole way in one command."""
    from blockpruner.shrinking.shrinking import shrink_model

    return shrink_model(config, out, reporter)
