"""Console output of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from blockpruner.engine.judge.tasks import TaskScores
from blockpruner.showing.console import Reporter
from blockpruner.showing.tables import numbers_table


def tell(row: dict[str, Any], name: str, scores: TaskScores | None, reporter: Reporter) -> None:
    if scores is not None:
        grid = numbers_table("task", "acc", "acc_norm", "score ± stderr", title=name)
        for task, values in row["tasks"].items():
            grid.add_row(task, *(_percent(values[key]) for key in ("acc", "acc_norm")), _with_error(values))
        grid.add_section()
        grid.add_row("average", "", "", _percent(row["average"]))
        reporter.console.print(grid)
    for text, found in row["perplexity"].items():
        spread = "" if found["stderr"] is None else f" ± {found['stderr']:.4f}"
        reporter.say(
            f"{name}: perplexity on {text} {found['value']:.4f}{spread} "
            f"({found['num_windows']} windows of {found['seq_len']})"
        )


def print_table(rows: Sequence[dict[str, Any]], reporter: Reporter) -> None:
    """Print a table with one row for each number of removals."""
    tasks, texts = list(rows[0]["tasks"]), list(rows[0]["perplexity"])
    averages = ["average"] if tasks else []
    grid = numbers_table("removed", "ratio", *tasks, *averages, *(f"PPL {text}" for text in texts))
    for row in rows:
        cells = [_with_error(row["tasks"][task]) for task in tasks] + ([_percent(row["average"])] if tasks else [])
        for found in (row["perplexity"][text] for text in texts):
            cells.append(f"{found['value']:.2f}" + ("" if found["stderr"] is None else f" ± {found['stderr']:.2f}"))
        grid.add_row(str(row["num_remove"]), f"{row['ratio']:.1%}", *cells)
    reporter.console.print(grid)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _with_error(values: dict[str, Any]) -> str:
    if values["score"] is None:  # the task has no answers to score, for example WikiText
        metrics = values["metrics"]
        # With a filter, the names are `exact_match,strict` and `exact_match_stderr,strict`.
        errors = {name: metrics.get(re.sub("(?=,)|$", "_stderr", name, count=1)) for name in metrics}
        return ", ".join(
            f"{name} {value:.4g}" + ("" if errors[name] is None else f" ± {errors[name]:.2g}")
            for name, value in metrics.items()
            if "stderr" not in name
        )
    return _percent(values["score"]) + (f" ± {100 * values['stderr']:.2f}" if values["stderr"] is not None else "")
