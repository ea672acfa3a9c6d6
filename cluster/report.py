"""A run to pictures and one self-contained page."""

from __future__ import annotations

import base64
import html
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from cluster.files import replacing
from cluster.run import read_events, read_summary
from cluster.timeline import draw_timeline
from engine.blocks import Block, Kind
from engine.errors import UserError

COLORS = {Kind.MHA: "#2a6f97", Kind.MLP: "#e07a5f"}


def write_report(run: Path, out: Path | None = None) -> list[Path]:
    """Write removal_order.png, perplexity.png, timeline.png and report.html into `out` (the run directory, if None)."""
    summary = read_summary(run)
    if not summary["steps"]:
        raise UserError(f"expected a run with at least one step, got {str(run)!r}, which has none yet.")
    folder = out or run
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {str(folder)!r}: {error.strerror}.") from error
    pictures = {
        "removal_order.png": draw_removal_order(summary),
        "perplexity.png": draw_perplexity(summary),
    }
    events = read_events(run)
    if any(event["type"] == "unit" for event in events):  # events.jsonl may have been left behind
        pictures["timeline.png"] = draw_timeline(events)
    paths = []
    for name, figure in pictures.items():
        paths.append(folder / name)
        with replacing(paths[-1]) as aside:
            figure.savefig(aside, format="png", dpi=150)
        plt.close(figure)
    paths.append(folder / "report.html")
    with replacing(paths[-1]) as aside:
        aside.write_text(_page(summary, paths[:-1]), encoding="utf-8")
    return paths


def draw_removal_order(summary: dict[str, Any]) -> Figure:
    """One column a layer, one row a kind; a removed block is filled and carries its step."""
    num_layers = summary["num_layers"]
    figure, axes = plt.subplots(figsize=(max(6.0, 0.36 * num_layers + 1.2), 1.9), layout="constrained")
    step_of = {part: step["step"] for step in summary["steps"] for part in Block.from_json(step["block"]).parts}
    rows = {Kind.MHA: 1, Kind.MLP: 0}
    last = max(step_of.values())
    for kind, row in rows.items():
        for layer in range(num_layers):
            step = step_of.get(Block(kind, layer))
            # The earlier a block went, the stronger its colour.
            strength = 0.35 + 0.65 * (1 - (step - 1) / last) if step else 1.0
            face = (*matplotlib.colors.to_rgb(COLORS[kind]), strength) if step else "#f1f1f1"
            axes.add_patch(plt.Rectangle((layer - 0.45, row - 0.42), 0.9, 0.84, facecolor=face, edgecolor="#bbbbbb"))
            if step:
                axes.text(layer, row, str(step), ha="center", va="center", fontsize=8, fontweight="bold")
    axes.set(xlim=(-0.6, num_layers - 0.4), ylim=(-0.6, 1.6), xlabel="layer")
    axes.set_yticks(list(rows.values()), [kind.upper() for kind in rows])
    axes.set_xticks(range(0, num_layers, 1 if num_layers <= 40 else 5))
    axes.set_title(f"Blocks removed from {Path(summary['model']).name}, by step", fontsize=10)
    axes.tick_params(length=0, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def draw_perplexity(summary: dict[str, Any]) -> Figure:
    """Calibration perplexity (or divergence) against the share of parameters removed, where it is known."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    metric = _metric(summary)
    ratios = [0.0] + [100 * step["ratio"] for step in summary["steps"]]
    values = [_number(summary["dense"].get(metric, 0.0))] + [_number(step[metric]) for step in summary["steps"]]
    known = [(ratio, value) for ratio, value in zip(ratios, values, strict=True) if math.isfinite(value)]
    axes.plot(*zip(*known, strict=True), color="#888888", linewidth=1, zorder=1)
    axes.scatter(ratios[:1], values[:1], color="black", label="dense", zorder=2)
    for kind in Kind:
        points = [index for index, step in enumerate(summary["steps"], start=1) if step["block"][0] == kind]
        if points:
            color = COLORS.get(kind, "#6a4c93")
            name = f"{kind.upper() if kind is not Kind.LAYER else 'layer'} removed"
            axes.scatter([ratios[i] for i in points], [values[i] for i in points], color=color, label=name, zorder=2)
    axes.set(
        xlabel="parameters removed (%)",
        ylabel=f"calibration {LABELS[metric]}",
        title=f"{LABELS[metric].capitalize()} along the search",
    )
    finite = [value for _, value in known]
    if metric == "perplexity" and max(finite) > 5 * min(finite):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


LABELS = {"perplexity": "perplexity", "kl": "KL divergence", "js": "JS divergence"}


def _metric(summary: dict[str, Any]) -> str:
    """What its steps are scored by."""
    metric: str = summary["config"].get("metric", "ppl")
    return "perplexity" if metric == "ppl" else metric


def _number(value: float | None) -> float:
    """What is not finite was recorded as null."""
    return math.nan if value is None else value


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _scored(step: dict[str, Any]) -> str:
    return f"{step['num_scored']} of {step['num_candidates']}" if step["num_candidates"] else ""


def _audit(summary: dict[str, Any]) -> str:
    audit = summary.get("audit")
    if audit is None:
        return ""
    return (
        f" An exhaustive search agreed in {audit['num_agreed']} of {audit['num_audited']} audited steps (at most "
        f"{100 * audit['most_misses']:.0f} % of such steps miss, at 95 % confidence)."
    )


def _saving(step: dict[str, Any]) -> str:
    return f"{step['naive_work_flops'] / step['work_flops']:.2f}×" if step["work_flops"] else ""


def _page(summary: dict[str, Any], pictures: list[Path]) -> str:
    metric = _metric(summary)
    images = "\n".join(
        f'<img alt="{picture.stem}" src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">'
        for picture in pictures
    )
    rows = "\n".join(
        f"<tr><td>{step['step']}</td><td>{step['block'][0]}.{step['block'][1]}</td><td>{_text(step[metric])}</td>"
        f"<td>{100 * step['ratio']:.2f} %</td><td>{_scored(step)}</td><td>{_saving(step)}</td>"
        f"<td>{step['wall_s']:.1f} s</td></tr>"
        for step in summary["steps"]
    )
    config = "\n".join(f"{key}: {value}" for key, value in summary["config"].items())
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    calibration = summary["calibration"]
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>BlockPruner: {html.escape(summary["model"])}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
img {{ max-width: 100%; display: block; margin: 1rem 0; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }}
pre {{ background: #f6f6f6; padding: 1rem; overflow: auto; }}
</style>
<h1>{html.escape(summary["model"])}: {len(summary["steps"])} blocks removed</h1>
<p>Status: {summary["status"]}. {LABELS[metric].capitalize()} {_text(summary["dense"].get(metric, 0.0))} dense,
{_text(summary["steps"][-1][metric])} with {100 * summary["steps"][-1]["ratio"]:.2f} % of the parameters removed, on
{calibration["num_windows"]} calibration windows ({calibration["num_tokens"]:,} tokens). The search took
{summary["totals"]["wall_s"]:.0f} s on {summary["num_replicas"] or 1} replicas; the plain loop would have done
{_saving(summary["totals"])} its work.{_audit(summary)}</p>
{images}
<table><tr><th>step</th><th>block</th><th>{LABELS[metric]}</th><th>removed</th><th>scored</th>
<th>plain loop's work</th><th>time</th></tr>
{rows}</table>
<h2>Config</h2><pre>{html.escape(config)}
calibration fingerprint: {calibration["fingerprint"]}
versions: {html.escape(versions)}</pre>
</html>
"""
