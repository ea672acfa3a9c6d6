"""Draws perplexity (or divergence) on the calibration text along the search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from blockpruner.reporting.recorded import Recorded
from blockpruner.showing.style import COLORS, KINDS, MARKERS, RUN_COLORS, literal, logarithmic, spans_scales


def draw_perplexity(runs: Sequence[Recorded]) -> Figure:
    """Draw it against the share of removed parameters: one line per run, one panel per metric, light marks for
    runners-up."""
    metrics = list(dict.fromkeys(run.config.metric for run in runs))
    figure = Figure(figsize=(7.2, 4.2 * len(metrics)), layout="constrained")
    for metric, axes in zip(metrics, figure.subplots(len(metrics), squeeze=False)[:, 0], strict=True):
        shown = [run for run in runs if run.config.metric == metric]
        ends = [_draw(run, axes, RUN_COLORS[runs.index(run) % len(RUN_COLORS)], len(runs) == 1) for run in shown]
        if spans_scales([value for values in ends for value in values]):
            logarithmic(axes)
        axes.set(xlabel="parameters removed (%)", ylabel=f"calibration {shown[0].metric_name}")
        axes.grid(alpha=0.3)
        axes.legend(handles=_legend(shown, runs), fontsize=9)
    return figure


def _draw(run: Recorded, axes: Axes, color: str, alone: bool) -> list[float]:
    """Draw one run. Returns the drawn values except those of runners-up."""
    ratios = [0.0] + [100 * step["ratio"] for step in run.steps]
    values = [run.dense, *run.values]
    known = [index for index, value in enumerate(values) if math.isfinite(value)]
    axes.plot([ratios[i] for i in known], [values[i] for i in known], color="#888888" if alone else color, zorder=1)
    axes.scatter(ratios[:1], values[:1], color="black", marker="*", s=70, zorder=4)
    for step, block in enumerate(run.blocks, start=1):
        ink = COLORS[block.kind] if alone else color
        axes.scatter(ratios[step], values[step], color=ink, marker=MARKERS[block.kind], s=28, zorder=3)
        for other, value in run.runners_up(step) if alone else []:
            light: Any = {"facecolors": "none", "edgecolors": COLORS[other.kind], "alpha": 0.55}
            axes.scatter(ratios[step], value, marker=MARKERS[other.kind], s=28, zorder=2, **light)
    return [values[index] for index in known]


def _legend(shown: Sequence[Recorded], runs: Sequence[Recorded]) -> list[Line2D]:
    alone = len(runs) == 1
    marks = [Line2D([], [], linestyle="", marker="*", color="black", markersize=9, label="dense")]
    for kind in MARKERS:
        if any(block.kind is kind for run in shown for block in run.blocks):
            color = COLORS[kind] if alone else "#888888"
            label = f"{KINDS[kind]} removed"
            marks.append(Line2D([], [], linestyle="", marker=MARKERS[kind], color=color, label=label))
    if alone and any(run.runners_up(step["step"]) for run in shown for step in run.steps):
        hollow: Any = {"markerfacecolor": "none", "color": "#555555", "alpha": 0.55}
        marks.append(Line2D([], [], linestyle="", marker="o", label="second and third best of the step", **hollow))
    if alone:
        return marks
    colors = {run.path: RUN_COLORS[index % len(RUN_COLORS)] for index, run in enumerate(runs)}
    return [Line2D([], [], color=colors[run.path], label=literal(run.label)) for run in shown] + marks
