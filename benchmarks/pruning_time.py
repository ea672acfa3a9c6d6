"""How long does each method take, beside ShortGPT? The paper's Table 7, on a model of one's own.

Every method runs in a process of its own on the same windows, from the start of Python to the removal order (or the
checkpoint) on disk, in turn, and all of it several times. Each time is split: start-up (Python and its imports),
loading (Ray, the model, the windows), and the search itself.

    python -m benchmarks.pruning_time
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.common import console, print_json, print_table, run_benchmark
from benchmarks.paper.numbers import TIME_S
from cluster.compare.config import CompareConfig
from cluster.compare.methods import Rebuilt, method
from cluster.compare.running import run_method
from cluster.config import SearchConfig
from cluster.plan import plan_search
from cluster.progress import Reporter
from engine.decoder import Decoder
from engine.loading import ModelSource, materialize, meta_model, resolve_device, resolve_dtype
from engine.search.budget import Budget

SIZES = {"llama-2-7b": ("Llama2-7B", 0.2199), "llama-2-13b": ("Llama2-13B", 0.2512)}
"""Built-in shapes, the names in the paper's Table 7, and the share that its BlockPruner removed from them."""
AIMS = {"lazy": 30.0, "lazy-1se": 15.0}
"""Times ShortGPT's, at most."""
LAZY: dict[str, dict[str, Any]] = {"lazy": {"strategy": "lazy"}, "lazy-1se": {"strategy": "lazy", "tolerance": "1se"}}
"""BlockPruner's search, made cheaper."""
PARTS = ("startup_s", "load_s", "search_s")


def main(
    model: str = "smollm2",
    methods: str = "shortgpt,rm,lazy,lazy-1se,one-shot,layer,bi-blocks-again,laco-code,slicegpt,blockpruner",
    calibration: str = "builtin",
    seq_len: int = 128,
    num_windows: int = 32,
    num_remove: Annotated[int, typer.Option(help="K, blocks; half as many layers.")] = 15,
    repeats: int = 2,
    replicas: Annotated[int, typer.Option(help="Of one thread each; 0 for one process with all threads.")] = 2,
) -> None:
    common = SearchConfig(
        model=model, calibration=calibration, num_samples=1000, seq_len=seq_len, num_windows=num_windows,
        num_remove=num_remove, replicas=replicas or None, no_ray=replicas == 0,
    )  # fmt: skip
    names = methods.split(",")
    if "shortgpt" not in names:
        raise typer.BadParameter("expected shortgpt among the methods: times are told as multiples of its time.")
    source = ModelSource(model)
    dtype, _ = resolve_dtype("auto", source, resolve_device("auto"))
    shape = Decoder(meta_model(materialize(source, dtype), dtype)).shape
    ratio = num_remove / (2 * shape.num_layers)
    times: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(repeats):
            for name in names:
                base = "blockpruner" if name in LAZY else name
                how = method(base).how
                config = CompareConfig(methods=(base,), ratio=(ratio,), search=common).search_by(base, shape)
                if not isinstance(how, Rebuilt):
                    num = num_remove // 2 if config.blocks == "layer" else num_remove
                    config = replace(config, ratio=None, num_remove=num, **LAZY.get(name, {}))
                console.print(f"round {number + 1} of {repeats}: {name}", style="bold")
                outcome = run_method(base, config, Path(scratch) / f"{name}-{number}", ratio=ratio)
                last = outcome["steps"][-1] if "steps" in outcome else outcome
                parts = {part: (outcome | last)[part] for part in PARTS}
                whole = {"pruning_s": outcome["total_s"], "peak_bytes": outcome["peak_memory_bytes"]}
                times[name].append({**parts, **whole, "work_flops": last["work_flops"]})
    medians = {
        name: {key: statistics.median(found[key] for found in of_method) for key in of_method[0]}
        for name, of_method in times.items()
    }
    yardstick = medians["shortgpt"]
    rows = []
    for name, found in medians.items():
        spread = sorted(one["pruning_s"] for one in times[name])
        papers = [_paper(size, name) for size in SIZES]
        rows.append(
            [
                name,
                *(f"{found[part]:.1f}" for part in PARTS),
                f"{found['pruning_s']:.1f} ({spread[0]:.1f}–{spread[-1]:.1f})",
                f"{found['pruning_s'] / yardstick['pruning_s']:.1f}",
                f"{found['search_s'] / yardstick['search_s']:.1f}",
                f"{found['work_flops'] / 1e12:.1f}",
                f"{found['peak_bytes'] / 2**30:.2f}",
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
            reached = medians[name]["pruning_s"] / yardstick["pruning_s"]
            verdict = "reached" if reached <= aim else "missed"
            console.print(f"{name}: {reached:.1f} times ShortGPT's time; the aim of {aim:g} is {verdict}")
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
            "ratio_to_shortgpt": {name: found["pruning_s"] / yardstick["pruning_s"] for name, found in medians.items()},
            "forecasts_s": forecasts,
        }
    )


def _paper(size: str, name: str) -> str:
    """The paper's ratio of a method's time to ShortGPT's."""
    times = TIME_S[SIZES[size][0]]
    seconds = times.get(name)
    return "" if seconds is None else f"{seconds / times['shortgpt']:.1f}"


def _forecasts() -> dict[str, dict[str, float]]:
    """Seconds: what the placement and the counted work give at the rate that `plan` assumes for such GPUs."""
    found = {}
    for size, (name, ratio) in SIZES.items():
        plan = plan_search(
            size,
            Reporter(Console(stderr=True)),
            gpus="2x24GB",
            budget=Budget(ratio=ratio),
            seq_len=2048,
            num_windows=13,
        )
        strategies = plan["strategies"]
        found[size] = {
            "greedy": strategies["greedy"]["forecast_s"],
            "lazy": strategies["lazy"]["forecast_s"],
            "paper": float(TIME_S[name]["blockpruner"]),
        }
    return found


if __name__ == "__main__":
    run_benchmark(main)
