"""What all tables share: one folder in which every method runs once, and how a claim is judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.common import console, print_json, print_table
from blockpruner.comparing.comparing import compare_methods
from blockpruner.comparing.config import CompareConfig
from blockpruner.showing.console import Reporter

Row = dict[str, Any]
"""Of comparison.json."""
NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Options of `blockpruner compare` for all tables."""

    common: CompareConfig
    """Each table has methods, ratios and tasks of its own."""
    include_path: Path | None
    limit: int | None
    """These two are for tables with tasks."""
    out: Path

    @property
    def model(self) -> str:
        return self.common.model

    def compare(
        self, methods: tuple[str, ...], ratios: tuple[float, ...], *, tasks: tuple[str, ...] = (), repeats: int = 0
    ) -> list[Row]:
        """Rows of the dense model and of each method at each ratio. What another table left in the folder is used."""
        config = self.common.replace(
            methods=methods, ratio=ratios, tasks=tasks, include_path=self.include_path if tasks else None,
            limit=self.limit if tasks else None, repeats=repeats,
        )  # fmt: skip
        rows: list[Row] = compare_methods(config, self.out, Reporter(console))["rows"]
        return rows

    def with_seed(self, seed: int) -> Setting:
        out = self.out.with_name(f"{self.out.name}-seed{seed}")
        return replace(self, common=self.common.replace(seed=seed), out=out)


@dataclass(frozen=True)
class Claim:
    """Something that the paper's table shows."""

    text: str
    paper: str
    """On how much of what the paper tried it holds."""
    holds: bool | None
    """Here; None: it was not tried."""
    detail: str = ""


def tell(title: str, columns: list[str], table: list[list[Any]], claims: list[Claim], rows: list[Row]) -> None:
    print_table(title, columns, table)
    for claim in claims:
        verdict = "not tried" if claim.holds is None else "holds here" if claim.holds else "does NOT hold here"
        detail = f" ({claim.detail})" if claim.detail else ""
        console.print(f"{claim.text}: in the paper {claim.paper}; {verdict}{detail}", highlight=False, soft_wrap=True)
    figures = [{key: value for key, value in row.items() if key != "perplexities"} for row in rows]
    print_json({"rows": figures, "claims": [vars(claim) for claim in claims]})


def best_claim(text: str, paper: str, values: Mapping[str, float | None], *, lowest: bool = False) -> Claim:
    """That BlockPruner has the best value."""
    winner = best(values, lowest=lowest)
    holds = None if winner == NONE else winner == "blockpruner"
    return Claim(text, paper, holds, f"{'lowest' if lowest else 'best'} here: {winner}")


def best(values: Mapping[str, float | None], *, lowest: bool = False) -> str:
    """The name with the best value; of a tie all names. What is not known, or no number, is never best."""
    known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    if not known:
        return NONE
    most = min(known.values()) if lowest else max(known.values())
    return " and ".join(name for name, value in known.items() if value == most)


def is_better(one: float | None, other: float | None, *, lowest: bool = False) -> bool | None:
    """Whether the first value is the better one. None, not tried: one of them is not known, or no number."""
    if one is None or other is None or not (math.isfinite(one) and math.isfinite(other)):
        return None
    return one < other if lowest else one > other


def order_claim(
    what: str,
    ours: Mapping[str, float | None],
    papers: Sequence[Mapping[str, float | None]],
    *,
    lowest: bool = False,
) -> Claim:
    """That methods come in the order that the paper has: of each two, the one that is better on most of its models is
    the better one here. Pairs without a majority there, or without numbers here, do not count."""
    alike, unlike = list[str](), list[str]()
    for one, other in combinations(ours, 2):
        there = [is_better(paper.get(one), paper.get(other), lowest=lowest) for paper in papers]
        most = there.count(True) - there.count(False)
        here = is_better(ours[one], ours[other], lowest=lowest)
        if most and here is not None:
            first, second = (one, other) if most > 0 else (other, one)
            (alike if here is (most > 0) else unlike).append(f"{first} before {second}")
    total = len(alike) + len(unlike)
    detail = f"{len(alike)} of {total} pairs" + (f", but not {', '.join(unlike)}" if unlike else "")
    return Claim(
        f"{what}: the order of methods", f"{total} pairs on most models", not unlike if total else None, detail
    )


def of(rows: list[Row], name: str, target: float | None = None) -> Row:
    """A method's row (at a ratio)."""
    return next(row for row in rows if row["method"] == name and target in (None, row["target"]))


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"
