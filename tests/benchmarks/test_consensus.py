"""Draws of the text that vote on removals."""

import pytest

from benchmarks.consensus import Consensus
from blockpruner.engine.blocks import Granularity
from tests.engine.test_search import MadeUp, shape_of, space

INCREASES = {0: (5.0, 0.0, 0.0), 1: (1.0, 1.0, 1.0), 2: (0.0, 3.5, 2.0)}
"""What the removal of each layer costs in each of three draws. Layer 0 has the best mean rank, layer 1 the lowest loss
where it costs most."""


@pytest.mark.parametrize(("rule", "removed"), [("rank", 0), ("worst", 1)])
def test_the_candidate_that_the_rule_favours_is_removed(rule: str, removed: int) -> None:
    def loss(mask: object, window: int) -> float:
        gone = {block.layer for block in mask.absent}  # type: ignore[attr-defined]
        return 3.0 + sum(INCREASES[layer][window // 2] for layer in gone)

    searched = space(1, blocks=Granularity.LAYER, shape=shape_of(3))
    found = Consensus(rule=rule, num_draws=3).run(searched, MadeUp(loss, num_windows=6))  # type: ignore[call-arg]
    assert [block.layer for block in found.blocks] == [removed]
