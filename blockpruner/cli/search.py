"""`blockpruner search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockpruner.cli.app import app, errors_in_one_line, run_command
from blockpruner.cli.options import (
    Device,
    Dtype,
    Json,
    Model,
    Per,
    PlacementChoice,
    Revision,
    Strategy,
    TextColumn,
    TrustRemoteCode,
    num_replicas,
    parts,
    ray_address,
)
from blockpruner.engine.blocks import Granularity
from blockpruner.engine.metrics.metric import Metric


@app.command(
    epilog="Example: `blockpruner search smollm2 --calibration builtin --num-remove 8 --seq-len 256 --out run`, or "
    "`blockpruner search smollm2 --calibration builtin --seq-len 64 --num-windows 32 --ratio 0.2 --strategy lazy "
    "--audit 2 --out lazy`"
)
def search(
    model: Model,
    out: Annotated[Path, typer.Option(help="Run directory. The same command again resumes the run that it holds.")],
    calibration: Annotated[
        str, typer.Option(help="alpaca, wikitext2, builtin, or a .jsonl, .json, .parquet, .txt or .raw file.")
    ] = "alpaca",
    text_column: TextColumn = "text",
    num_samples: Annotated[int, typer.Option(help="Texts drawn from the calibration set.")] = 256,
    seq_len: Annotated[int, typer.Option(help="Tokens of one window.")] = 2048,
    num_windows: Annotated[int | None, typer.Option(help="Use only the first so many windows.")] = None,
    seed: Annotated[int, typer.Option(help="Of the calibration draw, of mutations and of audits.")] = 42,
    num_remove: Annotated[int | None, typer.Option(help="Blocks to remove (layers, with --blocks layer).")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of the parameters to remove, instead of a number.")] = None,
    blocks: Annotated[Granularity, typer.Option(help="What may be removed.")] = Granularity.MIX,
    strategy: Annotated[
        Strategy,
        typer.Option(
            help="greedy: the paper's search; lazy: nearly always its order, for a fraction of the work; one-shot: "
            "every block scored once; beam, evolution: search longer for a better mask."
        ),
    ] = Strategy.GREEDY,
    metric: Annotated[
        Metric,
        typer.Option(help="ppl: calibration perplexity; kl, js: divergence from the dense model's distributions."),
    ] = Metric.PPL,
    tolerance: Annotated[
        str | None,
        typer.Option(metavar="NATS|1se", help="lazy: loss that makes no difference; 1se: one standard error."),
    ] = None,
    audit: Annotated[int | None, typer.Option(help="lazy: check so many random steps exhaustively.")] = None,
    width: Annotated[int | None, typer.Option(help="beam: masks that stay at each level; default 4.")] = None,
    generations: Annotated[int | None, typer.Option(help="evolution; default 50.")] = None,
    offspring: Annotated[int | None, typer.Option(help="evolution: masks of one generation; default 32.")] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Afterwards exchange removed blocks for kept ones while that helps.")
    ] = False,
    per: Annotated[Per, typer.Option(help="Judge a removal by its increase per block or per parameter.")] = Per.BLOCK,
    max_mha: Annotated[int | None, typer.Option(help="Attention blocks to remove at most.")] = None,
    max_mlp: Annotated[int | None, typer.Option(help="MLP blocks to remove at most.")] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", "--never", metavar="mha.0,mlp.0,layer.0,…", help="Blocks that are never removed."),
    ] = None,
    max_perplexity: Annotated[
        float | None, typer.Option(help="Stop before a removal that takes the calibration perplexity above this.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: the checkpoint's on a GPU; on a CPU bfloat16 if it has instructions for it.")
    ] = Dtype.AUTO,
    device: Annotated[Device, typer.Option(help="auto: CUDA if there is one.")] = Device.AUTO,
    replicas: Annotated[
        str, typer.Option(metavar="auto|N", help="Copies of the model that score side by side; auto: what fits.")
    ] = "auto",
    placement: Annotated[
        PlacementChoice,
        typer.Option(
            help="resident: on one device; streamed: layers come from host memory or disk as they are needed; sharded: "
            "split over several GPUs; auto: the first that fits."
        ),
    ] = PlacementChoice.AUTO,
    gpus_per_replica: Annotated[
        int | None, typer.Option(help="GPUs of one replica; more than one splits its layers over them.")
    ] = None,
    threads_per_replica: Annotated[
        int | None, typer.Option(help="CPU threads of one replica; default 1, with --no-ray all.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to join: auto, or host:port.")
    ] = None,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="One replica in this process.")] = False,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Let nodes with other GPUs or CPUs work on one run: bits may differ.")
    ] = False,
    task_timeout_s: Annotated[
        float, typer.Option(help="A unit of work is given up after this, or five times what it should take.")
    ] = 60.0,
    resource_timeout_s: Annotated[
        float, typer.Option(help="How long to wait while the cluster has no place for a replica.")
    ] = 60.0,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Find the order in which blocks can go."""
    with errors_in_one_line():
        from blockpruner.searching.config import SearchConfig

        config = SearchConfig(
            model=model, calibration=calibration, text_column=text_column, num_samples=num_samples, seq_len=seq_len,
            num_windows=num_windows, seed=seed, num_remove=num_remove, ratio=ratio, blocks=blocks,
            strategy=strategy.value, metric=metric, tolerance=tolerance, audit=audit, width=width,
            generations=generations, offspring=offspring, refine=refine, per=per.value, max_mha=max_mha,
            max_mlp=max_mlp, keep=parts(keep), max_perplexity=max_perplexity,
            dtype=dtype.value, device=device.value, replicas=num_replicas(replicas), placement=placement.value,
            gpus_per_replica=gpus_per_replica, threads_per_replica=threads_per_replica,
            address=ray_address(address, no_ray), no_ray=no_ray, allow_mixed=allow_mixed, task_timeout_s=task_timeout_s,
            resource_timeout_s=resource_timeout_s, revision=revision, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    from blockpruner.searching.driver import run_search

    run_command(run_search, config, out, as_json=as_json, resumable=True)
