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
    out: Annotated[Path, typer.Option(help="Folder for the smaller model and all else.")] = Path("demo"),
    ratio: Annotated[float, typer.Option(help="Share of the parameters to remove.")] = 0.1,
    replicas: Annotated[int, typer.Option(min=1, help="Number of replicas on Ray.")] = 2,
) -> Any:
    """`shrink` on a real model, and what it answers then: the complete workflow, offline, in minutes."""
    from blockpruner.demo import run_demo

    return run_demo(out, reporter, ratio=ratio, replicas=replicas)
