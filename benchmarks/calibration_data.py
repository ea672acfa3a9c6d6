"""Which calibration text is best? Runs a search on each of several texts, with the same number of windows, and
evaluates on held-out text and questions.

    python -m benchmarks.calibration_data --calibration alpaca.jsonl --calibration wikitext2_validation.parquet \\
        --held-out wiki.test.raw --out data
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from matplotlib import pyplot as plt

from benchmarks.common import print_json, print_table, run_benchmark
from benchmarks.studies import (
    HeldOut,
    IncludePath,
    Judge,
    Limit,
    Out,
    Tasks,
    Variant,
    all_pairs,
    cells,
    headings,
    judge_searches,
    score_columns,
)


def main(
    calibration: Annotated[list[str], typer.Option(help="As for search; may be repeated.")],
    held_out: HeldOut,
    out: Out,
    tasks: Tasks = "",
    include_path: IncludePath = None,
    limit: Limit = None,
    num_windows: int = 32,
    num_samples: int = 1024,
    num_remove: int = 12,
    seeds: str = "1,2",
    model: str = "smollm2",
    seq_len: int = 128,
    strategy: str = "lazy",
    replicas: int = 2,
    threads: int = 1,
) -> None:
    common = {
        "model": model, "num_samples": num_samples, "num_windows": num_windows, "num_remove": num_remove,
        "seq_len": seq_len, "strategy": strategy, "threads_per_replica": threads,
    }  # fmt: skip
    judge = Judge(held_out=held_out, tasks=tasks, include_path=include_path, limit=limit)
    variants = [
        Variant(f"{Path(source).stem} {seed}", {"calibration": source, "seed": int(seed)})
        for source in calibration
        for seed in seeds.split(",")
    ]
    judged = judge_searches(variants, common, judge, [num_remove // 3, 2 * num_remove // 3], out, replicas=replicas)
    texts, names = score_columns(judged)
    print_table(
        f"{num_remove} blocks removed, by the calibration text",
        ["calibration and seed", *headings(texts, names)],
        [[found.variant.name, *cells(found.rows[-1], texts, names)] for found in judged],
    )
    pairs = all_pairs(judged, [*texts, *names])
    print_table(
        "Paired differences (other - one) and their p-values",
        ["on", "one", "other", "difference", "p"],
        [
            [Path(pair["on"]).stem, pair["one"], pair["other"], f"{pair['difference']:+.4f}", pair["p_value"]]
            for pair in pairs
        ],
    )
    figure, panels = plt.subplots(1, len(texts), figsize=(5 * len(texts), 3.8), layout="constrained", squeeze=False)
    for panel, text in zip(panels[0], texts, strict=True):
        for index, found in enumerate(judged):
            panel.plot(
                [100 * row["ratio"] for row in found.rows], [row["perplexity"][text]["value"] for row in found.rows],
                marker="o", color=f"C{calibration.index(found.variant.options['calibration'])}",
                linestyle=["-", "--", ":", "-."][index % len(seeds.split(",")) % 4], label=found.variant.name,
            )  # fmt: skip
        panel.set(xlabel="parameters removed (%)", ylabel="perplexity", title=f"held out: {Path(text).stem}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(out / "calibration_data.png", dpi=150)
    rows = [{"name": found.variant.name, **found.rows[-1]} for found in judged]
    print_json({"rows": rows, "pairs": pairs}, out / "calibration_data.json")


if __name__ == "__main__":
    run_benchmark(main, resumable=True)
