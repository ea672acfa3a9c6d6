"""`blockpruner evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockpruner.cli.app import app, errors_in_one_line, run_command
from blockpruner.cli.options import (
    Device,
    Dtype,
    Json,
    Revision,
    TextColumn,
    TrustRemoteCode,
    num_replicas,
    numbers,
    parts,
    ray_address,
)


@app.command(
    epilog="Example: `blockpruner evaluate smollm2-pruned --tasks paper --perplexity wikitext2`, or, before anything "
    "is written, `blockpruner evaluate smollm2 --run run --num-remove 0,4,8 --perplexity wikitext2`"
)
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_DIR", help="A model as for search, or a pruned checkpoint.")
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="piqa,…",
            help="Tasks, groups or tags of lm-eval; paper: the five of the paper's Table 1, paper-more: the four that "
            "its Table 10 adds, paper-aqua: AQuA-RAT.",
        ),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with further task files for lm-eval.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions of each task.")] = None,
    perplexity: Annotated[
        list[str] | None, typer.Option(help="wikitext2 (its test split), builtin or a file; may be given repeatedly.")
    ] = None,
    text_column: TextColumn = "text",
    seq_len: Annotated[list[int] | None, typer.Option(help="Tokens of one window; may be repeated; 2048.")] = None,
    num_windows: Annotated[int | None, typer.Option(help="Use only the first so many windows.")] = None,
    run: Annotated[Path | None, typer.Option(help="Evaluate MODEL without the blocks that this run removed.")] = None,
    num_remove: Annotated[
        list[str] | None,
        typer.Option(metavar="K,…", help="With --run: after how many removals, 0 for none; default: all."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; the same command again goes on from the answers that it holds."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Requests of tasks in one call; the paper has 1.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="As for search.")] = Dtype.AUTO,
    device: Annotated[Device, typer.Option(help="As for search.")] = Device.AUTO,
    replicas: Annotated[str, typer.Option(metavar="auto|N", help="As for search.")] = "auto",
    threads_per_replica: Annotated[int | None, typer.Option(help="As for search.")] = None,
    address: Annotated[str | None, typer.Option(envvar="RAY_ADDRESS", help="As for search.")] = None,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="As for search.")] = False,
    allow_mixed: Annotated[bool, typer.Option("--allow-mixed", help="As for search.")] = False,
    task_timeout_s: Annotated[float, typer.Option(help="As for search.")] = 600.0,
    resource_timeout_s: Annotated[float, typer.Option(help="As for search.")] = 60.0,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure task scores and perplexity."""
    with errors_in_one_line():
        from blockpruner.evaluating.evaluating import EvaluationConfig, evaluate_model

        config = EvaluationConfig(
            model=model, tasks=parts(tasks), include_path=include_path, limit=limit,
            perplexity=tuple(perplexity or ()), text_column=text_column, seq_len=tuple(seq_len or (2048,)),
            num_windows=num_windows, run=run, num_remove=numbers(num_remove), batch_size=batch_size, dtype=dtype.value,
            device=device.value, replicas=num_replicas(replicas), threads_per_replica=threads_per_replica,
            address=ray_address(address, no_ray), no_ray=no_ray, allow_mixed=allow_mixed, task_timeout_s=task_timeout_s,
            resource_timeout_s=resource_timeout_s, revision=revision, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    run_command(evaluate_model, config, as_json=as_json, resumable=out is not None, out=out)
