"""Audit a search: repeat some of its steps exhaustively and check whether greedy would have removed the same blocks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scipy.special import betaincinv  # scipy.stats takes three times as long to import

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.score import Score
from blockpruner.engine.search.oracle import Found
from blockpruner.engine.search.space import SearchSpace

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Audit:
    step: int
    """Number of the step, starting from 1."""
    chosen: Block
    best: Block
    """The block that greedy would remove in this step, given the same earlier removals."""
    regret: float
    """How much higher the loss is than with `best`, in nats (divided by the removed share of all parameters if the
    search judges removals per parameter)."""
    masks: Sequence[Mask]
    """All masks that were scored."""


def audited_steps(num_steps: int, number: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(1, num_steps + 1), number))


def audit(
    space: SearchSpace,
    found: Found,
    dense: Score,
    steps: Sequence[int],
    score: Callable[[int, list[Mask]], list[Score]],
) -> Iterator[Audit]:
    """Audit the given steps. `score` takes a step and its candidate masks, and returns their scores over all
    windows."""
    for step in steps:
        base = found.scores[step - 2] if step > 1 else dense
        assert base is not None
        candidates = space.candidates(base.mask)
        scores = score(step, [candidate.mask for candidate in candidates])
        best = space.best(candidates, scores, base)
        chosen = [candidate.block for candidate in candidates].index(found.blocks[step - 1])
        ranks = [
            (score.value - base.value) / space.weight(each.block)
            for score, each in zip(scores, candidates, strict=True)
        ]
        regret = 0.0 if best == chosen else ranks[chosen] - ranks[best]
        yield Audit(step, candidates[chosen].block, candidates[best].block, regret, [score.mask for score in scores])


def most_misses(num_misses: int, num_audited: int) -> float:
    """Upper bound for the share of steps that miss greedy's choice, at 95 % confidence (one-sided Clopper-Pearson)."""
    if num_misses == num_audited:
        return 1.0
    return float(betaincinv(num_misses + 1, num_audited - num_misses, CONFIDENCE))
