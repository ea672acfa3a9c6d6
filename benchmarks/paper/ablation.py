"""Table 2: BlockPruner without its search (each block scored once), and without blocks (whole layers)."""

from __future__ import annotations

from benchmarks.paper.numbers import ABLATION
from benchmarks.paper.setting import Claim, Row, Setting, is_better, number, of, percent, tell

METHODS = ("blockpruner", "one-shot", "layer")


def show(setting: Setting, ratios: tuple[float, ...], tasks: tuple[str, ...]) -> None:
    rows = setting.compare(METHODS, ratios, tasks=tasks)
    claims, table = [], []
    for ratio in ratios:
        full, *others = (of(rows, name, ratio) for name in METHODS)
        for index, other in enumerate(others, start=1):
            wins = sum(averages[0] > averages[index] for averages in ABLATION.values())
            paper = f"on {wins} of {len(ABLATION)} models (average)"
            name = "without search" if other["method"] == "one-shot" else "with whole layers"
            claims.append(
                Claim(f"at {ratio:.0%} it is worse {name}", f"{paper}", *_worse(full, other, column="average"))
                if tasks
                else Claim(f"at {ratio:.0%} it is worse {name}", paper, *_worse(full, other, column="perplexity"))
            )
    for row in rows:
        averages = ABLATION["Llama2-7B"], ABLATION["Llama2-13B"]
        beside = [
            str(of_model[METHODS.index(row["method"])]) if row["method"] in METHODS else "" for of_model in averages
        ]
        table.append(
            [row["method"], percent(row["ratio"]), number(row["perplexity"]), percent(row["average"]), *beside]
        )
    columns = ["", "removed (%)", "PPL", "average", "Llama2-7B, average", "Llama2-13B, average"]
    tell(f"Table 2 on {setting.model}", columns, table, claims, rows)


def _worse(full: Row, other: Row, *, column: str) -> tuple[bool | None, str]:
    form = number if column == "perplexity" else percent
    holds = is_better(full[column], other[column], lowest=column == "perplexity")
    return holds, f"{column} {form(other[column])} against {form(full[column])}"
