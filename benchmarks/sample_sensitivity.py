"""How many calibration samples does the search need? (Figure 7 of the paper)

Runs one search for each number of samples, and evaluates on held-out text and questions.

    python -m benchmarks.sample_sensitivity --calibration alpaca.jsonl --held-out wiki.test.raw --tasks piqa,arc_easy \\
        --out samples
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
    cells,
    headings,
    judge_searches,
    score_columns,
)


def main(
    calibration: Annotated[str, typer.Option(help="As for search.")],
    held_out: HeldOut,
    out: Out,
    tasks: Tasks = "",
    include_path: IncludePath = None,
    limit: Limit = None,
    samples: Annotated[str, typer.Option(help="Numbers of samples, comma-separated.")] = "8,16,32,64,128",
    num_remove: int = 12,
    seed: int = 1,
    model: str = "smollm2",
    seq_len: int = 128,
    strategy: str = "lazy",
    replicas: int = 2,
    threads: int = 1,
) -> None:
    common = {
        "model": model, "calibration": calibration, "seed": seed, "num_remove": num_remove,
        "seq_len": seq_len, "strategy": strategy, "threads_per_replica": threads,
    }  # fmt: skip
    judge = Judge(held_out=held_out, tasks=tasks, include_path=include_path, limit=limit)
    numbers = [int(number) for number in samples.split(",")]
    variants = [Variant(f"{number} samples", {"num_samples": number}) for number in numbers]
    judged = judge_searches(variants, common, judge, [], out, replicas=replicas)
    texts, names = score_columns(judged)
    print_table(
        f"{num_remove} blocks removed, by the number of samples",
        ["samples", "calibration tokens", *headings(texts, names), "search (s)"],
        [
            [number, found.search["calibration"]["num_tokens"], *cells(found.rows[-1], texts, names),
             found.search["totals"]["wall_s"]]
            for number, found in zip(numbers, judged, strict=True)
        ],
    )  # fmt: skip
    figure, panels = plt.subplots(
        1, 2 if names else 1, figsize=(9.6 if names else 5, 3.8), layout="constrained", squeeze=False
    )
    for text in texts:
        found = [one.rows[-1]["perplexity"][text] for one in judged]
        panels[0][0].errorbar(
            numbers, [value["value"] for value in found], yerr=[value["stderr"] or 0 for value in found],
            marker="o", capsize=3, label=Path(text).stem,
        )  # fmt: skip
    panels[0][0].set(xscale="log", xlabel="calibration samples", ylabel="held-out perplexity")
    for name in names:
        scores = [one.rows[-1]["tasks"][name] for one in judged]
        panels[0][1].errorbar(
            numbers, [100 * score["score"] for score in scores], yerr=[100 * score["stderr"] for score in scores],
            marker="o", capsize=3, label=name,
        )  # fmt: skip
    if names:
        panels[0][1].set(xscale="log", xlabel="calibration samples", ylabel="score (%)")
    for panel in panels[0]:
        panel.set_xticks(numbers, [str(number) for number in numbers])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(out / "sample_sensitivity.png", dpi=150)
    rows = [
        {"samples": number, "calibration": found.search["calibration"], **found.rows[-1],
         "removed": [step["block"] for step in found.search["steps"]]}
        for number, found in zip(numbers, judged, strict=True)
    ]  # fmt: skip
    print_json({"rows": rows}, out / "sample_sensitivity.json")


if __name__ == "__main__":
    run_benchmark(main, resumable=True)
