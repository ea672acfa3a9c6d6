"""How long does each method take, compared with ShortGPT? Table 7 of the paper, for any model.

Each method runs in its own process on the same windows, in several rounds. Its time is measured from the start of
Python to the end of the process, with the removal order (or the checkpoint) on disk, and is split into start-up (Python
and its imports), loading (Ray, the model, the windows, and for a search the check of batch invariance), and the search.

    python -m benchmarks.pruning_time
"""

from __future__ import annotations

import math
import statistics
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers import PreTrainedModel

from benchmarks.common import console, print_json, print_table, run_benchmark
from benchmarks.paper.numbers import TIME_S
from blockpruner.comparing.config import CompareConfig
from blockpruner.comparing.method import Method
from blockpruner.comparing.running import run_method
from blockpruner.engine.blocks import Granularity
from blockpruner.engine.methods.fewer_layers import ratio_of
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import materialize, meta_model, resolve_device, resolve_dtype
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.strategies.lazy import Lazy
from blockpruner.engine.work.memory import GIB
from blockpruner.engine.work.shape import ModelShape
from blockpruner.planning.config import PlanConfig
from blockpruner.planning.planning import plan_search
from blockpruner.searching.config import SearchConfig
from blockpruner.showing.console import Reporter

SIZES = {"llama-2-7b": ("Llama2-7B", 0.2199), "llama-2-13b": ("Llama2-13B", 0.2512)}
"""Built-in shapes, the names in the paper's Table 7, and the share that its BlockPruner removed from them."""
AIMS = {"lazy": 30.0, "lazy-1se": 15.0}
"""Times ShortGPT's, at most."""
LAZY = {"lazy": Lazy(), "lazy-1se": Lazy(tolerance="1se")}
"""BlockPruner's search, made cheaper."""
PAPERS = {"lazy": "blockpruner"}
"""Whose time of the paper stands beside it."""
PARTS = ("startup_s", "load_s", "search_s")
WHOLE = ("total_s", "peak_memory_bytes", "work_flops")


def main(
    model: str = "smollm2",
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated; lazy: BlockPruner's cheaper search."),
    ] = ",".join([*LAZY, *Method.all()]),
    calibration: str = "builtin",
    seq_len: int = 128,
    num_windows: int = 32,
    num_remove: Annotated[int, typer.Option(help="Blocks to remove (K); or K / 2 layers.")] = 15,
    repeats: int = 2,
    replicas: Annotated[int, typer.Option(help="Replicas of one thread; 0: one process, all threads.")] = 2,
) -> None:
    common = CompareConfig(
        model=model, calibration=(calibration,), num_samples=1000, seq_len=seq_len, num_windows=num_windows,
        replicas=replicas or None, no_ray=replicas == 0,
    )  # fmt: skip
    names = methods.split(",")
    if "shortgpt" not in names:
        raise typer.BadParameter("expected shortgpt among the methods: times are told as multiples of its time.")
    source = ModelSource(model)
    dtype, _ = resolve_dtype("auto", source, resolve_device("auto"))
    skeleton = meta_model(materialize(source, dtype), dtype)
    shape = Decoder(skeleton).shape
    ratio = num_remove / (2 * shape.num_layers) * ratio_of(shape, shape.num_layers)
    configs = {name: _told(name, common, skeleton, shape, num_remove, ratio) for name in names}
    times: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(repeats):
            for name in names:
                console.print(f"round {number + 1} of {repeats}: {name}", style="bold")
                outcome = run_method(_base(name), configs[name], Path(scratch) / f"{name}-{number}")
                last = outcome["steps"][-1] if "steps" in outcome else outcome
                times[name].append({key: (outcome | last)[key] for key in (*PARTS, *WHOLE)})
    medians = {
        name: {key: statistics.median(found[key] for found in of_method) for key in (*PARTS, *WHOLE)}
        for name, of_method in times.items()
    }
    yardstick = medians["shortgpt"]
    rows = []
    for name, found in medians.items():
        spread = sorted(one["total_s"] for one in times[name])
        papers = [_paper(size, name) for size in SIZES]
        rows.append(
            [
                name,
                *(f"{found[part]:.1f}" for part in PARTS),
                f"{found['total_s']:.1f} ({spread[0]:.1f}–{spread[-1]:.1f})",
                f"{found['total_s'] / yardstick['total_s']:.1f}",
                f"{found['search_s'] / yardstick['search_s']:.1f}",
                f"{found['work_flops'] / 1e12:.1f}",
                f"{found['peak_memory_bytes'] / GIB:.2f}",
                *papers,
            ]
        )
    print_table(
        f"{model}, {num_windows} windows of {seq_len}, {num_remove} blocks: seconds, medians of {repeats}",
        [
            "", "start-up", "loading", "search", "in all", "of ShortGPT's", "search of its", "work (TFLOP)",
            "memory (GiB)",
            *(f"paper, {size}" for size in SIZES),
        ],
        rows,
    )  # fmt: skip
    for name, aim in AIMS.items():
        if name in medians:
            reached = medians[name]["total_s"] / yardstick["total_s"]
            verdict = "reached" if reached <= aim else "missed"
            console.print(f"{name}: {reached:.1f} times ShortGPT's time; the aim of {aim:g} is {verdict}")
    for claim in _claims({name: found["total_s"] for name, found in medians.items()}):
        console.print(claim)
    forecasts = _forecasts()
    print_table(
        "Forecast of `plan` for two GPUs of 24 GB (13 windows of 2,048, the paper's ratios), beside the paper's time",
        ["", "greedy (min)", "lazy (min)", "paper (min)"],
        [[size, *(f"{value / 60:.1f}" for value in found.values())] for size, found in forecasts.items()],
    )
    print_json(
        {
            "model": model,
            "num_windows": num_windows,
            "seq_len": seq_len,
            "num_remove": num_remove,
            "medians": medians,
            "rounds": times,
            "ratio_to_shortgpt": {name: found["total_s"] / yardstick["total_s"] for name, found in medians.items()},
            "forecasts_s": forecasts,
        }
    )


