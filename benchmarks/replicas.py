"""Do replicas give the same bits, and are two replicas of one thread faster than one of two threads?

Runs the same search three times through the driver: with one replica of one thread, two of one thread (on Ray), and one
of two threads. Times are the wall times of steps, without loading and the start of Ray.

    python -m benchmarks.replicas
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.common import console, print_json, print_table, run_benchmark
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter


def main(
    model: str = "smollm2", seq_len: int = 256, num_windows: int = 4, num_remove: int = 3, dtype: str = "auto"
) -> None:
    setups = {"1 replica x 1 thread": (1, 1), "2 replicas x 1 thread": (2, 1), "1 replica x 2 threads": (1, 2)}
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (replicas, threads) in setups.items():
            config = SearchConfig.of(
                model=model,
                calibration="builtin",
                num_samples=16,
                seq_len=seq_len,
                num_windows=num_windows,
                num_remove=num_remove,
                dtype=dtype,
                replicas=replicas,
                threads_per_replica=threads,
            )
            console.print(name)
            runs[name] = run_search(config, Path(folder) / name, Reporter(Console(stderr=True)))
    scores = {name: [(step["block"], step["nll"]) for step in run["steps"]] for name, run in runs.items()}
    one, two, wide = setups
    walls = {name: run["totals"]["wall_s"] for name, run in runs.items()}
    print_table(
        f"{num_remove} steps, {num_windows} windows of {seq_len} tokens",
        ["", "wall (s)", "against 1 x 1"],
        [[name, wall, walls[one] / wall] for name, wall in walls.items()],
    )
    figures = {
        "wall_s": walls,
        "same_bits_1_and_2_replicas": scores[one] == scores[two],
        "same_bits_1_and_2_threads": scores[one] == scores[wide],
        "two_replicas_against_two_threads": walls[wide] / walls[two],
    }
    console.print(
        f"same order and bits: 1 and 2 replicas {figures['same_bits_1_and_2_replicas']}, 1 and 2 threads "
        f"{figures['same_bits_1_and_2_threads']}"
    )
    print_json(figures)


if __name__ == "__main__":
    run_benchmark(main)
