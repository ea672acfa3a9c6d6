"""Draws events.jsonl as a timeline of the replicas."""

from __future__ import annotations

from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

PAUSE_S = 30.0
"""Idle times longer than this many seconds (between an interruption and a resume) are cut out."""


def draw_timeline(events: list[dict[str, Any]]) -> Figure:
    """Draw one row per replica and one bar per unit, coloured by step. Lost replicas are marked."""
    units = sorted((event for event in events if event["type"] == "unit"), key=lambda unit: unit["start_s"])
    names = sorted({unit["replica"] for unit in units}, key=lambda name: (len(name), name))
    cuts = _pauses(units)
    figure = Figure(figsize=(9, 1.3 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    colors = [colormaps["tab20"](index) for index in range(20)]
    for unit in units:
        left = _without_pauses(unit["start_s"], cuts)
        width = unit["stop_s"] - unit["start_s"]
        color = colors[unit["step"] % len(colors)]
        axes.barh(
            names.index(unit["replica"]), width, left=left, height=0.7, color=color, edgecolor="white", linewidth=0.3
        )
    end_s = max(_without_pauses(unit["stop_s"], cuts) for unit in units)
    for event in events:
        if event["type"] == "note" and ("is lost" in event["text"] or "it is replaced" in event["text"]):
            axes.axvline(_without_pauses(event["at_s"], cuts), color="black", linestyle=":", linewidth=1)
    for start_s, _ in cuts:
        axes.axvline(_without_pauses(start_s, cuts), color="#888888", linewidth=1)
    axes.set(xlim=(0, end_s), xlabel="seconds; dotted: a replica was lost, grey: interrupted and resumed")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(
        f"Utilisation: {100 * utilisation(events):.0f} % ({len(units)} units, one colour per step)", fontsize=10
    )
    axes.tick_params(labelsize=8)
    return figure


def utilisation(events: list[dict[str, Any]]) -> float:
    """Return busy seconds / seconds between the first and last unit, summed over all replicas, without pauses."""
    units = sorted((event for event in events if event["type"] == "unit"), key=lambda unit: unit["start_s"])
    cuts = _pauses(units)
    present_s = busy_s = 0.0
    for name in {unit["replica"] for unit in units}:
        mine = [unit for unit in units if unit["replica"] == name]
        last = _without_pauses(max(unit["stop_s"] for unit in mine), cuts)
        present_s += last - _without_pauses(mine[0]["start_s"], cuts)
        busy_s += sum(unit["stop_s"] - unit["start_s"] for unit in mine)
    return min(1.0, busy_s / present_s) if present_s else 0.0


def _pauses(units: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return the times to cut out as (from, to): before the first unit, then times without any unit."""
    pauses = [(0.0, units[0]["start_s"])]
    busy_until = units[0]["stop_s"]
    for unit in units:
        if unit["start_s"] - busy_until > PAUSE_S:
            pauses.append((busy_until, unit["start_s"]))
        busy_until = max(busy_until, unit["stop_s"])
    return pauses


def _without_pauses(time_s: float, pauses: list[tuple[float, float]]) -> float:
    return time_s - sum(min(time_s, end) - start for start, end in pauses if start < time_s)
