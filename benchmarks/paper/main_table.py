"""Table 1: BlockPruner against ShortGPT, RM, LaCo and SliceGPT."""

from __future__ import annotations

from benchmarks.paper.numbers import MAIN
from benchmarks.paper.setting import Setting, best, best_claim, number, of, order_claim, percent, tell

METHODS = ("slicegpt", "laco-code", "rm", "shortgpt", "blockpruner")


def show(setting: Setting, ratios: tuple[float, ...], tasks: tuple[str, ...]) -> None:
    rows = setting.compare(METHODS, ratios, tasks=tasks)
    papers = list(MAIN.values())
    claims = []
    for ratio in ratios:
        ours = {name: of(rows, name, ratio) for name in METHODS}
        pruned = [{name: row for name, row in paper.items() if name != "dense"} for paper in papers]
        averages = [best({name: row.average for name, row in paper.items()}) for paper in pruned]
        losses = [best({name: row.perplexity for name, row in paper.items()}, lowest=True) for paper in pruned]
        claims += [
            best_claim(
                f"at {ratio:.0%} BlockPruner has the best average",
                f"on {averages.count('blockpruner')} of {len(papers)} models",
                {name: row["average"] for name, row in ours.items()},
            ),
            best_claim(
                f"at {ratio:.0%} BlockPruner has the lowest perplexity",
                f"on {losses.count('blockpruner')} of {len(papers)} models",
                {name: row["perplexity"] for name, row in ours.items()},
                lowest=True,
            ),
            order_claim(
                f"at {ratio:.0%}, average",
                {name: row["average"] for name, row in ours.items()},
                [{name: row.average for name, row in paper.items()} for paper in pruned],
            ),
            order_claim(
                f"at {ratio:.0%}, perplexity",
                {name: row["perplexity"] for name, row in ours.items()},
                [{name: row.perplexity for name, row in paper.items()} for paper in pruned],
                lowest=True,
            ),
        ]
    columns = [
        "",
        "removed (%)",
        "PPL",
        "average",
        *(f"{model}: %, PPL, average" for model in ("Llama2-7B", "Llama2-13B")),
    ]
    table = []
    for row in rows:
        printed = [MAIN[model].get(row["method"]) for model in ("Llama2-7B", "Llama2-13B")]
        beside = [f"{p.ratio:.1f}, {p.perplexity}, {p.average}" if p else "" for p in printed]
        table.append(
            [row["method"], percent(row["ratio"]), number(row["perplexity"]), percent(row["average"]), *beside]
        )
    tell(f"Table 1 on {setting.model}", columns, table, claims, rows)
