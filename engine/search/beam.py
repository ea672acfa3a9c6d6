"""Beam search: of all masks with one more block absent than the best ones so far, the best ones stay."""

from __future__ import annotations

from dataclasses import dataclass

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.score import Score
from blockpruner.engine.search.halving import best_of
from blockpruner.engine.search.oracle import Found, Oracle, Round
from blockpruner.engine.search.space import SearchSpace

DEFAULT_WIDTH = 4


@dataclass(frozen=True)
class _State:
    blocks: tuple[Block, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Beam:
    space: SearchSpace
    width: int | None = None
    """Masks that stay at each level; None: 4, or as many as there are with one block absent."""

    def __post_init__(self) -> None:
        masks = len(self.space.neighbours(Mask()))
        if self.width is not None and not 1 <= self.width <= masks:
            raise UserError(f"expected --width from 1 to {masks} (the masks with one block absent), got {self.width}.")

    @property
    def num_staying(self) -> int:
        return self.width or DEFAULT_WIDTH

    def run(self, oracle: Oracle) -> Found:
        states = {Mask(): _State((), (oracle.dense,))}
        found: _State | None = None
        level = 0
        while states:
            level += 1
            children: dict[Mask, _State] = {}
            for mask, state in states.items():
                for candidate in self.space.candidates(mask):
                    # One mask may have several parents: it descends from the best of them.
                    children.setdefault(candidate.mask, _State((*state.blocks, candidate.block), state.scores))
            best = best_of(oracle, list(children), self.num_staying, level)
            if not best and found is None:
                raise SearchFailed(f"level {level}: all {len(children)} masks have a NaN or infinite loss.")
            best = [score for score in best if score.value <= self.space.max_value]
            if not best:
                break
            oracle.judged(Round(name=f"level {level}", best=best[0], masks=list(children), scores=best))
            grown = {
                score.mask: _State(children[score.mask].blocks, (*children[score.mask].scores, score)) for score in best
            }
            for mask, state in grown.items():
                if self.space.is_met(mask) and (found is None or state.scores[-1].value < found.scores[-1].value):
                    found = state
            states = {mask: state for mask, state in grown.items() if not self.space.is_met(mask)}
        if found is None:  # --max-perplexity ended it: the best of the last level
            found = next(iter(states.values()))
        return Found(found.blocks, found.scores[1:])

    def flops_left(self, mask: Mask, num_tokens: int) -> float:
        # A quarter of the windows for all masks, and as much again for those that stay.
        return self.space.greedy_flops_left(mask, num_tokens) * self.num_staying * 0.5
