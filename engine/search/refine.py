"""Exchanges, after any strategy: give one removed block back, remove a better one, until nothing improves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.score import Score
from blockpruner.engine.search.halving import best_of
from blockpruner.engine.search.oracle import Found, Oracle, Round, Strategy
from blockpruner.engine.search.space import SearchSpace

NUM_EXCHANGES = 32
"""Of all exchanges, so many that promise most are tried in a round."""
PROBE_SHARE = 0.25
"""Of the windows, on which the removals that an exchange may choose from are scored."""


@dataclass(frozen=True)
class Refine:
    space: SearchSpace
    strategy: Strategy

    def run(self, oracle: Oracle) -> Found:
        found = self.strategy.run(oracle)
        if not self.space.is_met(found.mask):  # --max-perplexity ended it
            return found
        best = found.scores[-1]
        assert best is not None
        number = 0
        while True:
            number += 1
            masks = self._promising(oracle, best.mask, number)
            scores = best_of(oracle, masks, 2, number) if masks else []
            is_better = bool(scores) and scores[0].value < best.value
            if is_better:
                best = scores[0]
            oracle.judged(Round(name=f"exchange {number}", best=best, masks=masks, scores=scores))
            if not is_better:
                return exchanged(found, best, self.space)

    def flops_left(self, mask: Mask, num_tokens: int) -> float:
        forward = self.space.shape.forward_flops(mask, num_tokens)
        return self.strategy.flops_left(mask, num_tokens) + forward * self.space.shape.num_layers / 2  # one round

    def _promising(self, oracle: Oracle, mask: Mask, number: int) -> list[Mask]:
        """Exchanges by what their two halves promise: what giving back a block gains, and what removing one costs."""
        groups = list(oracle.groups)
        turn = number * max(1, len(groups) // 3) % len(groups)
        probe = [*groups[turn:], *groups[:turn]][: max(1, round(PROBE_SHARE * len(groups)))]
        returned = removed_blocks(mask, self.space)
        removals = [
            larger
            for block in self.space.blocks.candidates(self.space.shape.num_layers)
            if (larger := mask.without(block)) != mask and not self.space.keep & set(block.parts)
        ]
        gains = oracle.score([mask.keeping(block) for block in returned], probe)
        costs = oracle.score(removals, probe) if removals else []
        options = [
            (gain.value + cost.value, cost.mask.keeping(block))
            for block, gain in zip(returned, gains, strict=True)
            for cost in costs
            if math.isfinite(gain.value + cost.value)
        ]
        allowed = [option for option in options if self.space.allows(option[1]) and self.space.is_met(option[1])]
        allowed.sort(key=lambda option: option[0])
        return [exchange for _, exchange in allowed[:NUM_EXCHANGES]]


def exchanged(found: Found, best: Score, space: SearchSpace) -> Found:
    """The removals of `best`: those that it shares with what was found, in that order, then the others. Scores
    that are known stay, as far as the orders agree."""
    absent = removed_blocks(best.mask, space)
    parts = [part for block in found.blocks for part in block.parts]
    blocks = [block for block in found.blocks if block in absent] or [block for block in parts if block in absent]
    blocks += [block for block in absent if block not in blocks]
    agreed = next(
        (number for number, (old, new) in enumerate(zip(found.blocks, blocks, strict=False)) if old != new),
        min(len(blocks), len(found.blocks)),
    )
    scores = [*found.scores[:agreed], *[None] * (len(blocks) - agreed)]
    return Found(tuple(blocks), (*scores[:-1], best))


def removed_blocks(mask: Mask, space: SearchSpace) -> list[Block]:
    """What is absent, as the blocks of the search, in the official order."""
    return [block for block in space.blocks.candidates(space.shape.num_layers) if set(block.parts) <= mask.absent]
