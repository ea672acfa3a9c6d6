"""Evolutionary search over whole masks, after EvoPress (arXiv 2410.14649): one parent, offspring that swap some removed
blocks for kept ones, and a selection in stages on growing numbers of windows.

Unlike there, both kinds of blocks are free, so that attention and MLP counts need not be equal; and the first parent is
not the best of random masks, but of those that three greedy searches lead to: per block, per parameter, and by whole
layers. (On SmolLM2 the first is not always the best of them, although its steps are: docs/method.md.)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.score import Score
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.halving import best_of
from blockpruner.engine.search.lazy import Lazy
from blockpruner.engine.search.oracle import Found, Oracle, Round, Step
from blockpruner.engine.search.refine import exchanged, removed_blocks
from blockpruner.engine.search.space import SearchSpace

MOST_SWAPS = 3
NUM_TRIES = 50
"""Mutations that are tried for one offspring that was not seen before."""


@dataclass
class Evolution:
    space: SearchSpace
    generations: int
    offspring: int
    """Masks of one generation."""
    seed: int
    num_done: int = field(default=0, init=False)
    """Generations that this run of it has been through."""

    def __post_init__(self) -> None:
        for option, value in (("--generations", self.generations), ("--offspring", self.offspring)):
            if value < 1:
                raise UserError(f"expected {option} of at least 1, got {value}.")

    def run(self, oracle: Oracle) -> Found:
        draw = random.Random(self.seed)
        self.num_done = 0
        start, parent = self._start(oracle)
        seen = {parent.mask}
        for generation in range(1, self.generations + 1):
            offspring = self._offspring(parent.mask, draw, seen)
            if not offspring:
                break
            seen.update(offspring)
            best = best_of(oracle, offspring, max(1, self.offspring // 16), generation)
            if best and best[0].value < parent.value:
                parent = best[0]
            self.num_done = generation
            oracle.judged(Round(name=f"generation {generation}", best=parent, masks=offspring, scores=best))
        return exchanged(start, parent, self.space)

    def flops_left(self, mask: Mask, num_tokens: int) -> float:
        forward = self.space.shape.forward_flops(Mask(), num_tokens)
        generations = (self.generations - self.num_done) * self.offspring * forward / 4
        return generations if self.num_done else 2 * Lazy(self.space).flops_left(mask, num_tokens) + generations

    def _start(self, oracle: Oracle) -> tuple[Found, Score]:
        """Where the best of some greedy searches ends."""
        spaces = {"greedy": self.space}
        if len({self.space.size(block) for block in self.space.blocks.candidates(self.space.shape.num_layers)}) > 1:
            spaces["greedy per parameter"] = replace(self.space, per_params=True)
        is_free = (self.space.max_mha, self.space.max_mlp) == (None, None)
        num_blocks = self.space.budget.num_remove
        if self.space.blocks is Granularity.MIX and is_free and (num_blocks is None or num_blocks % 2 == 0):
            budget = self.space.budget if num_blocks is None else Budget(num_remove=num_blocks // 2)
            with suppress(UserError):  # whole layers may not reach the target
                spaces["greedy by layers"] = replace(self.space, blocks=Granularity.LAYER, budget=budget)
        ends: list[tuple[Found, Score]] = []
        failures: list[SearchFailed] = []
        for name, space in spaces.items():
            try:
                found = Lazy(space).run(_AsRounds(oracle, name))
            except SearchFailed as error:
                failures.append(error)
            else:
                assert found.scores[-1] is not None
                ends.append((found, found.scores[-1]))
        if not ends:
            raise failures[0]
        return min(ends, key=lambda pair: pair[1].value)

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


class _AsRounds:
    """An oracle to which the steps of a search are rounds of a larger one."""

    def __init__(self, oracle: Oracle, name: str) -> None:
        self._oracle = oracle
        self._name = name
        self._number = 0

    @property
    def dense(self) -> Score:
        return self._oracle.dense

    @property
    def groups(self) -> Sequence[range]:
        return self._oracle.groups

    def score(self, masks: Sequence[Mask], groups: Sequence[range] | None = None) -> list[Score]:
        return self._oracle.score(masks, groups)

    def removed(self, step: Step) -> None:
        self._number += 1
        masks = [candidate.mask for candidate in step.candidates]
        name = f"{self._name}, step {self._number}"
        num_scored = len(step.scores) + len(step.estimates)
        self._oracle.judged(Round(name=name, best=step.score, masks=masks, scores=step.scores, num_scored=num_scored))

    def judged(self, judged: Round) -> None:
        self._oracle.judged(judged)
