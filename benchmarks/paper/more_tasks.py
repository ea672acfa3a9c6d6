"""Table 8 (AQuA-RAT) and Table 10 (nine tasks): further tasks for the methods of Table 1."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.paper.numbers import AQUA, NINE_TASKS
from benchmarks.paper.setting import Setting, best, best_claim, of, order_claim, percent, tell

METHODS = ("slicegpt", "laco-code", "rm", "shortgpt", "blockpruner")


def show_aqua(setting: Setting, ratio: float, tasks: tuple[str, ...]) -> None:
    _show(setting, ratio, tasks, "Table 8", AQUA)


def show_nine(setting: Setting, ratio: float, tasks: tuple[str, ...]) -> None:
    _show(setting, ratio, tasks, "Table 10", NINE_TASKS)


def _show(
    setting: Setting, ratio: float, tasks: tuple[str, ...], title: str, papers: Mapping[str, Mapping[str, float]]
) -> None:
    rows = setting.compare(METHODS, (ratio,), tasks=tasks)
    averages = {name: of(rows, name)["average"] for name in METHODS}
    names = list(rows[0]["tasks"])
    winners = [best({name: value for name, value in paper.items() if name != "dense"}) for paper in papers.values()]
    claims = [
        best_claim(
            f"at {ratio:.0%} BlockPruner has the best average",
            f"on {winners.count('blockpruner')} of {len(papers)} models",
            averages,
        ),
        order_claim(f"at {ratio:.0%}", averages, list(papers.values())),
    ]
    table = [
        [
            row["method"],
            percent(row["ratio"]),
            *(percent(row["tasks"][task]["score"]) for task in names),
            percent(row["average"]),
            *(papers[model].get(row["method"], "") for model in ("Llama2-7B", "Llama2-13B")),
        ]
        for row in rows
    ]
    columns = ["", "removed (%)", *names, "average", "Llama2-7B", "Llama2-13B"]
    tell(f"{title} on {setting.model}", columns, table, claims, rows)
