"""`blockpruner report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockpruner.cli.app import app, run_command
from blockpruner.cli.options import Json, TrustRemoteCode


@app.command(epilog="Example: `blockpruner report run`, or `blockpruner report greedy lazy --out both`")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run directories of searches of one model.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures and the page; default: the run directory.")
    ] = None,
    influence: Annotated[
        bool,
        typer.Option(
            "--influence",
            help="Measure the block influence of every block and layer first: one pass of the model over the "
            "calibration text, kept in RUN/influence.json.",
        ),
    ] = False,
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="File of `evaluate --json`, for a table; may be given repeatedly.")
    ] = None,
    latency: Annotated[
        list[Path] | None, typer.Option(help="File of `latency --json`, for a table; may be given repeatedly.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Draw the order of removal, the perplexity along the search and more, as pictures and one HTML page."""
    from blockpruner.reporting.writing import write_report

    run_command(
        write_report, runs, out, as_json=as_json, influence=influence, evaluations=evaluation or (),
        latencies=latency or (), trust_remote_code=trust_remote_code,
    )  # fmt: skip
