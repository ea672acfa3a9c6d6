"""The paper's search (section 4.3): score all remaining candidates in every step and remove the best one."""

from __future__ import annotations

from blockpruner.engine.blocks import Mask
from blockpruner.engine.search.oracle import Found, Oracle, Step
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
            scores = oracle.score([candidate.mask for candidate in candidates])
            best = space.best(candidates, scores, base)
            if scores[best].value > space.max_value:
                break
            block, score = candidates[best].block, scores[best]
            steps.append(Step(block=block, score=score, candidates=candidates, scores=scores))
            base = oracle.removed(steps[-1])
        return Found.by(steps)

    def flops_left(self, space: SearchSpace, mask: Mask, num_tokens: int, rounds_left: int | None = None) -> float:
        return space.greedy_flops_left(mask, num_tokens)
