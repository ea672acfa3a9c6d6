"""Shows a comparison as a table, a CSV file and a figure."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from blockpruner.comparing.config import CompareConfig
from blockpruner.engine.work.memory import GIB
from blockpruner.files import replacing
from blockpruner.showing.style import RUN_COLORS, literal, logarithmic, save, spans_scales
from blockpruner.showing.tables import numbers_table

MARKERS = "osD^vP*X<>hdp8"
TFLOP = 1e12
MOST_SHOWN = 100
"""The figure cuts off perplexities above this multiple of the dense model's, which would flatten all other lines."""
COLUMNS = (
    "method", "target", "ratio", "perplexity", "average", "pruning_s", "num_threads", "startup_s", "load_s", "search_s",
    "work_flops", "peak_memory_bytes", "decode_tokens_per_s", "decode_ratio", "generate_128_s", "generate_ratio",
    "mask",
)  # fmt: skip


def print_table(rows: list[dict[str, Any]], config: CompareConfig, console: Console) -> None:
    tasks = list(rows[0].get("tasks") or ())
    texts = [Path(text).stem for text in config.perplexity]
    speed = ["decoding, tokens/s", "against dense"] if config.repeats else []
    titles = ["method", "removed", *(f"PPL {text}" for text in texts), *tasks, *(["average"] if tasks else [])]
    grid = numbers_table(*titles, "pruning, s", "work, TFLOP", "host memory, GiB", *speed)
    previous = None
    for row in rows:
        if row["method"] != previous:
            grid.add_section()
        previous = row["method"]
        work, memory = row.get("work_flops"), row.get("peak_memory_bytes")
        grid.add_row(
            row["method"],
            f"{row['ratio']:.1%}",
            *(_cell(row["perplexities"][text]["value"], ",.2f") for text in config.perplexity),
            *(_cell(row["tasks"][task]["score"], ".1%") for task in tasks),
            *([_cell(row["average"], ".1%")] if tasks else []),
            _cell(row.get("pruning_s"), ",.0f"),
            _cell(work and work / TFLOP, ",.1f"),
            _cell(memory and memory / GIB, ".2f"),
            *([_cell(row["decode_tokens_per_s"], ",.1f"), _cell(row.get("decode_ratio"), ".2f")] if speed else []),
        )
    console.print(grid)


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write one line per model, with one column per task score and per text perplexity."""
    tasks, texts = (list(rows[0].get(key) or ()) for key in ("tasks", "perplexities"))
    with replacing(path) as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, [*COLUMNS, *texts, *tasks], restval="", extrasaction="ignore")
        table.writeheader()
        for row in rows:
            of_texts = {text: row["perplexities"][text]["value"] for text in texts}
            table.writerow({**row, **of_texts, **{task: row["tasks"][task]["score"] for task in tasks}})


def draw(rows: list[dict[str, Any]], config: CompareConfig, path: Path) -> None:
    """Draw perplexity against the share removed, with one line per method, and the cost of each method."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    column = "perplexity" if config.perplexity else "average"
    _draw_quality(left, rows, column, config)
    _draw_costs(right, rows, list(config.methods))
    save(figure, path)


def _draw_quality(axes: Axes, rows: list[dict[str, Any]], column: str, config: CompareConfig) -> None:
    shown = [row for row in rows if _is_number(row.get(column))]
    limit = math.inf
    if column == "perplexity" and _is_number(rows[0].get(column)):  # the dense model's
        limit = MOST_SHOWN * rows[0][column]
    for index, name in enumerate(config.methods):
        mine = sorted((row for row in shown if row["method"] == name), key=lambda row: row["ratio"])
        points = [row for row in shown if row["method"] == "dense"] + mine
        axes.plot(
            [100 * row["ratio"] for row in points],
            [row[column] for row in points],
            marker=MARKERS[index % len(MARKERS)],
            color=RUN_COLORS[index % len(RUN_COLORS)],
            markersize=5,
            label=literal(name) + _remark(mine, column, limit),
        )
    values = [min(row[column], limit) for row in shown]
    if column == "perplexity" and shown and spans_scales(values):
        logarithmic(axes)
        axes.set_ylim(0.8 * min(values), 1.3 * max(values))
    text = Path(config.perplexity[0]).stem if config.perplexity else ""
    axes.set(xlabel="parameters removed (%)", ylabel=f"perplexity on {text}" if text else "average task score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _remark(mine: list[dict[str, Any]], column: str, limit: float) -> str:
    if not mine:
        return " (no finite value)"
    return " (beyond the scale)" if mine[-1][column] > limit else ""


def _draw_costs(axes: Axes, rows: list[dict[str, Any]], methods: list[str]) -> None:
    """Draw the times at the largest ratio, or the work if an interrupted session left a time unknown."""
    last = [max((row for row in rows if row["method"] == name), key=lambda row: row["target"]) for name in methods]
    if any(row["pruning_s"] is None for row in last):
        axes.barh(methods, [row["work_flops"] / TFLOP for row in last], color="#2a6f97")
        title = "work (TFLOP)"
    else:
        start = [0.0] * len(last)
        for part, color in (("startup_s", "#bbbbbb"), ("load_s", "#8d99ae"), ("search_s", "#2a6f97")):
            label = part.removesuffix("_s").replace("startup", "start-up")
            axes.barh(methods, [row[part] for row in last], left=start, color=color, label=label)
            start = [before + row[part] for before, row in zip(start, last, strict=True)]
        axes.legend(fontsize=8)
        title = "pruning time (s)"
    axes.invert_yaxis()
    axes.set(xlabel=f"{title}, {last[0]['target']:.0%} removed", xlim=(0, None))


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _cell(value: float | None, form: str) -> str:
    return format(value, form) if value is not None and math.isfinite(value) else "–"
