"""How much do results vary with the draw of the calibration text, compared with the difference between methods?

Searches over blocks and over whole layers on several draws, at one share of removed parameters. For every draw the two
masks are compared window by window and question by question.

    python -m benchmarks.calibration_draws --calibration alpaca.jsonl --held-out wiki.test.raw --tasks arc_easy \\
        --out draws
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib import pyplot as plt

from benchmarks.common import print_json, print_table, run_benchmark, stdev
from benchmarks.studies import (
    HeldOut,
    IncludePath,
    Judge,
    Judged,
    Limit,
    Out,
    Tasks,
    Variant,
    cells,
    headings,
    judge_searches,
    paired,
    score_columns,
    with_samples,
)
from blockpruner.engine.blocks import Granularity
from blockpruner.engine.errors import UserError


def main(
    calibration: Annotated[str, typer.Option(help="As for search.")],
    held_out: HeldOut,
    out: Out,
    tasks: Tasks = "",
    include_path: IncludePath = None,
    limit: Limit = None,
    seeds: str = "1,2,3",
    ratio: float = 0.2,
    num_windows: int = 24,
    model: str = "smollm2",
    seq_len: int = 128,
    strategy: str = "lazy",
    replicas: int = 2,
    threads: int = 1,
) -> None:
    if len(seeds.split(",")) < 2:
        raise UserError(f"expected at least two --seeds, to compute their spread, got {seeds!r}; give for example 1,2.")
    common = {
        "model": model, "calibration": calibration, "num_windows": num_windows, "ratio": ratio,
        "seq_len": seq_len, "strategy": strategy, "threads_per_replica": threads,
    }  # fmt: skip
    judge = Judge(held_out=held_out, tasks=tasks, include_path=include_path, limit=limit)
    variants = [
        Variant(f"{kind} {seed}", {"blocks": kind, "seed": int(seed)})
        for kind in (Granularity.MIX, Granularity.LAYER)
        for seed in seeds.split(",")
    ]
    judged = judge_searches(variants, common, judge, [], out, replicas=replicas)
    texts, names = score_columns(judged)
    columns = [*texts, *names]
    by_kind = [judged[: len(judged) // 2], judged[len(judged) // 2 :]]
    print_table(
        f"{ratio:.0%} of the parameters removed",
        ["removed and seed", "blocks", *headings(texts, names)],
        [[found.variant.name, len(found.search["steps"]), *cells(found.rows[-1], texts, names)] for found in judged],
    )
    spreads: list[dict[str, Any]] = [
        {"kind": kind, "on": name, "mean": statistics.mean(values), "stdev": stdev(values)}
        for kind, found in zip(("mix", "layer"), by_kind, strict=True)
        for name in columns
        for values in [[_value(one, name) for one in found]]
    ]
    print_table(
        "Over the draws",
        ["removed", "on", "mean", "standard deviation"],
        [[row["kind"], Path(row["on"]).stem, row["mean"], row["stdev"]] for row in spreads],
    )
    pairs = [
        paired(mix, layer, name) for name in with_samples(judged, columns) for mix, layer in zip(*by_kind, strict=True)
    ]
    print_table(
        "Whole layers - blocks, on the same draw (NLL in nats, accuracy as a share) and p",
        ["on", "draw", "difference", "p"],
        [[Path(pair["on"]).stem, pair["one"], f"{pair['difference']:+.4f}", pair["p_value"]] for pair in pairs],
    )
    figure, panels = plt.subplots(
        1, len(columns), figsize=(3.2 * len(columns), 3.4), layout="constrained", squeeze=False
    )
    for panel, name in zip(panels[0], columns, strict=True):
        for index, found in enumerate(by_kind):
            values = [_value(one, name) for one in found]
            panel.scatter([index] * len(values), values, color=f"C{index}", alpha=0.6)
            panel.errorbar(
                index + 0.15,
                statistics.mean(values),
                yerr=stdev(values),
                marker="D",
                capsize=4,
                color=f"C{index}",
            )
        panel.set(xlim=(-0.5, 1.5), title=Path(name).stem, ylabel="perplexity" if name in texts else "score (%)")
        panel.set_xticks([0, 1], ["blocks", "layers"])
        panel.grid(alpha=0.3)
    figure.savefig(out / "calibration_draws.png", dpi=150)
    rows = [{"name": found.variant.name, **found.rows[-1]} for found in judged]
    print_json({"rows": rows, "spreads": spreads, "pairs": pairs}, out / "calibration_draws.json")


def _value(found: Judged, name: str) -> float:
    row = found.rows[-1]
    return row["perplexity"][name]["value"] if name in row["perplexity"] else 100 * row["tasks"][name]["score"]


if __name__ == "__main__":
    run_benchmark(main, resumable=True)
