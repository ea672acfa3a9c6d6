"""Claims of the paper's tables are judged only on values that are known."""

import math
from typing import Any, cast

import pytest

from benchmarks.paper import ablation, draws, granularity, metric
from benchmarks.paper.setting import Claim, Setting, best_claim, is_better, order_claim

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("one", "other", "lowest", "expected"),
    [
        (2.0, 1.0, False, True),
        (1.0, 2.0, False, False),
        (1.0, 2.0, True, True),
        (1.0, 1.0, True, False),
        (None, 1.0, False, None),
        (1.0, None, True, None),
        (NAN, 1.0, False, None),
        (1.0, INF, True, None),
    ],
)
def test_only_known_numbers_are_compared(
    one: float | None, other: float | None, lowest: bool, expected: bool | None
) -> None:
    assert is_better(one, other, lowest=lowest) is expected


def test_the_best_is_not_tried_where_nothing_is_known() -> None:
    assert best_claim("best", "always", {"blockpruner": 2.0, "rm": 1.0}).holds is True
    assert best_claim("best", "always", {"blockpruner": 2.0, "rm": 1.0}, lowest=True).holds is False
    assert best_claim("best", "always", {"blockpruner": None, "rm": NAN}).holds is None


def test_the_order_of_methods_is_that_of_most_models() -> None:
    papers = [{"a": 3.0, "b": 2.0, "c": 1.0}, {"a": 3.0, "b": 2.0, "c": 4.0}, {"a": 1.0, "c": 5.0}]
    claim = order_claim("average", {"a": 9.0, "b": 7.0, "c": 8.0}, papers)
    # a before b on two of two models, c before a on two of three, b and c one each.
    assert (claim.holds, claim.detail) == (False, "1 of 2 pairs, but not c before a")
    assert order_claim("average", {"a": 9.0, "b": 7.0, "c": 9.5}, papers).holds
    assert order_claim("loss", {"a": 9.0, "b": 7.0}, papers, lowest=True).holds is True
    assert order_claim("average", {"a": None, "b": NAN}, papers).holds is None


class HandMade:
    """A setting whose comparison is known."""

    model = "tiny"

    def __init__(self, **columns: Any) -> None:
        self.columns = columns

    def compare(self, methods: tuple[str, ...], ratios: tuple[float, ...], **options: Any) -> list[dict[str, Any]]:
        return [
            {"method": name, "target": ratio, "ratio": ratio, **self.columns} for name in methods for ratio in ratios
        ]


@pytest.mark.parametrize("table", [ablation, granularity, metric])
@pytest.mark.parametrize("tasks", [(), ("rolling",)])
def test_what_is_not_known_was_not_tried(table: Any, tasks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Claim] = []
    monkeypatch.setattr(table, "tell", lambda title, columns, rows, claims, found: told.extend(claims))
    table.show(cast(Setting, HandMade(perplexity=NAN, average=None)), (0.2,), tasks)
    assert told
    assert {claim.holds for claim in told} == {None}


@pytest.mark.parametrize("values", [[NAN, 2.0], [2.0, INF], [INF]])
def test_there_is_no_spread_of_what_is_no_number(values: list[float]) -> None:
    assert draws._spread(values) == "–"


def test_a_spread_is_the_sample_standard_deviation() -> None:
    assert draws._spread([1.0, 3.0]) == "2.0 ± 1.4"
