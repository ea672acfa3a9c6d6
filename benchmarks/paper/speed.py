"""Table 6: how much faster 128 tokens are generated."""

from __future__ import annotations

from benchmarks.paper.numbers import SPEED
from benchmarks.paper.setting import Claim, Setting, of, percent, tell

METHODS = ("blockpruner", "slicegpt", "shortgpt")


def show(setting: Setting, ratio: float, repeats: int) -> None:
    rows = setting.compare(METHODS, (ratio,), repeats=repeats)
    ours = {name: of(rows, name) for name in METHODS}
    fastest = max(METHODS, key=lambda name: ours[name]["decode_ratio"])
    papers = [max(paper, key=lambda name: paper[name][1]) for paper in SPEED.values()]
    claims = [
        Claim(
            f"at {ratio:.0%} BlockPruner generates fastest",
            f"on {papers.count('blockpruner')} of {len(papers)} models",
            fastest == "blockpruner",
            ", ".join(f"{name} {ours[name]['decode_ratio']:.2f}x" for name in METHODS),
        )
    ]
    table = []
    for row in rows:
        printed = [paper.get(row["method"]) for paper in SPEED.values()]
        beside = [f"{one[0]:.1f} %: {one[1]:.2f}x" if one else "" for one in printed]
        ratio_of = row.get("decode_ratio")
        cells = [f"{row['decode_tokens_per_s']:.1f}", "" if ratio_of is None else f"{ratio_of:.2f}x"]
        table.append([row["method"], percent(row["ratio"]), *cells, *beside])
    columns = ["", "removed (%)", "decoding, tokens/s", "against dense", *SPEED]
    tell(f"Table 6 on {setting.search.model}", columns, table, claims, rows)
