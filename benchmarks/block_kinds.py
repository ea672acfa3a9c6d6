"""Which blocks should be removed: attention, MLP, or both? (Figure 4 of the paper)

Runs three searches and evaluates their masks on held-out text and questions, as a function of the removed share of the
parameters.

    python -m benchmarks.block_kinds --calibration alpaca.jsonl --held-out wiki.test.raw --out kinds
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
from blockpruner.engine.blocks import Granularity
from blockpruner.showing.style import logarithmic


def main(
    calibration: Annotated[str, typer.Option(help="As for search.")],
    held_out: HeldOut,
    out: Out,
    tasks: Tasks = "",
    include_path: IncludePath = None,
    limit: Limit = None,
    ratio: Annotated[float, typer.Option(help="Share of the parameters to remove.")] = 0.2,
    most_mha: Annotated[int, typer.Option(help="Number of blocks to remove in the search over attention only.")] = 20,
    num_windows: int = 24,
    seed: int = 1,
    model: str = "smollm2",
    seq_len: int = 128,
    strategy: str = "lazy",
    replicas: int = 2,
    threads: int = 1,
) -> None:
    common = {
        "model": model, "calibration": calibration, "num_windows": num_windows, "seed": seed,
        "seq_len": seq_len, "strategy": strategy, "threads_per_replica": threads,
    }  # fmt: skip
    judge = Judge(held_out=held_out, tasks=tasks, include_path=include_path, limit=limit)
    variants = [
        Variant("both", {"blocks": Granularity.MIX, "ratio": ratio}),
        Variant("MLP only", {"blocks": Granularity.MLP, "ratio": ratio}),
        Variant("MHA only", {"blocks": Granularity.MHA, "num_remove": most_mha}),
    ]
    judged = judge_searches(variants, common, judge, list(range(0, 60, 4)), out, replicas=replicas)
    texts, names = score_columns(judged)
    print_table(
        "What goes, and what is left",
        ["may go", "blocks", *headings(texts, names)],
        [[found.variant.name, row["num_remove"], *cells(row, texts, names)] for found in judged for row in found.rows],
    )
    figure, panels = plt.subplots(1, len(texts), figsize=(5 * len(texts), 3.8), layout="constrained", squeeze=False)
    for panel, text in zip(panels[0], texts, strict=True):
        for found in judged:
            panel.plot(
                [100 * row["ratio"] for row in found.rows], [row["perplexity"][text]["value"] for row in found.rows],
                marker="o", label=found.variant.name,
            )  # fmt: skip
        panel.set(xlabel="parameters removed (%)", ylabel="perplexity", title=f"held out: {Path(text).stem}")
        logarithmic(panel)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(out / "block_kinds.png", dpi=150)
    rows = [{"name": found.variant.name, **row} for found in judged for row in found.rows]
    print_json({"rows": rows}, out / "block_kinds.json")


if __name__ == "__main__":
    run_benchmark(main, resumable=True)
