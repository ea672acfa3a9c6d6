"""`blockpruner demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockpruner.cli.app import app, run_command
from blockpruner.cli.options import Json


@app.command(epilog="Example: `blockpruner demo`")
def demo(
    out: Annotated[Path, typer.Option(help="New folder for the run, the pruned model and the pictures.")] = Path(
        "demo"
    ),
    ratio: Annotated[float, typer.Option(help="Share of the parameters to remove.")] = 0.1,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas on Ray.")] = 2,
    as_json: Json = False,
) -> None:
    """The whole story on a real model, offline, in minutes: search, prune, save, load, generate, compare."""
    from blockpruner.demo import run_demo

    run_command(run_demo, out, as_json=as_json, resumable=True, ratio=ratio, replicas=replicas)