def _base(name: str) -> str:
    """Return the method for a name."""
    return "blockpruner" if name in LAZY else name


def _told(
    name: str, common: CompareConfig, skeleton: PreTrainedModel, shape: ModelShape, num_remove: int, ratio: float
) -> SearchConfig:
    """Return the options of a method: K blocks or K / 2 layers, or their share if it rebuilds the model. Raises
    UserError if they do not suit the model. skeleton: the model without weights."""
    base = _base(name)
    config = common.replace(methods=(base,), ratio=(ratio,), strategy=LAZY.get(name, common.strategy))
    method, told = Method.named("methods", base), config.told(base, shape.num_layers)
    if not method.rebuilds:
        num = max(1, num_remove // 2) if told.blocks is Granularity.LAYER else num_remove
        told = told.replace(ratio=None, num_remove=num)
    method.check(told, skeleton, shape)
    return told


def _paper(size: str, name: str) -> str:
    """Return the paper's ratio of a method's time to ShortGPT's."""
    times = TIME_S[SIZES[size][0]]
    seconds = times.get(PAPERS.get(name, name))
    if seconds is None:
        return ""
    return f"{'< ' if name == 'rm' else ''}{seconds / times['shortgpt']:.1f}"


def _claims(seconds: dict[str, float]) -> list[str]:
    """Check for each pair of methods whether their times come in the paper's order. BlockPruner stands for lazy if only
    that ran."""
    seconds = {"blockpruner": seconds.get("lazy", math.nan), **seconds}
    found = []
    for fast, slow in combinations(("rm", "shortgpt", "laco-code", "blockpruner", "slicegpt"), 2):
        papers = sum(times[fast] < times[slow] for times in TIME_S.values())
        ours = [seconds.get(name, math.nan) for name in (fast, slow)]
        if papers and not any(map(math.isnan, ours)):
            verdict = "holds here" if ours[0] < ours[1] else "does NOT hold here"
            found.append(f"{fast} takes less time than {slow}: in the paper on {papers} of {len(TIME_S)}; {verdict}")
    return found


def _forecasts() -> dict[str, dict[str, float]]:
    """Return seconds, from the placement and the counted work at the rate that `plan` assumes for such GPUs."""
    found = {}
    for size, (name, ratio) in SIZES.items():
        config = PlanConfig(model=size, gpus="2x24GB", ratio=ratio, seq_len=2048, num_windows=13)
        plan = plan_search(config, Reporter(Console(stderr=True)))
        strategies = plan["strategies"]
        found[size] = {
            "greedy": strategies["greedy"]["forecast_s"],
            "lazy": strategies["lazy"]["forecast_s"],
            "paper": float(TIME_S[name]["blockpruner"]),
        }
    return found


if __name__ == "__main__":
    run_benchmark(main)
