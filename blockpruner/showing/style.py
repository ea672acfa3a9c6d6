"""Shared style of the figures."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from blockpruner.engine.blocks import Kind
from blockpruner.files import replacing

KINDS = {Kind.MHA: "MHA", Kind.MLP: "MLP", Kind.LAYER: "layer"}
COLORS = {Kind.MHA: "#2a6f97", Kind.MLP: "#e07a5f", Kind.LAYER: "#6a4c93"}
MARKERS = {Kind.MHA: "o", Kind.MLP: "s", Kind.LAYER: "D"}
RUN_COLORS = ("#2a6f97", "#c8553d", "#588157", "#6a4c93", "#b08900", "#222222", "#17808a", "#d1495b")


def literal(text: str) -> str:
    """Escape text so that matplotlib does not parse it as a formula."""
    return text.replace("$", r"\$")


def logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def spans_scales(values: list[float]) -> bool:
    """Return whether all values are positive and far enough apart for a logarithmic axis."""
    return min(values) > 0 and max(values) > 10 * min(values)


def save(figure: Figure, path: Path) -> None:
    """Save as PNG or SVG, depending on the suffix of the path. The same figure gives the same bytes."""
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with replacing(path) as aside, rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(aside, format=path.suffix[1:], dpi=150, metadata=metadata)
