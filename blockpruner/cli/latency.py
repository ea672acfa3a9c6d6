"""`blockpruner latency`."""

from __future__ import annotations

from typing import Annotated

import typer

from blockpruner.cli.app import app, run_command
from blockpruner.cli.options import Device, Dtype, Json, Revision, TrustRemoteCode


@app.command(epilog="Example: `blockpruner latency smollm2-pruned --repeats 20`")
def latency(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_DIR", help="A model as for search, or a pruned checkpoint.")
    ],
    repeats: Annotated[int, typer.Option(min=1, help="Generations that count, after one to warm up.")] = 20,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    num_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts side by side.")] = 1,
    dense: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model that the pruned one was made from; default: as recorded in it."),
    ] = None,
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Measure a pruned checkpoint alone.")] = False,
    static_cache: Annotated[
        bool,
        typer.Option("--static-cache", help="KV cache of fixed size; on a GPU decoding then runs as CUDA graphs."),
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="As for search.")] = Dtype.AUTO,
    device: Annotated[Device, typer.Option(help="As for search.")] = Device.AUTO,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure how fast a model generates, and its memory; a pruned one beside its dense model."""
    from blockpruner.engine.judge.latency import Workload
    from blockpruner.timing.timing import measure_latency

    workload = Workload(prompt_len=prompt_len, num_tokens=num_tokens, batch_size=batch_size, static_cache=static_cache)
    run_command(
        measure_latency, model, as_json=as_json, workload=workload, repeats=repeats, dense=dense, no_dense=no_dense,
        threads=threads, dtype=dtype.value, device=device.value, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
