"""Table 1: BlockPruner against ShortGPT, RM, LaCo and SliceGPT."""

from __future__ import annotations

from benchmarks.paper.numbers import MAIN
from benchmarks.paper.setting import Claim, Setting, number, of, percent, tell

METHODS = ("slicegpt", "laco", "rm", "shortgpt", "blockpruner")


def show(setting: Setting, ratios: tuple[float, ...], tasks: tuple[str, ...]) -> None:
    rows = setting.compare(METHODS, ratios, tasks=tasks)
    papers = list(MAIN.values())
    claims = []
    for ratio in ratios:
        ours = {name: of(rows, name, ratio) for name in METHODS}
        best = max(METHODS, key=lambda name: ours[name]["average"] or 0.0)
        least = min(METHODS, key=lambda name: ours[name]["perplexity"] or float("inf"))
        averages = [max(paper, key=lambda name: (name != "dense", paper[name].average)) for paper in papers]
        losses = [min(paper, key=lambda name: (name == "dense", paper[name].perplexity)) for paper in papers]
        claims += [
            Claim(
                f"at {ratio:.0%} BlockPruner has the best average",
                f"on {averages.count('blockpruner')} of {len(papers)} models",
                best == "blockpruner" if tasks else None,
                f"best here: {best}",
            ),
            Claim(
                f"at {ratio:.0%} BlockPruner has the lowest perplexity",
                f"on {losses.count('blockpruner')} of {len(papers)} models",
                least == "blockpruner",
                f"lowest here: {least}",
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
    tell(f"Table 1 on {setting.search.model}", columns, table, claims, rows)
