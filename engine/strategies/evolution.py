"""Evolutionary search over whole masks, after EvoPress (arXiv 2410.14649). One parent has offspring that swap some
removed blocks for kept ones, and selection runs in stages on growing numbers of windows.

It differs from EvoPress in two ways. The numbers of removed attention and MLP blocks need not be equal. The first
parent is not the best of random masks, but the best result of three greedy searches: per block, per parameter, and by
whole layers. (On SmolLM2 the search per block takes the best single steps, but does not always end with the best mask:
docs/results/better_masks.md.) Where blocks go in groups, a swap gives back the group of a block that went last, or the
whole block, and takes what goes next of others.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from pydantic import Field

from blockpruner.engine.blocks import Block, Granularity, Mask, Units
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.score import Score
from blockpruner.engine.search.budget import Budget, Per
from blockpruner.engine.search.halving import best_of
from blockpruner.engine.search.oracle import Candidate, Found, Oracle, Round, Step
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.search.strategy import Strategy
from blockpruner.engine.strategies.lazy import Lazy

MOST_SWAPS = 3
NUM_TRIES = 50
"""Maximum number of mutations to try for one new offspring."""


class Evolution(Strategy):
    name = "evolution"
    about = "searches longer for a better mask: whole masks are mutated and selected (after EvoPress)"
    heeds = frozenset({"units"})

    generations: int = Field(default=50, ge=1)
    """Number of rounds of mutation and selection."""
    offspring: int = Field(default=32, ge=1)
    """Number of masks in one generation."""

    def run(self, space: SearchSpace, oracle: Oracle, *, seed: int = 0) -> Found:
        draw = random.Random(seed)
        start, parent = _start(space, oracle)
        seen = {parent.mask}
        for generation in range(1, self.generations + 1):
            offspring = self._offspring(space, parent.mask, draw, seen)
            if not offspring:
                break
            seen.update(offspring)
            best = best_of(oracle, offspring, max(1, self.offspring // 16), generation)
            if best and best[0].value < parent.value:
                parent = best[0]
            oracle.judged(
                Round(
                    name=f"generation {generation}",
                    best=parent,
                    masks=offspring,
                    scores=best,
                    num_left=self.generations - generation,
                )
            )
        return _in_order(start, parent, space)

    def flops_left(self, space: SearchSpace, mask: Mask, num_tokens: int, rounds_left: int | None = None) -> float:
        number = self.generations if rounds_left is None else rounds_left
        generations = number * self.offspring * space.shape.forward_flops(Mask(), num_tokens) / 4
        return generations + (2 * Lazy().flops_left(space, mask, num_tokens) if rounds_left is None else 0.0)

    def _offspring(self, space: SearchSpace, parent: Mask, draw: random.Random, seen: set[Mask]) -> list[Mask]:
        masks: list[Mask] = []
        for _ in range(self.offspring):
            for _ in range(NUM_TRIES):
                mask = mutate(space, parent, draw)
                if mask is not None and mask not in seen and mask not in masks:
                    masks.append(mask)
                    break
        return masks


def _start(space: SearchSpace, oracle: Oracle) -> tuple[Found, Score]:
    """Run up to three greedy searches and return the best result."""
    spaces = {"greedy": space}
    if len({space.size(block) for block in space.all_blocks}) > 1:
        spaces["greedy per parameter"] = replace(space, per=Per.PARAMS)
    is_free = (space.max_mha, space.max_mlp) == (None, None)
    budget = _in_layers(space)
    if space.blocks is Granularity.MIX and is_free and budget is not None:
        with suppress(UserError):  # whole layers may not reach the target
            spaces["greedy by layers"] = replace(space, blocks=Granularity.LAYER, units=Units.BLOCKS, budget=budget)
    ends: list[tuple[Found, Score]] = []
    failures: list[SearchFailed] = []
    for name, one in spaces.items():
        try:
            found = Lazy().run(one, _AsRounds(oracle, name))
        except SearchFailed as error:
            failures.append(error)
        else:
            assert found.scores[-1] is not None
            ends.append((found, found.scores[-1]))
    if not ends:
        raise failures[0]
    return min(ends, key=lambda pair: pair[1].value)


def _in_layers(space: SearchSpace) -> Budget | None:
    """Return the budget of a search for whole layers that removes as much; None if there is none."""
    if space.shape.missing:
        return None
    if space.budget.num_remove is None:
        return space.budget
    removals = {space.num_removed(Mask.of([layer])) for layer in space.shape.candidates(Granularity.LAYER)}
    in_one = removals.pop() if len(removals) == 1 else 0
    is_whole = in_one and space.budget.num_remove % in_one == 0
    return Budget(num_remove=space.budget.num_remove // in_one) if is_whole else None


def mutate(space: SearchSpace, parent: Mask, draw: random.Random) -> Mask | None:
    """Swap some blocks or groups at random, then remove or restore some until the budget is met with none to spare."""
    mask = parent
    for _ in range(min(draw.randint(1, MOST_SWAPS), draw.randint(1, MOST_SWAPS))):
        back = draw.choice([*space.returns(mask), *_whole_returns(space, mask)])
        choices = [each for each in space.neighbours(back.mask) if each.block.whole != back.block.whole]
        if not choices:
            return None
        mask = draw.choice(choices).mask
    while not space.is_met(mask):
        choices = space.neighbours(mask)
        if not choices:
            return None
        mask = draw.choice(choices).mask
    while returns := [each.mask for each in space.returns(mask) if space.is_met(each.mask)]:
        mask = draw.choice(returns)
    return mask


def _whole_returns(space: SearchSpace, mask: Mask) -> list[Candidate]:
    """All masks with a block given back of which more than one group has gone."""
    number = Counter(unit.whole for unit in space.removed(mask))
    return [
        Candidate(block, Mask(frozenset(one for one in mask.absent if one.whole != block)))
        for block in number
        if number[block] > 1
    ]


class _AsRounds:
    """An oracle for an inner search: it reports the steps of that search as rounds of the outer one."""

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

    def removed(self, step: Step) -> Score:
        self._number += 1
        masks = [candidate.mask for candidate in step.candidates]
        name = f"{self._name}, step {self._number}"
        num_scored = len(step.scores) + len(step.estimates)
        self._oracle.judged(Round(name=name, best=step.score, masks=masks, scores=step.scores, num_scored=num_scored))
        return step.score

    def judged(self, judged: Round) -> None:
        self._oracle.judged(judged)


def _in_order(found: Found, best: Score, space: SearchSpace) -> Found:
    """Put the removals of `best` in order: first those shared with `found`, in its order, then the others.

    Scores of `found` are kept for the common start of the two orders.
    """
    absent = space.removed(best.mask)
    mask, parts = Mask(), list[Block]()
    for removed in found.blocks:  # layers, perhaps, where blocks or groups are removed
        mask = mask.without(removed)
        parts += [block for block in space.removed(mask) if block not in parts]
    blocks = [block for block in parts if block in absent]
    blocks += [block for block in absent if block not in blocks]
    agreed = next(
        (number for number, (old, new) in enumerate(zip(found.blocks, blocks, strict=False)) if old != new),
        min(len(blocks), len(found.blocks)),
    )
    scores = [*found.scores[:agreed], *[None] * (len(blocks) - agreed)]
    return Found(tuple(blocks), (*scores[:-1], best))
