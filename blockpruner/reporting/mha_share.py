"""Draws how the removals are divided between the two kinds of blocks (paper Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blockpruner.engine.blocks import Granularity, Kind
from blockpruner.reporting.recorded import Recorded
from blockpruner.showing.style import RUN_COLORS, literal


def has_mha_share(run: Recorded) -> bool:
    """Return whether the search could choose between the kinds, one block at a time."""
    return run.config.blocks is Granularity.MIX and run.is_path


def draw_mha_share(runs: Sequence[Recorded]) -> Figure:
    """Draw the share of MHA among the removed blocks after each step, with one line per run that could choose."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for index, run in enumerate(runs):
        if not has_mha_share(run):
            continue
        shares, num_mha = [], 0
        for step, block in enumerate(run.blocks, start=1):
            num_mha += block.kind is Kind.MHA
            shares.append(100 * num_mha / step)
        color = RUN_COLORS[index % len(RUN_COLORS)]
        axes.plot(range(1, len(shares) + 1), shares, color=color, marker="o", markersize=4, label=literal(run.label))
    axes.axhline(50, color="#888888", linestyle=":", linewidth=1)
    number = "removals" if any(run.has_groups for run in runs) else "blocks removed"
    axes.set(ylim=(-4, 104), xlabel=number, ylabel="MHA among them (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(runs) > 1:
        axes.legend(fontsize=9)
    return figure
