"""Draws how much each block matters to the dense model (paper Fig. 1)."""

from __future__ import annotations

import math
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blockpruner.engine.blocks import Block, Kind
from blockpruner.reporting.recorded import Recorded
from blockpruner.showing.style import COLORS, KINDS, MARKERS, logarithmic, spans_scales

OFF_SCALE = 8.0
"""The axis ends at this multiple of the median increase. Larger values are off the scale."""
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}


def draw_first_step(run: Recorded) -> Figure:
    """Draw the loss with each block removed alone, and below it the block influence of blocks and layers if
    measured."""
    influence = {block: value for block, value in run.influence.items() if value is not None}
    num_panels = 3 if influence else 1
    size = max(7.2, 0.3 * run.num_layers + 1.2), 1.0 + 2.5 * num_panels
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(num_panels, sharex=True, squeeze=False)[:, 0]
    _draw_losses(run, panels[0])
    if influence:
        of_layers = {block: value for block, value in influence.items() if block.kind is Kind.LAYER}
        of_blocks = {block: value for block, value in influence.items() if block not in of_layers}
        _draw_influence(of_blocks, panels[1], "block influence\nof each block")
        _draw_influence(of_layers, panels[2], "block influence\nof each layer")
    panels[-1].set_xlabel("layer")
    panels[-1].set_xticks(range(0, run.num_layers, 1 if run.num_layers <= 40 else 5))
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=9, frameon=False)
    return figure


def _draw_losses(run: Recorded, axes: Axes) -> None:
    """Draw the losses. Filled marks are scored on all windows, hollow marks are estimates.

    A few blocks cost far more than all others, so the axis ends below them and their values are written at its top.
    Values that are not finite are not drawn.
    """
    points = {block: point for block, point in run.first_step().items() if math.isfinite(point.value)}
    values = {block: point.value for block, point in points.items()}
    _draw_series(values, axes)
    for block, point in points.items():
        if not point.exact:
            style: Any = {"edgecolors": COLORS[block.kind], "marker": MARKERS[block.kind]}
            axes.scatter(block.layer, point.value, s=25, color="white", zorder=3, **style)
    if not all(point.exact for point in points.values()):
        axes.scatter([], [], color="white", edgecolors="#555555", label="estimated")
    if math.isfinite(run.dense):
        axes.axhline(run.dense, color="black", linestyle="--", linewidth=1, label="dense")
    top = run.dense + OFF_SCALE * (statistics.median(values.values()) - run.dense)
    if run.dense < top < max(values.values()):
        margin = 0.05 * (top - run.dense)
        axes.set_ylim(min(run.dense, *values.values()) - margin, top)
        for block, value in values.items():
            if value > top:
                side = {Kind.MHA: -0.25, Kind.MLP: 0.25, Kind.LAYER: 0.0}[block.kind]
                text: Any = {"rotation": 90, "fontsize": 8, "ha": "center", "va": "top", "color": COLORS[block.kind]}
                axes.text(
                    block.layer + side,
                    top - margin,
                    f"{value:,.{0 if value > 100 else 2}f} \u2192",
                    bbox=BEHIND_TEXT,
                    zorder=4,
                    **text,
                )
    what = "block" if all(block.part is None for block in points) else "block or\nits last group"
    axes.set_ylabel(f"{run.metric_name}\nwithout the {what}")


def _draw_influence(influence: dict[Block, float], axes: Axes, label: str) -> None:
    _draw_series(influence, axes)
    if spans_scales(list(influence.values())):
        logarithmic(axes)
    axes.set_ylabel(label)


def _draw_series(values: dict[Block, float], axes: Axes) -> None:
    """Draw one thin line per kind, from layer to layer."""
    for kind, name in KINDS.items():
        mine = sorted((block.layer, value) for block, value in values.items() if block.kind is kind)
        if mine:
            style: Any = {"color": COLORS[kind], "marker": MARKERS[kind], "markersize": 5, "linewidth": 0.8}
            axes.plot(*zip(*mine, strict=True), label=name, **style)
