"""The command line: parse, build the config, call one function, print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from engine.blocks import Granularity
from engine.errors import SearchFailed, UserError
from engine.metric import Metric

app = typer.Typer(
    help="Find the attention and MLP blocks that a language model can do without, and remove them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


WrongUsage: Any = typer.BadParameter.__base__
"""Of all that Typer raises for a wrong command line; it exports only this subclass."""


class Strategy(StrEnum):
    GREEDY = "greedy"
    LAZY = "lazy"
    ONE_SHOT = "one-shot"
    BEAM = "beam"
    EVOLUTION = "evolution"


class Per(StrEnum):
    BLOCK = "block"
    PARAMS = "params"


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Format(StrEnum):
    AUTO = "auto"
    DECI = "deci"
    GROUPED = "grouped"
    VANILLA = "vanilla"
    GGUF = "gguf"


class GgufType(StrEnum):
    F32 = "f32"
    F16 = "f16"
    Q8_0 = "q8_0"


class PlacementChoice(StrEnum):
    AUTO = "auto"
    RESIDENT = "resident"
    STREAMED = "streamed"
    SHARDED = "sharded"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face id, checkpoint folder, .gguf file, or smollm2.")
]
Json = Annotated[bool, typer.Option("--json", help="The last line on stdout is one JSON object.")]
TextColumn = Annotated[str, typer.Option(help="Column of the texts in a .jsonl, .json or .parquet file.")]


Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let code run that the model brings.")]


@contextmanager
def _errors_in_one_line(*, resumable: bool = False) -> Iterator[None]:
    """Bad input: one line, exit code 2. A search that cannot go on: one line, 1. Ctrl-C: 130. A bug: its traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except SearchFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        done = "the same command goes on from here" if resumable else "nothing was written"
        print(f"stopped; {done}", file=sys.stderr)
        raise typer.Exit(130) from None


