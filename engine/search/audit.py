"""Steps of a search done again exhaustively: does it choose what greedy would have chosen?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scipy.stats import beta

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.score import Score
from blockpruner.engine.search.oracle import Found
from blockpruner.engine.search.space import SearchSpace

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Audit:
    step: int
    """From 1."""
    chosen: Block
    best: Block
    """What greedy removes here, after the same removals."""
    regret: float
    """By how much the loss is higher than with `best`, in nats (per share of all parameters, if removals are judged per
    parameter)."""
    masks: Sequence[Mask]
    """All that were scored."""


def audited_steps(num_steps: int, number: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(1, num_steps + 1), number))


def audit(
    space: SearchSpace,
    found: Found,
    dense: Score,
    steps: Sequence[int],
    score: Callable[[int, list[Mask]], list[Score]],
) -> Iterator[Audit]:
    """score: of a step's candidates, in full."""
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
    """Upper bound of the share of steps that miss, at 95 % confidence (Clopper and Pearson, one-sided)."""
    if num_misses == num_audited:
        return 1.0
    return float(beta.ppf(CONFIDENCE, num_misses + 1, num_audited - num_misses))
