"""`blockpruner plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from blockpruner.cli.app import app, errors_in_one_line, run_command
from blockpruner.cli.options import Dtype, Json, PlacementChoice, Revision, TrustRemoteCode, num_replicas
from blockpruner.engine.blocks import Granularity


@app.command(epilog="Examples: `blockpruner plan llama-2-13b --gpus 2x24GB`, `blockpruner plan smollm2`")
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As for search, or a built-in shape: llama-2-7b, qwen1.5-14b, ...")
    ],
    gpus: Annotated[
        str | None, typer.Option(help="GPUs of one node and their memory, as 2x24GB; default: this machine's CPUs.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes with such GPUs.")] = 1,
    placement: Annotated[PlacementChoice, typer.Option(help="As for search.")] = PlacementChoice.AUTO,
    gpus_per_replica: Annotated[int | None, typer.Option(min=1, help="As for search.")] = None,
    replicas: Annotated[str, typer.Option(metavar="auto|N", help="As for search.")] = "auto",
    num_remove: Annotated[int | None, typer.Option(help="Blocks to remove.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Or the share of the parameters; default 0.25.")] = None,
    blocks: Annotated[Granularity, typer.Option(help="What may be removed.")] = Granularity.MIX,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of one window.")] = 2048,
    num_windows: Annotated[
        int, typer.Option(min=1, help="Calibration windows; 13 are what 256 rows of Alpaca give.")
    ] = 13,
    dtype: Annotated[Dtype, typer.Option(help="As for search.")] = Dtype.AUTO,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="What one replica gets out of its device, in TFLOP/s.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure that rate on this machine, with random weights.")
    ] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Placement, memory and time of a search, from the model's config alone."""
    from blockpruner.engine.search.budget import Budget
    from blockpruner.planning import plan_search

    with errors_in_one_line():
        budget = Budget(num_remove=num_remove, ratio=0.25 if num_remove is None and ratio is None else ratio)
        number = num_replicas(replicas)
    run_command(
        plan_search, model, as_json=as_json, gpus=gpus, num_nodes=nodes, placement=placement.value,
        gpus_per_replica=gpus_per_replica, replicas=number, budget=budget, blocks=blocks, seq_len=seq_len,
        num_windows=num_windows, dtype=dtype.value, tflops=tflops, measure=measure, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
