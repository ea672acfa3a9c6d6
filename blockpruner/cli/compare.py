"""`blockpruner compare`."""

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
    Revision,
    Strategy,
    TextColumn,
    TrustRemoteCode,
    num_replicas,
    parts,
    shares,
)


@app.command(
    epilog="Example: `blockpruner compare smollm2 --calibration builtin --seq-len 128 --num-windows 8 --methods "
    "blockpruner,shortgpt,rm --ratio 0.1,0.2 --strategy lazy --perplexity builtin --test-seq-len 256 --test-windows 16 "
    "--out compared`"
)
def compare(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for all results. The same command again goes on from there.")],
    methods: Annotated[
        list[str],
        typer.Option(
            metavar="blockpruner,…",
            help="Out of blockpruner, per-params, one-shot, layer, sleb, shortened-llama, finercut (by masks' scores), "
            "shortgpt, rm, bi-blocks, rm-blocks, bi-blocks-again, rm-blocks-again (by a statistic), laco, laco-code, "
            "slicegpt (other weights).",
        ),
    ] = ["blockpruner,slicegpt,laco-code,rm,shortgpt"],  # noqa: B006 - typer copies it
    ratio: Annotated[
        list[str],
        typer.Option(metavar="R,…", help="Shares of the parameters to remove; each method comes as near as it can."),
    ] = ["0.2"],  # noqa: B006
    calibration: Annotated[str, typer.Option(help="As for search.")] = "alpaca",
    text_column: TextColumn = "text",
    num_samples: Annotated[int, typer.Option(help="As for search.")] = 256,
    seq_len: Annotated[int, typer.Option(help="Tokens of one calibration window.")] = 2048,
    num_windows: Annotated[int | None, typer.Option(help="Use only the first so many calibration windows.")] = None,
    seed: Annotated[int, typer.Option(help="As for search.")] = 42,
    strategy: Annotated[
        Strategy, typer.Option(help="Of all searches that go step by step: greedy, or lazy for a fraction of the work.")
    ] = Strategy.GREEDY,
    tolerance: Annotated[str | None, typer.Option(metavar="NATS|1se", help="lazy: as for search.")] = None,
    perplexity: Annotated[list[str] | None, typer.Option(help="As for evaluate.")] = None,
    test_seq_len: Annotated[int, typer.Option(help="Tokens of one window of --perplexity.")] = 2048,
    test_windows: Annotated[int | None, typer.Option(help="Use only the first so many of them.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(metavar="piqa,…", help="As for evaluate.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="As for evaluate.")] = None,
    limit: Annotated[int | None, typer.Option(help="As for evaluate.")] = None,
    batch_size: Annotated[int, typer.Option(help="As for evaluate.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed generations of each model beside the dense one; 0: none.")] = 5,
    dtype: Annotated[Dtype, typer.Option(help="As for search.")] = Dtype.AUTO,
    device: Annotated[Device, typer.Option(help="As for search.")] = Device.AUTO,
    replicas: Annotated[str, typer.Option(metavar="auto|N", help="As for search; on this machine.")] = "auto",
    threads_per_replica: Annotated[int | None, typer.Option(help="As for search.")] = None,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="As for search.")] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Run several pruning methods on one model and text, and compare what they leave."""
    with errors_in_one_line():
        from blockpruner.comparing.comparing import compare_methods
        from blockpruner.comparing.config import CompareConfig
        from blockpruner.searching.config import SearchConfig

        search = SearchConfig(
            model=model, calibration=calibration, text_column=text_column, num_samples=num_samples, seq_len=seq_len,
            num_windows=num_windows, seed=seed, num_remove=1, strategy=strategy.value, tolerance=tolerance,
            dtype=dtype.value, device=device.value, replicas=num_replicas(replicas),
            threads_per_replica=threads_per_replica, no_ray=no_ray, revision=revision,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        config = CompareConfig(
            methods=parts(methods), ratio=shares(ratio), search=search, perplexity=tuple(perplexity or ()),
            test_seq_len=test_seq_len, test_windows=test_windows, tasks=parts(tasks), include_path=include_path,
            limit=limit, batch_size=batch_size, repeats=repeats,
        )  # fmt: skip
    run_command(compare_methods, config, out, as_json=as_json, resumable=True)
