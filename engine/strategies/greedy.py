"""The paper's search (section 4.3): score all remaining candidates in every step and remove the best one."""

from __future__ import annotations

from collections.abc import Sequence

from blockpruner.engine.blocks import Mask
from blockpruner.engine.score import Score
from blockpruner.engine.search.oracle import Candidate, Found, Oracle, Step
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.search.strategy import Strategy


class Greedy(Strategy):
    name = "greedy"
    about = "the paper's search: scores every candidate of every step on all windows"
    heeds = frozenset({"units", "per", "max_perplexity", "compensate"})
    grows = True

    def run(self, space: SearchSpace, oracle: Oracle, *, seed: int = 0) -> Found:
        base, steps = oracle.dense, list[Step]()
        while candidates := space.candidates(base.mask):
            step = best_step(space, oracle, candidates, base)
            if step.score.value > space.max_value:
                break
            steps.append(step)
            base = oracle.removed(step)
        return Found.by(steps)

    def flops_left(self, space: SearchSpace, mask: Mask, num_tokens: int, rounds_left: int | None = None) -> float:
        return space.greedy_flops_left(mask, num_tokens)


def best_step(space: SearchSpace, oracle: Oracle, candidates: Sequence[Candidate], base: Score) -> Step:
    """Score all candidates, and return the removal of the best one. base: score before it."""
    scores = oracle.score([candidate.mask for candidate in candidates])
    best = space.best(candidates, scores, base)
    return Step(block=candidates[best].block, score=scores[best], candidates=candidates, scores=scores)
