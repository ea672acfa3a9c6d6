"""`blockpruner compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockpruner.cli.app import command
from blockpruner.comparing.config import CompareConfig
from blockpruner.comparing.method import Method
from blockpruner.showing.console import Reporter


@command(
    "`blockpruner compare smollm2 --calibration builtin --seq-len 128 --num-windows 8 --methods "
    "blockpruner,shortgpt,rm --ratio 0.1,0.2 --strategy lazy --perplexity builtin --test-seq-len 256 --test-windows 16 "
    "--out compared`",
    notes=["Methods:", *(f"- {name}: {method.about}" for name, method in Method.all().items())],
    resumable=True,
)
def compare(
    reporter: Reporter,
    config: CompareConfig,
    out: Annotated[Path, typer.Option(help="Folder for all results. Run the same command again to resume.")],
) -> Any:
    """Run several pruning methods on one model and text, and compare the resulting models."""
    from blockpruner.comparing.comparing import compare_methods

    return compare_methods(config, out, reporter)
