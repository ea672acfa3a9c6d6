"""`blockpruner demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockpruner.cli.app import command
from blockpruner.showing.console import Reporter


@command("`blockpruner demo`", resumable=True)
def demo(
    reporter: Reporter,
    out: Annotated[Path, typer.Option(help="New folder for the run, the pruned model and the figures.")] = Path("demo"),
    ratio: Annotated[float, typer.Option(help="Share of the parameters to remove.")] = 0.1,
    replicas: Annotated[int, typer.Option(min=1, help="Number of replicas on Ray.")] = 2,
) -> Any:
    """Search, prune, save, load, generate and compare: the complete workflow on a real model, offline, in minutes."""
    from blockpruner.demo import run_demo

    return run_demo(out, reporter, ratio=ratio, replicas=replicas)
