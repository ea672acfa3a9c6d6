"""Evolutionary search over whole masks, after EvoPress (arXiv 2410.14649): one parent, offspring that swap some removed
blocks for kept ones, and a selection in stages on growing numbers of windows.

Unlike there, both kinds of blocks are free, so that attention and MLP counts need not be equal; and the first parent is
the mask that the lazy search finds, not the best of random ones.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from engine.blocks import Mask
from engine.errors import UserError
from engine.search.halving import best_of
from engine.search.lazy import Lazy
from engine.search.oracle import Found, Oracle, Round
from engine.search.refine import exchanged, removed_blocks
from engine.search.space import SearchSpace

MOST_SWAPS = 3
NUM_TRIES = 50
"""Mutations that are tried for one offspring that was not seen before."""


@dataclass(frozen=True)
class Evolution:
    space: SearchSpace
    generations: int
    offspring: int
    """Masks of one generation."""
    seed: int

    def __post_init__(self) -> None:
        for option, value in (("--generations", self.generations), ("--offspring", self.offspring)):
            if value < 1:
                raise UserError(f"expected {option} of at least 1, got {value}.")

    def run(self, oracle: Oracle) -> Found:
        draw = random.Random(self.seed)
        start = Lazy(self.space).run(oracle)
        if not self.space.is_met(start.mask):  # --max-perplexity ended it
            return start
        parent = start.scores[-1]
        assert parent is not None
        seen = {parent.mask}
        for generation in range(1, self.generations + 1):
            offspring = self._offspring(parent.mask, draw, seen)
            if not offspring:
                break
            seen.update(offspring)
            best = best_of(oracle, offspring, max(1, self.offspring // 16), generation)
            if best and best[0].value < parent.value:
                parent = best[0]
            oracle.judged(Round(name=f"generation {generation}", best=parent, masks=offspring, scores=best))
        return exchanged(start, parent, self.space)

    def flops_left(self, mask: Mask, num_tokens: int) -> float:
        forward = self.space.shape.forward_flops(Mask(), num_tokens)
        return Lazy(self.space).flops_left(mask, num_tokens) + self.generations * self.offspring * forward / 4

    def _offspring(self, parent: Mask, draw: random.Random, seen: set[Mask]) -> list[Mask]:
        masks: list[Mask] = []
        for _ in range(self.offspring):
            for _ in range(NUM_TRIES):
                mask = self._mutate(parent, draw)
                if mask is not None and mask not in seen and mask not in masks:
                    masks.append(mask)
                    break
        return masks

    def _mutate(self, parent: Mask, draw: random.Random) -> Mask | None:
        """Some swaps, then as few further removals, or as many returns, as the budget asks for."""
        mask = parent
        for _ in range(min(draw.randint(1, MOST_SWAPS), draw.randint(1, MOST_SWAPS))):
            back = draw.choice(removed_blocks(mask, self.space))
            choices = [each for each in self.space.neighbours(mask.keeping(back)) if each.block != back]
            if not choices:
                return None
            mask = draw.choice(choices).mask
        while not self.space.is_met(mask):
            choices = self.space.neighbours(mask)
            if not choices:
                return None
            mask = draw.choice(choices).mask
        while returns := [
            smaller for block in removed_blocks(mask, self.space) if self.space.is_met(smaller := mask.keeping(block))
        ]:
            mask = draw.choice(returns)
        return mask
