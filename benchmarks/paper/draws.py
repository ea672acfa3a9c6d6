"""Table 1's comparison at one ratio with several calibration draws: the paper gives no spread.

Differences between methods are paired: over the windows of the test text (NLL) and over the questions of the tasks
(right or wrong), all draws together. The interval is a bootstrap over windows or questions; draws are told one by one.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow.parquet
from scipy import stats

from benchmarks.common import console, print_json, print_table
from benchmarks.paper.setting import Row, Setting, of
from blockpruner.engine.judge.tasks import score_metric

YARDSTICK = "blockpruner"
Key = tuple[bool, str, int]
"""Whether it is a window, the text or task, and which window or question."""


def show(
    setting: Setting, ratio: float, methods: tuple[str, ...], seeds: tuple[int, ...], tasks: tuple[str, ...]
) -> None:
    settings = [setting.with_seed(seed) for seed in seeds]
    draws = [one.compare((YARDSTICK, *methods), (ratio,), tasks=tasks) for one in settings]
    samples = [_samples(one, rows) for one, rows in zip(settings, draws, strict=True)]
    table, found = [], []
    for name in (YARDSTICK, *methods):
        mine = [of(rows, name, ratio) for rows in draws]
        losses = [row["perplexity"] for row in mine]
        averages = [row["average"] for row in mine if row["average"] is not None]
        cells: list[Any] = [name, f"{100 * statistics.mean(row['ratio'] for row in mine):.1f}"]
        cells += [" / ".join(f"{value:.1f}" for value in losses), _spread(losses), _spread([100 * a for a in averages])]
        if name != YARDSTICK:
            for kind in ("windows", "questions"):
                if not any(key[0] is (kind == "windows") for key in samples[0][name]):
                    continue  # no tasks, or none that counts right answers
                interval = _paired(samples, name, kind)
                found.append((name, kind, interval))
                cells.append(f"{interval['difference']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f})")
        table.append(cells + [""] * (7 - len(cells)))
    columns = [
        "", "removed (%)", "PPL of each draw", "mean ± sd", "average of tasks, mean ± sd",
        f"NLL over {YARDSTICK}'s (95 %)", f"accuracy over {YARDSTICK}'s (95 %)",
    ]  # fmt: skip
    print_table(f"{len(seeds)} calibration draws (seeds {', '.join(map(str, seeds))})", columns, table)
    for name, kind, interval in found:
        better = (interval["difference"] < 0) is (kind == "windows")
        sure = interval["low"] > 0 or interval["high"] < 0
        verdict = f"{'better' if better else 'worse'} than {YARDSTICK}" if sure else f"not told apart from {YARDSTICK}"
        console.print(f"{name} on {kind}: {verdict}", highlight=False)
    paired = [{"method": name, "on": kind, **interval} for name, kind, interval in found]
    print_json({"ratio": ratio, "seeds": seeds, "draws": draws, "paired": paired})


def _samples(setting: Setting, rows: list[Row]) -> dict[str, dict[Key, float]]:
    """By method: the NLL of a window, or the score of a question."""
    by_method = {}
    for row in rows:
        name = row["method"]
        folder = "masks" if row.get("mask") or name == "dense" else f"{name}-{row['target']:g}"
        read = pyarrow.parquet.read_table(setting.out / "evaluations" / folder / "samples.parquet").to_pylist()
        mask = (row.get("mask") or "dense") if folder == "masks" else "dense"
        by_method[name] = _values([sample for sample in read if sample["mask"] == mask])
    return by_method


def _values(samples: list[dict[str, Any]]) -> dict[Key, float]:
    metrics: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        metrics[sample["task"]].add(sample["metric"])
    chosen = {task: "nll" if "nll" in there else score_metric(there) for task, there in metrics.items()}
    return {
        (sample["metric"] == "nll", sample["task"], sample["question"]): sample["value"]
        for sample in samples
        if sample["metric"] == chosen[sample["task"]]
    }


def _paired(samples: list[dict[str, dict[Key, float]]], name: str, kind: str) -> dict[str, float]:
    """Mean difference to the yardstick, with its interval over the windows or questions: each one's mean over draws."""
    keys = [key for key in samples[0][name] if key[0] is (kind == "windows")]
    differences = np.array(
        [statistics.mean(draw[name][key] - draw[YARDSTICK][key] for draw in samples) for key in keys]
    )
    interval = stats.bootstrap(
        (differences,), np.mean, confidence_level=0.95, rng=np.random.default_rng(0), method="percentile"
    ).confidence_interval
    return {"difference": float(differences.mean()), "low": float(interval.low), "high": float(interval.high)}


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return "–"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"
