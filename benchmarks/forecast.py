"""How accurate is the time that `plan` forecasts? Compares the forecast for SmolLM2 on this machine with a real run.

python -m benchmarks.forecast
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.common import print_json, print_table, run_benchmark
from blockpruner.planning.config import PlanConfig
from blockpruner.planning.planning import plan_search
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter


def main(
    model: str = "smollm2", seq_len: int = 512, num_windows: int = 2, num_remove: int = 2, replicas: int = 2
) -> None:
    reporter = Reporter(Console(stderr=True))
    config = SearchConfig(
        model=model,
        calibration=("builtin",),
        num_samples=32,
        seq_len=seq_len,
        num_windows=num_windows,
        num_remove=num_remove,
        replicas=replicas,
        threads_per_replica=1,
    )
    plan = plan_search(PlanConfig(**dict(config)), reporter)
    with tempfile.TemporaryDirectory() as folder:
        run = run_search(config, Path(folder) / "run", reporter)
    forecast, real = plan["strategies"]["greedy"], run["totals"]
    print_table(
        f"{model}: {num_remove} steps, {num_windows} windows of {seq_len}, {replicas} replicas",
        ["", "forecast", "run", "forecast / run"],
        [
            ["work (TFLOP)", *_row(forecast["work_flops"] / 1e12, real["work_flops"] / 1e12)],
            ["time (s)", *_row(forecast["forecast_s"], real["wall_s"])],
        ],
    )
    print_json(
        {
            "forecast_s": forecast["forecast_s"],
            "wall_s": real["wall_s"],
            "time_ratio": forecast["forecast_s"] / real["wall_s"],
            "work_ratio": forecast["work_flops"] / real["work_flops"],
            "rate": plan["rate"],
        }
    )


def _row(forecast: float, real: float) -> list[float]:
    return [forecast, real, forecast / real]


if __name__ == "__main__":
    run_benchmark(main)
