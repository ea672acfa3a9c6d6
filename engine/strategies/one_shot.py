"""The paper's ablation (section 5.2): score every block once, on its own, and remove the least harmful ones
together."""

from __future__ import annotations

import math

from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import SearchFailed
from blockpruner.engine.search.oracle import Found, Oracle, Round
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.search.strategy import Strategy


class OneShot(Strategy):
    name = "one-shot"
    about = "scores every block once, on its own, and removes the least harmful ones together (the paper's ablation)"
    heeds = frozenset({"per"})

    def run(self, space: SearchSpace, oracle: Oracle, *, seed: int = 0) -> Found:
        dense = oracle.dense
        candidates = space.neighbours(Mask())
        scores = oracle.score([candidate.mask for candidate in candidates])
        finite = [index for index, score in enumerate(scores) if math.isfinite(score.value)]
        finite.sort(key=lambda n: (scores[n].value - dense.value) / space.weight(candidates[n].block))
        mask, taken = Mask(), list[int]()
        for index in finite:
            larger = mask.without(candidates[index].block)
            if not space.is_met(mask) and space.allows(larger) and space.can_reach(larger):
                mask = larger
                taken.append(index)
        if not space.is_met(mask):
            raise SearchFailed(f"only {len(finite)} of {len(scores)} blocks have a finite loss when they are removed.")
        final = oracle.score([mask])[0]
        if not math.isfinite(final.value):
            raise SearchFailed(f"with {mask} removed together, the loss is NaN or infinite.")
        all_scores = list({score.mask: score for score in [*scores, final]}.values())
        oracle.judged(Round(name="one-shot", best=final, masks=[score.mask for score in all_scores], scores=all_scores))
        blocks = tuple(candidates[index].block for index in taken)
        if len(blocks) == 1:
            return Found(blocks, (final,))
        return Found(blocks, (scores[taken[0]], *[None] * (len(blocks) - 2), final))

    def flops_left(self, space: SearchSpace, mask: Mask, num_tokens: int, rounds_left: int | None = None) -> float:
        forward = space.shape.forward_flops(Mask(), num_tokens)
        return 0.0 if mask.absent else forward / 2 * len(space.neighbours(mask))