def _run(function: Callable[..., Any], *args: Any, as_json: bool, resumable: bool = False, **kwargs: Any) -> Any:
    """Call `function(*args, reporter, **kwargs)`; with `as_json` print what it returns as the last line of stdout."""
    from cluster.files import plain
    from cluster.progress import Reporter, quiet_libraries
    from cluster.session import interruptible

    quiet_libraries()
    with _errors_in_one_line(resumable=resumable), interruptible():
        result = function(*args, Reporter(Console()), **kwargs)
    if as_json:
        print(json.dumps(plain(result), allow_nan=False))
    return result


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
    from cluster.demo import run_demo

    _run(run_demo, out, as_json=as_json, resumable=True, ratio=ratio, replicas=replicas)


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
        str, typer.Option("--keep", "--never", metavar="mha.0,mlp.0,…", help="Blocks that are never removed.")
    ] = "",
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
    with _errors_in_one_line():
        config = _search_config(
            model=model, calibration=calibration, text_column=text_column, num_samples=num_samples, seq_len=seq_len,
            num_windows=num_windows, seed=seed, num_remove=num_remove, ratio=ratio, blocks=blocks,
            strategy=strategy.value, metric=metric, tolerance=tolerance, audit=audit, width=width,
            generations=generations, offspring=offspring, refine=refine, per=per.value, max_mha=max_mha,
            max_mlp=max_mlp, keep=_parts(keep), max_perplexity=max_perplexity,
            dtype=dtype.value, device=device.value, replicas=_replicas(replicas), placement=placement.value,
            gpus_per_replica=gpus_per_replica, threads_per_replica=threads_per_replica,
            address=_address(address, no_ray), no_ray=no_ray, allow_mixed=allow_mixed, task_timeout_s=task_timeout_s,
            resource_timeout_s=resource_timeout_s, revision=revision, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    from cluster.driver import run_search

    _run(run_search, config, out, as_json=as_json, resumable=True)


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
    from cluster.plan import plan_search

    with _errors_in_one_line():
        budget = _budget(num_remove, 0.25 if num_remove is None and ratio is None else ratio)
        number = _replicas(replicas)
    _run(
        plan_search, model, as_json=as_json, gpus=gpus, num_nodes=nodes, placement=placement.value,
        gpus_per_replica=gpus_per_replica, replicas=number, budget=budget, blocks=blocks, seq_len=seq_len,
        num_windows=num_windows, dtype=dtype.value, tflops=tflops, measure=measure, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


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
    from cluster.pruning import prune_model

    _run(
        prune_model, model, out, as_json=as_json, run=run, sequence=sequence, num_remove=num_remove, dtype=dtype.value,
        revision=revision, trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command(
    epilog="Example: `blockpruner evaluate smollm2-pruned --tasks paper --perplexity wikitext2`, or, before anything "
    "is written, `blockpruner evaluate smollm2 --run run --num-remove 0,4,8 --perplexity wikitext2`"
)
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_DIR", help="A model as for search, or a pruned checkpoint.")
    ],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="piqa,…",
            help="Tasks, groups or tags of lm-eval; paper: the five of the paper's Table 1, paper-more: the four that "
            "its Table 10 adds, paper-aqua: AQuA-RAT.",
        ),
    ] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder with further task files for lm-eval.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions of each task.")] = None,
    perplexity: Annotated[
        list[str] | None, typer.Option(help="wikitext2 (its test split) or a file; may be given repeatedly.")
    ] = None,
    text_column: TextColumn = "text",
    seq_len: Annotated[list[int] | None, typer.Option(help="Tokens of one window; may be repeated; 2048.")] = None,
    num_windows: Annotated[int | None, typer.Option(help="Use only the first so many windows.")] = None,
    run: Annotated[Path | None, typer.Option(help="Evaluate MODEL without the blocks that this run removed.")] = None,
    num_remove: Annotated[
        str, typer.Option(metavar="K,…", help="With --run: after how many removals, 0 for none; default: all.")
    ] = "",
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
    with _errors_in_one_line():
        from cluster.evaluating import EvaluationConfig, evaluate_model

        config = EvaluationConfig(
            model=model, tasks=_parts(tasks), include_path=include_path, limit=limit,
            perplexity=tuple(perplexity or ()), text_column=text_column, seq_len=tuple(seq_len or (2048,)),
            num_windows=num_windows, run=run, num_remove=_numbers(num_remove), batch_size=batch_size, dtype=dtype.value,
            device=device.value, replicas=_replicas(replicas), threads_per_replica=threads_per_replica,
            address=_address(address, no_ray), no_ray=no_ray, allow_mixed=allow_mixed, task_timeout_s=task_timeout_s,
            resource_timeout_s=resource_timeout_s, revision=revision, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    _run(evaluate_model, config, as_json=as_json, resumable=out is not None, out=out)


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
    from cluster.latency import measure_latency
    from engine.latency import Workload

    workload = Workload(prompt_len=prompt_len, num_tokens=num_tokens, batch_size=batch_size, static_cache=static_cache)
    _run(
        measure_latency, model, as_json=as_json, workload=workload, repeats=repeats, dense=dense, no_dense=no_dense,
        threads=threads, dtype=dtype.value, device=device.value, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command(
    epilog="Example: `blockpruner compare smollm2 --calibration builtin --seq-len 128 --num-windows 8 --methods "
    "blockpruner,shortgpt,rm --ratio 0.1,0.2 --strategy lazy --perplexity builtin --test-seq-len 256 --test-windows 16 "
    "--out compared`"
)
def compare(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for all results. The same command again goes on from there.")],
    methods: Annotated[
        str,
        typer.Option(
            metavar="blockpruner,…",
            help="Out of blockpruner, one-shot, layer, sleb, shortened-llama, finercut (searches by scores), shortgpt, "
            "rm, bi-blocks, rm-blocks, bi-blocks-again, rm-blocks-again (by a statistic), laco, laco-code, "
            "slicegpt (other weights).",
        ),
    ] = "blockpruner,slicegpt,laco-code,rm,shortgpt",
    ratio: Annotated[
        str,
        typer.Option(metavar="R,…", help="Shares of the parameters to remove; each method comes as near as it can."),
    ] = "0.2",
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
    tasks: Annotated[str, typer.Option(metavar="piqa,…", help="As for evaluate.")] = "",
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
    with _errors_in_one_line():
        from cluster.compare.comparing import compare_methods
        from cluster.compare.config import CompareConfig

        search = _search_config(
            model=model, calibration=calibration, text_column=text_column, num_samples=num_samples, seq_len=seq_len,
            num_windows=num_windows, seed=seed, num_remove=1, strategy=strategy.value, tolerance=tolerance,
            dtype=dtype.value, device=device.value, replicas=_replicas(replicas),
            threads_per_replica=threads_per_replica, no_ray=no_ray, revision=revision,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        config = CompareConfig(
            methods=_parts(methods), ratio=_shares(ratio), search=search, perplexity=tuple(perplexity or ()),
            test_seq_len=test_seq_len, test_windows=test_windows, tasks=_parts(tasks), include_path=include_path,
            limit=limit, batch_size=batch_size, repeats=repeats,
        )  # fmt: skip
    _run(compare_methods, config, out, as_json=as_json, resumable=True)


@app.command(epilog="Example: `blockpruner recover smollm2-pruned --perplexity wikitext2 --out smollm2-recovered`")
def recover(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint that prune wrote.")],
    out: Annotated[
        Path, typer.Option(help="New folder for the recovered checkpoint. The same command resumes what was stopped.")
    ],
    data: Annotated[
        str, typer.Option(help="Rows to train on: alpaca, wikitext2, builtin or a file, as for search.")
    ] = "alpaca",
    text_column: TextColumn = "text",
    num_rows: Annotated[int, typer.Option(help="Rows drawn from the data; the others are held out.")] = 8000,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            help="Text on which to say what was recovered: rest (the rows held out), wikitext2 (its test split) or a "
            "file; may be given repeatedly."
        ),
    ] = None,
    num_windows: Annotated[int | None, typer.Option(min=1, help="Use only its first so many windows.")] = None,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 32,
    alpha: Annotated[float, typer.Option(help="The adapters are scaled by alpha / rank.")] = 10,
    lr: Annotated[float, typer.Option(help="Learning rate at first; it falls linearly to zero.")] = 2e-4,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Rows of one forward.")] = 1,
    accumulation: Annotated[int, typer.Option(help="Forwards of one step of the optimizer.")] = 4,
    seq_len: Annotated[
        int, typer.Option(help="Tokens of a row, more are cut off; and of a window of --perplexity.")
    ] = 512,
    seed: Annotated[int, typer.Option(help="Of the draw, the order of the rows, the adapters and the dropout.")] = 42,
    dtype: Annotated[Dtype, typer.Option(help="Of the frozen weights, as for search; adapters are float32.")] = (
        Dtype.AUTO
    ),
    device: Annotated[Device, typer.Option(help="As for search.")] = Device.AUTO,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of this machine, each with a copy of the model.")] = 1,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Train LoRA adapters for a pruned checkpoint, and merge them."""
    from cluster.recovering import recover_model
    from engine.recovery import RecoveryConfig

    with _errors_in_one_line():
        config = RecoveryConfig(
            rank=rank, alpha=alpha, lr=lr, epochs=epochs, batch_size=batch_size, accumulation=accumulation,
            seq_len=seq_len, seed=seed,
        )  # fmt: skip
    _run(
        recover_model, folder, out, as_json=as_json, resumable=True, config=config, data=data, text_column=text_column,
        num_rows=num_rows, texts=perplexity or [], num_windows=num_windows, dtype=dtype.value, device=device.value,
        gpus=gpus, trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command(
    epilog="Example: `blockpruner export smollm2-pruned --out smollm2-deci`, or `blockpruner export smollm2-pruned "
    "--format gguf --base smollm2 --out smollm2-gguf`"
)
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint that prune or recover wrote.")],
    out: Annotated[Path, typer.Option(help="New folder for the export.")],
    style: Annotated[
        Format,
        typer.Option(
            "--format",
            help="deci: for vLLM and more, Llama-like models; grouped: every architecture, for transformers and vLLM; "
            "vanilla: no custom code, less speed; gguf: llama.cpp; auto: deci where it fits, else grouped.",
        ),
    ] = Format.AUTO,
    base: Annotated[
        str | None,
        typer.Option(metavar="FILE.gguf", help="gguf: the dense model's GGUF, whose tensors are copied, or smollm2."),
    ] = None,
    gguf_type: Annotated[
        GgufType | None, typer.Option(help="gguf: convert the checkpoint's own weights to this instead.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="File of `evaluate --json` for the model card; may be given repeatedly.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a pruned checkpoint in the form that a runtime loads, with a model card."""
    from cluster.exporting import export_model

    _run(
        export_model, folder, out, as_json=as_json, style=style.value, base=base,
        gguf_type=None if gguf_type is None else gguf_type.value, evaluations=evaluation or (),
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


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
    from cluster.serve_check import check_serving

    result = _run(
        check_serving, folder, as_json=as_json, pythons=python or (), pruned=pruned, num_tokens=num_tokens,
        dtype="float32" if dtype is Dtype.AUTO else dtype.value, threads=threads, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if any(found["result"] in ("failed", "differs") for found in result["results"]):
        raise typer.Exit(1)


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
    from cluster.report.writing import write_report

    _run(
        write_report, runs, out, as_json=as_json, influence=influence, evaluations=evaluation or (),
        latencies=latency or (), trust_remote_code=trust_remote_code,
    )  # fmt: skip


def _budget(num_remove: int | None, ratio: float | None) -> Any:
    from engine.search.budget import Budget

    return Budget(num_remove=num_remove, ratio=ratio)


def _search_config(**options: Any) -> Any:
    from cluster.config import SearchConfig

    return SearchConfig(**options)


def _address(address: str | None, no_ray: bool) -> str | None:
    """--no-ray is stronger than the environment, but not than --address: both together are refused."""
    return None if no_ray and address == os.environ.get("RAY_ADDRESS") else address


def _parts(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.replace(" ", "").split(",")))


def _numbers(text: str) -> tuple[int, ...]:
    if wrong := [part for part in _parts(text) if not part.isdecimal()]:
        raise UserError(f"expected --num-remove as numbers such as 0,4,8, got {wrong[0]!r}.")
    return tuple(map(int, _parts(text)))


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, _parts(text)))
    except ValueError:
        raise UserError(f"expected --ratio as shares such as 0.2,0.3, got {text!r}.") from None


def _replicas(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UserError(f"expected --replicas auto or a number, got {text!r}.")
    return int(text)


def main() -> None:
    """The console script. Wrong options, too, are one line and exit code 2."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries; tqdm looks at it when it is imported
    try:
        code = app(standalone_mode=False)
    except WrongUsage as error:
        message = " ".join(error.format_message().split())
        if message:  # empty where the help was printed instead
            print(f"error: {message} (--help shows the options)", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
