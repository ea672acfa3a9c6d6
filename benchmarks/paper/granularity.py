"""Table 5: blocks or whole layers, where much is removed."""

from __future__ import annotations

from benchmarks.paper.numbers import GRANULARITY
from benchmarks.paper.setting import Claim, Setting, is_better, number, of, percent, tell

METHODS = ("blockpruner", "layer")


def show(setting: Setting, ratios: tuple[float, ...], tasks: tuple[str, ...]) -> None:
    rows = setting.compare(METHODS, ratios, tasks=tasks)
    pairs = [pair for paper in GRANULARITY.values() for pair in zip(*(paper[name] for name in METHODS), strict=True)]
    averages = sum((blocks.average or 0) > (layers.average or 0) for blocks, layers in pairs)
    losses = sum((blocks.perplexity or 0) < (layers.perplexity or 0) for blocks, layers in pairs)
    claims, table = [], []
    for ratio in ratios:
        blocks, layers = (of(rows, name, ratio) for name in METHODS)
        claims.append(
            Claim(
                f"at {ratio:.0%} blocks have the lower perplexity",
                f"in {losses} of {len(pairs)} pairs",
                is_better(blocks["perplexity"], layers["perplexity"], lowest=True),
                f"{number(blocks['perplexity'])} against {number(layers['perplexity'])}",
            )
        )
        claims.append(
            Claim(
                f"at {ratio:.0%} blocks have the better average",
                f"in {averages} of {len(pairs)} pairs",
                is_better(blocks["average"], layers["average"]),
                f"{percent(blocks['average'])} against {percent(layers['average'])}",
            )
        )
    for row in rows:
        printed = GRANULARITY["Llama2-7B"].get(row["method"], ())
        beside = "; ".join(f"{one.ratio:.0f} %: {one.perplexity}, {one.average}" for one in printed)
        table.append([row["method"], percent(row["ratio"]), number(row["perplexity"]), percent(row["average"]), beside])
    columns = ["", "removed (%)", "PPL", "average", "Llama2-7B: PPL, average"]
    tell(f"Table 5 on {setting.model}", columns, table, claims, rows)
