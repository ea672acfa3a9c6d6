"""`blockpruner serve-check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockpruner.cli.app import app, run_command
from blockpruner.cli.options import Dtype, Json, TrustRemoteCode


@app.command("serve-check", epilog="Example: `blockpruner serve-check smollm2-deci --python vllm-env/bin/python`")
def serve_check(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What export, prune or recover wrote; code in it will run.")
    ],
    python: Annotated[
        list[Path] | None,
        typer.Option(help="Python of another environment in which to look for runtimes; may be given repeatedly."),
    ] = None,
    pruned: Annotated[
        Path | None, typer.Option(help="The checkpoint that was exported; default: as recorded in DIR.")
    ] = None,
    num_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate from each prompt.")] = 24,
    dtype: Annotated[
        Dtype, typer.Option(help="To compute in, where the runtime lets one choose; auto: float32.")
    ] = Dtype.AUTO,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Generate from an export in each runtime that is installed, and compare with the pruned model."""
    from blockpruner.serving.serve_check import check_serving

    result = run_command(
        check_serving, folder, as_json=as_json, pythons=python or (), pruned=pruned, num_tokens=num_tokens,
        dtype="float32" if dtype is Dtype.AUTO else dtype.value, threads=threads, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if any(found["result"] in ("failed", "differs") for found in result["results"]):
        raise typer.Exit(1)
