"""Table 4: importance by perplexity (BlockPruner) or by JS divergence (FinerCut)."""

from __future__ import annotations

from benchmarks.paper.numbers import METRIC
from benchmarks.paper.setting import Claim, Setting, is_better, number, of, percent, tell

METHODS = ("blockpruner", "finercut")


def show(setting: Setting, ratios: tuple[float, ...], tasks: tuple[str, ...]) -> None:
    rows = setting.compare(METHODS, ratios, tasks=tasks)
    pairs = [pair for paper in METRIC.values() for pair in zip(*(paper[name] for name in METHODS), strict=True)]
    wins = sum((ppl.average or 0) > (js.average or 0) for ppl, js in pairs)
    claims, table = [], []
    for ratio in ratios:
        by_ppl, by_js = (of(rows, name, ratio) for name in METHODS)
        column, form = ("average", percent) if tasks else ("perplexity", number)
        claims.append(
            Claim(
                f"at {ratio:.0%} perplexity chooses better than JS",
                f"in {wins} of {len(pairs)} pairs (average, not always at equal ratios)",
                is_better(by_ppl[column], by_js[column], lowest=not tasks),
                f"{column} {form(by_ppl[column])} against {form(by_js[column])}",
            )
        )
    for row in rows:
        printed = METRIC["Llama2-7B"].get(row["method"], ())
        beside = "; ".join(f"{one.ratio:.0f} %: {one.average}" for one in printed)
        table.append([row["method"], percent(row["ratio"]), number(row["perplexity"]), percent(row["average"]), beside])
    columns = ["", "removed (%)", "PPL", "average", "Llama2-7B: average"]
    tell(f"Table 4 on {setting.model}", columns, table, claims, rows)
