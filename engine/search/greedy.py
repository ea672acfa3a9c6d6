"""The paper's search (section 4.3): in every step all remaining candidates are scored and the best one goes."""

from __future__ import annotations

from dataclasses import dataclass

from blockpruner.engine.blocks import Mask
from blockpruner.engine.search.oracle import Found, Oracle, Step
from blockpruner.engine.search.space import SearchSpace


@dataclass(frozen=True)
class Greedy:
    space: SearchSpace

    def run(self, oracle: Oracle) -> Found:
        base, steps = oracle.dense, list[Step]()
        while candidates := self.space.candidates(base.mask):
            scores = oracle.score([candidate.mask for candidate in candidates])
            best = self.space.best(candidates, scores, base)
            if scores[best].value > self.space.max_value:
                break
            base = scores[best]
            steps.append(Step(block=candidates[best].block, score=base, candidates=candidates, scores=scores))
            oracle.removed(steps[-1])
        return Found.by(steps)

    def flops_left(self, mask: Mask, num_tokens: int) -> float:
        return self.space.greedy_flops_left(mask, num_tokens)
