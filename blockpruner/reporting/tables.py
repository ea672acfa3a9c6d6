"""Tables of the results of runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, takewhile

from blockpruner.engine.blocks import Granularity, amount
from blockpruner.engine.work.times import UNIT
from blockpruner.reporting.recorded import Recorded
from blockpruner.searching.content import StepSummary, Totals
from blockpruner.showing.measurements import Table


def tabulate_overview(runs: Sequence[Recorded]) -> Table:
    """Summarize the runs, one column per run."""
    facts: dict[str, Callable[[Recorded], str]] = {
        "options": lambda run: "" if run.label == run.differences else run.differences,
        "status": lambda run: run.summary["status"],
        "removed" if any(run.has_groups for run in runs) else "blocks removed": _removed,
        "parameters removed": lambda run: f"{100 * run.steps[-1]['ratio']:.2f} %",
        "dense": lambda run: f"{run.metric_name} {_text(run.dense)}",
        "pruned": lambda run: f"{run.metric_name} {_text(run.values[-1])}",
        "expected time": _expected_time,
        "refits": _refits,
        "calibration": _calibration,
        "search time": lambda run: f"{run.summary['totals']['wall_s']:,.0f} s on {_replicas(run)}",
        "plain loop's work / done": lambda run: saving(run.summary["totals"]),
        "audit": _audit,
    }
    rows = [[name, *(fact(run) for run in runs)] for name, fact in facts.items()]
    return Table(["", *(run.label for run in runs)], [row for row in rows if any(row[1:])])


def tabulate_steps(run: Recorded) -> Table:
    header = [
        "step",
        "block",
        run.metric_name,
        "removed",
        "expected ms",
        "second best",
        "scored",
        "in full",
        "plain loop's work / done",
        "time",
    ]
    rows = []
    for step, block in zip(run.steps, run.blocks, strict=True):
        others = run.runners_up(step["step"])
        second = f"{others[0][0]} +{others[0][1] - run.value(step):.4f}" if others else ""
        is_step = step["num_candidates"] > 0  # otherwise the removal was found in rounds
        rows.append(
            [
                str(step["step"]),
                str(block),
                _text(run.value(step)),
                f"{100 * step['ratio']:.2f} %",
                f"{step['ms']:.4g}" if "ms" in step else "",
                second,
                f"{step['num_scored']} of {step['num_candidates']}" if is_step else "",
                str(step.get("num_exact", "")) if is_step else "",
                saving(step),
                f"{step['wall_s']:.1f} s" if is_step else "",
            ]
        )
    shown = [index for index in range(len(header)) if any(row[index] for row in rows)]
    return Table([header[index] for index in shown], [[row[index] for index in shown] for row in rows])


def tabulate_agreement(runs: Sequence[Recorded]) -> Table:
    """Compare each pair of runs over the removals that both have: how long the orders agree, how similar the sets
    are."""
    rows = []
    for one, other in combinations(runs, 2):
        pairs = list(zip(one.blocks, other.blocks, strict=False))
        leading = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        same = sum(mine == theirs for mine, theirs in pairs)
        mine, theirs = ({part for pair in pairs for part in pair[side].parts} for side in (0, 1))
        jaccard = len(mine & theirs) / len(mine | theirs)
        rows.append([one.label, other.label, str(len(pairs)), str(leading), str(same), f"{jaccard:.2f}"])
    header = [
        "run",
        "other run",
        "steps in both",
        "equal from the first on",
        "equal at their place",
        "Jaccard of the removed sets",
    ]
    return Table(header, rows)


def tabulate_versions(runs: Sequence[Recorded]) -> Table:
    """List what else the numbers depend on, one column per run."""
    facts = [
        {
            **run.summary["versions"],
            "dtype": run.summary["dtype"],
            "device": run.summary["device"],
            "placement": run.summary["placement"],
            "kernel shape": ", ".join(f"{key} {value}" for key, value in run.summary["kernel"].items()),
            "calibration fingerprint": run.summary["calibration"]["fingerprint"],
        }
        for run in runs
    ]
    names = dict.fromkeys(name for found in facts for name in found)
    return Table(["", *(run.label for run in runs)], [[name, *(str(f.get(name, "")) for f in facts)] for name in names])


def saving(spent: StepSummary | Totals) -> str:
    """Return the work of the plain loop divided by the work that was done."""
    return f"{spent['naive_work_flops'] / spent['work_flops']:.2f}×" if spent["work_flops"] else ""


def _removed(run: Recorded) -> str:
    unit = "blocks" if run.has_groups and run.config.blocks is Granularity.MIX else str(run.config.blocks)
    return amount(run.blocks, f"of {run.num_blocks} {unit}").replace(" mix", "")


def _expected_time(run: Recorded) -> str:
    times, last = run.summary.get("times"), run.steps[-1]
    if times is None or "ms" not in last:
        return ""
    return f"{last['ms']:.4g} ms {UNIT[run.config.time_for]}, {times['dense']:.4g} for the dense model"


def _calibration(run: Recorded) -> str:
    windows = run.summary["calibration"]
    return f"{' and '.join(run.config.calibration)}: {windows['num_windows']} windows, {windows['num_tokens']:,} tokens"


def _refits(run: Recorded) -> str:
    refits = run.summary.get("refits")
    if not refits:
        return ""
    used = [refit for refit in refits if refit["is_used"]]
    found = f"{len(refits)} on {refits[-1]['num_tokens']:,} tokens, {len(used)} of them used"
    if not used:
        return found
    return f"{found}; perplexity {_text(used[-1]['perplexity'] or math.nan)} after that of step {used[-1]['step']}"


def _replicas(run: Recorded) -> str:
    number = run.summary["num_replicas"] or 1
    return f"{number} replica{'s' * (number > 1)}"


def _audit(run: Recorded) -> str:
    audit = run.summary.get("audit")
    if audit is None:
        return ""
    return (
        f"an exhaustive search agreed in {audit['num_agreed']} of {audit['num_audited']} steps (at most "
        f"{100 * audit['most_misses']:.0f} % of such steps miss, at 95 % confidence)"
    )


def _text(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""
