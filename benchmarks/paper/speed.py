"""Table 6: how much faster 128 tokens are generated."""

from __future__ import annotations

from benchmarks.paper.numbers import SPEED
from benchmarks.paper.setting import Claim, Setting, best, of, percent, tell

METHODS = ("blockpruner", "slicegpt", "shortgpt")


def show(setting: Setting, ratio: float, repeats: int) -> None:
    rows = setting.compare(METHODS, (ratio,), repeats=repeats)
    ours = {name: of(rows, name) for name in METHODS}
    faster = {name: 1 / row["generate_ratio"] for name, row in ours.items()}
    fastest = best(faster)
    papers = [best({name: values[1] for name, values in paper.items()}) for paper in SPEED.values()]
    claims = [
        Claim(
            f"at {ratio:.0%} BlockPruner generates fastest",
            f"on {papers.count('blockpruner')} of {len(papers)} models",
            fastest == "blockpruner",
            ", ".join(f"{name} {times:.2f}x" for name, times in faster.items()),
        )
    ]
    table = []
    for row in rows:
        printed = [paper.get(row["method"]) for paper in SPEED.values()]
        beside = [f"{one[0]:.1f} %: {one[1]:.2f}x" if one else "" for one in printed]
        times = faster.get(row["method"])
        cells = [f"{row['generate_128_s']:.2f}", "" if times is None else f"{times:.2f}x"]
        table.append([row["method"], percent(row["ratio"]), *cells, *beside])
    columns = ["", "removed (%)", "128 tokens (s)", "times as fast", *SPEED]
    tell(f"Table 6 on {setting.model}", columns, table, claims, rows)
