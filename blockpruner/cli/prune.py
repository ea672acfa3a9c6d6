"""`blockpruner prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockpruner.cli.app import app, run_command
from blockpruner.cli.options import Dtype, Json, Model, Revision, TrustRemoteCode


@app.command(epilog="Example: `blockpruner prune smollm2 --run run --num-remove 8 --out smollm2-pruned`")
def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.")],
    run: Annotated[Path | None, typer.Option(help="Run directory of a search.")] = None,
    sequence: Annotated[
        Path | None, typer.Option(help="Removal order in the official format, instead of a run.")
    ] = None,
    num_remove: Annotated[int | None, typer.Option(help="Take the first so many steps; default: all.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: that of the search.")] = Dtype.AUTO,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint without the blocks that a search removed."""
    from blockpruner.pruning import prune_model

    run_command(
        prune_model, model, out, as_json=as_json, run=run, sequence=sequence, num_remove=num_remove, dtype=dtype.value,
        revision=revision, trust_remote_code=trust_remote_code,
    )  # fmt: skip
