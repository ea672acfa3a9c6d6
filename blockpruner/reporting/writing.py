"""Writes the figures of runs (PNG and SVG) and report.html."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from blockpruner.engine.blocks import Granularity, Kind, amount
from blockpruner.engine.errors import UserError
from blockpruner.files import replacing
from blockpruner.reporting.config import ReportConfig
from blockpruner.reporting.first_step import draw_first_step
from blockpruner.reporting.influence import write_influence
from blockpruner.reporting.mha_share import draw_mha_share, has_mha_share
from blockpruner.reporting.page import Image, Section, render_page
from blockpruner.reporting.perplexity import draw_perplexity
from blockpruner.reporting.recorded import Recorded, read_recorded
from blockpruner.reporting.removal_order import draw_removal_order
from blockpruner.reporting.repeat import (
    evaluate_command,
    latency_command,
    prune_command,
    report_command,
    search_command,
)
from blockpruner.reporting.tables import tabulate_agreement, tabulate_overview, tabulate_steps, tabulate_versions
from blockpruner.reporting.timeline import draw_timeline
from blockpruner.showing.console import Reporter
from blockpruner.showing.measurements import tabulate_evaluations, tabulate_latency
from blockpruner.showing.style import save


@dataclass(frozen=True)
class Picture:
    name: str
    """File name without suffix."""
    figure: Figure
    alt: str
    caption: str = ""


def write_report(config: ReportConfig, reporter: Reporter) -> dict[str, Any]:
    """Draw one run, or several runs of one model together, into `out` (default: the run directory).

    Returns what `report --json` prints.
    """
    runs, out, evaluations, latencies = config.runs, config.out, config.evaluation, config.latency
    folder = out or runs[0]
    recorded = read_recorded(runs)  # reports errors in runs and files before any slow work
    measured = [
        *([Section("Tasks and perplexities", tables=[tabulate_evaluations(evaluations)])] if evaluations else []),
        *([Section("Speed and memory", tables=[tabulate_latency(path) for path in latencies])] if latencies else []),
    ]
    if config.influence:
        for run in runs:
            write_influence(run, reporter, trust_remote_code=config.trust_remote_code)
        recorded = read_recorded(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {str(folder)!r}: {error.strerror}.") from error
    chapters = _draw(recorded)
    paths = []
    for picture in (picture for pictures in chapters.values() for picture in pictures):
        for suffix in (".png", ".svg"):
            paths.append(folder / (picture.name + suffix))
            save(picture.figure, paths[-1])
    commands = [
        *(search_command(run) for run in recorded),
        *(prune_command(run) for run in recorded),
        *map(evaluate_command, evaluations),
        *map(latency_command, latencies),
        report_command(
            recorded,
            influence=any(run.influence for run in recorded),
            out=out and str(out),
            evaluation=[str(path) for path in evaluations],
            latency=[str(path) for path in latencies],
        ),
    ]
    sections = [
        Section("Overview", _note(recorded), tables=[tabulate_overview(recorded)]),
        *(Section(title, images=[_image(picture, folder) for picture in found]) for title, found in chapters.items()),
        *([Section("Agreement", tables=[tabulate_agreement(recorded)])] if len(recorded) > 1 else []),
        *measured,
        *(Section(_of("Steps", run, recorded), tables=[tabulate_steps(run)]) for run in recorded),
        Section("Commands to reproduce this", code="\n".join(commands), tables=[tabulate_versions(recorded)]),
    ]
    page = folder / "report.html"
    with replacing(page) as aside:
        aside.write_text(render_page(_title(recorded), sections), encoding="utf-8")
    for path in (*paths, page):
        reporter.say(str(path))
    return {"pictures": [str(path) for path in paths], "page": str(page)}


def _draw(runs: Sequence[Recorded]) -> dict[str, list[Picture]]:
    """Return the figures by chapter. Figures without data are left out."""
    orders = "; ".join(f"{run.label}: {', '.join(map(str, run.blocks))}" for run in runs)
    removal_order = Picture(
        "removal_order",
        draw_removal_order(runs),
        f"Blocks in the order of their removal. {orders}",
        "One column per layer. Coloured blocks are removed. The number is the step of the removal; earlier removals "
        "have a stronger colour.",
    )
    metrics = " and ".join(dict.fromkeys(run.metric_name for run in runs))
    ends = "; ".join(f"{run.label}: from {run.dense:.4g} to {run.values[-1]:.4g}" for run in runs)
    perplexity = Picture(
        "perplexity",
        draw_perplexity(runs),
        f"{_capital(metrics)} along the search. {ends}",
        "Hollow marks: the next best candidates of the same step among those scored on all windows."
        if len(runs) == 1 and any(runs[0].runners_up(step["step"]) for step in runs[0].steps)
        else "",
    )
    chapters = {
        "Order of removal": [removal_order],
        f"{_capital(metrics)} along the search": [perplexity],
    }
    if sharing := [run for run in runs if has_mha_share(run)]:
        ends = "; ".join(f"{run.label}: {_num_mha(run)} of {len(run.blocks)} at the end" for run in sharing)
        what = "removals" if any(run.has_groups for run in runs) else "removed blocks"
        share = Picture("mha_share", draw_mha_share(runs), f"Share of MHA blocks among the removed. {ends}")
        chapters[f"Share of MHA among the {what}"] = [share]
    chapters["Importance of every block at the first step"] = [
        Picture(
            _numbered("first_step", run, runs),
            draw_first_step(run),
            f"{_capital(run.metric_name)} of the dense model without each block alone, layer by layer"
            + (", and the block influence of each block and each layer" if run.influence else ""),
            _of(_about_first_step(run), run, runs),
        )
        for run in runs
        if run.first_step()
    ]
    chapters["What replicas did when"] = [
        Picture(
            _numbered("timeline", run, runs),
            draw_timeline(run.events),
            "One row per replica, one bar per unit of work, coloured by step",
            run.label if len(runs) > 1 else "",
        )
        for run in runs
        if any(event["type"] == "unit" for event in run.events)  # events.jsonl may be missing
    ]
    return {title: pictures for title, pictures in chapters.items() if pictures}


def _about_first_step(run: Recorded) -> str:
    points = run.first_step()
    failed = [str(block) for block, point in points.items() if not math.isfinite(point.value)]
    return (
        f"{_capital(run.metric_name)} with a single block removed; numbers at the top are off the scale"
        + ("; hollow: estimated from some of the windows" if not all(point.exact for point in points.values()) else "")
        + (f"; not finite, so not drawn: {', '.join(failed)}" if failed else "")
        + (
            ". Block influence (BI): 1 − mean cosine between the stream before and after."
            if run.influence
            else ". `blockpruner report --influence` adds block influence."
        )
    )


def _image(picture: Picture, folder: Path) -> Image:
    svg = (folder / f"{picture.name}.svg").read_bytes()
    return Image(base64.b64encode(svg).decode(), picture.alt, picture.caption)


def _title(runs: Sequence[Recorded]) -> str:
    model = runs[0].config.model
    if len(runs) > 1:
        return f"{model}: {len(runs)} searches"
    unit = "layers" if runs[0].config.blocks is Granularity.LAYER else "blocks"
    return f"{model}: {amount(runs[0].blocks, unit)} removed"


def _note(runs: Sequence[Recorded]) -> str:
    texts = {run.summary["calibration"]["fingerprint"] for run in runs}
    without = [run.name for run in runs if not run.scores]
    return " ".join(
        [
            *(
                ["These runs used different calibration windows, so compare their losses with care."]
                if len(texts) > 1
                else []
            ),
            *([f"No scores.parquet in {', '.join(without)}: scores of candidates are not shown."] if without else []),
        ]
    )


def _num_mha(run: Recorded) -> int:
    return sum(block.kind is Kind.MHA for block in run.blocks)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _of(text: str, run: Recorded, runs: Sequence[Recorded]) -> str:
    return f"{text} ({run.label})" if len(runs) > 1 else text


def _numbered(name: str, run: Recorded, runs: Sequence[Recorded]) -> str:
    return f"{name}-{runs.index(run) + 1}" if len(runs) > 1 else name
