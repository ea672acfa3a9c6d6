"""Draws the order in which the blocks were removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from blockpruner.engine.blocks import NUM_GROUPS, Block, Kind
from blockpruner.reporting.recorded import Recorded
from blockpruner.showing.style import COLORS, KINDS, literal

HATCHES = {"linear attention": "//", "mamba": "xx", "convolution": "..", "attention and mamba": "++"}
ROWS = {Kind.MHA: 1, Kind.MLP: 0}


def draw_removal_order(runs: Sequence[Recorded]) -> Figure:
    """Draw one grid per run, with one column per layer and one row per kind. Removed blocks show their step, and mixers
    that are not attention are hatched."""
    num_layers = runs[0].num_layers
    size = max(6.0, 0.36 * num_layers + 1.2), 0.5 + 1.4 * len(runs)
    figure = Figure(figsize=size, layout="constrained")
    for run, axes in zip(runs, figure.subplots(len(runs), squeeze=False)[:, 0], strict=True):
        _draw(run, axes)
        if len(runs) > 1:
            axes.set_title(literal(run.label), fontsize=10, loc="left")
    hatched = {mixer: hatch for mixer, hatch in HATCHES.items() if any(mixer in run.mixers for run in runs)}
    axes.set_xlabel(", ".join(["layer", *(f"{hatch} {mixer}" for mixer, hatch in hatched.items())]))
    return figure


def _draw(run: Recorded, axes: Axes) -> None:
    step_of = {part: step for step, block in enumerate(run.blocks, start=1) for part in block.parts}
    last = len(run.steps)
    for kind, row in ROWS.items():
        for layer in range(run.num_layers):
            groups = [block.part for block in step_of if block.part and (block.kind, block.layer) == (kind, layer)]
            if groups:
                _draw_groups(step_of, Block(kind, layer), max(groups), last, axes)
                continue
            step = step_of.get(Block(kind, layer))
            strength, face = _face(kind, step, last)
            mixer = run.mixers[layer] if run.mixers and kind is Kind.MHA else None
            if Block(kind, layer) in run.missing or mixer == "":
                continue
            hatch = HATCHES.get(mixer) if mixer else None
            cell = (layer - 0.45, row - 0.42)
            axes.add_patch(Rectangle(cell, 0.9, 0.84, facecolor=face, edgecolor="#bbbbbb", hatch=hatch))
            if step:
                ink = "white" if kind is Kind.MHA and strength > 0.7 else "black"
                axes.text(layer, row, str(step), ha="center", va="center", fontsize=9, fontweight="bold", color=ink)
    axes.set(xlim=(-0.6, run.num_layers - 0.4), ylim=(-0.6, 1.6))
    axes.set_yticks(list(ROWS.values()), ["mixer" if run.mixers and kind is Kind.MHA else KINDS[kind] for kind in ROWS])
    axes.set_xticks(range(0, run.num_layers, 1 if run.num_layers <= 40 else 5))
    axes.tick_params(length=0, labelsize=9)
    for side in axes.spines.values():
        side.set_visible(False)


def _face(kind: Kind, step: int | None, last: int) -> tuple[float, Any]:
    """Return how strong a colour is, and the colour: blocks that were removed earlier have a stronger one."""
    if step is None:
        return 1.0, "#f1f1f1"
    strength = 0.35 + 0.65 * (1 - (step - 1) / last)
    return strength, (*to_rgb(COLORS[kind]), strength)


def _draw_groups(step_of: Mapping[Block, int], block: Block, num_groups: int, last: int, axes: Axes) -> None:
    """Draw a block that went in groups: one strip a group, the first one below."""
    height = 0.84 / num_groups
    for number in range(1, num_groups + 1):
        step = step_of.get(Block(block.kind, block.layer, number if number > 1 else None))
        bottom = ROWS[block.kind] - 0.42 + (number - 1) * height
        _, face = _face(block.kind, step, last)
        axes.add_patch(Rectangle((block.layer - 0.45, bottom), 0.9, height, facecolor=face, edgecolor="#bbbbbb"))
        if step and num_groups <= NUM_GROUPS:
            middle = bottom + height / 2
            axes.text(block.layer, middle, str(step), ha="center", va="center", fontsize=6, color="black")
