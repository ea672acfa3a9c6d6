"""What a strategy asks and tells: it never knows where scores come from, nor where its results go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.score import Score


@dataclass(frozen=True)
class Candidate:
    """A block that may go next, and the mask that then is in force."""

    block: Block
    mask: Mask


@dataclass(frozen=True)
class Estimate:
    """What is known of a candidate that was dropped before it was scored in full."""

    mask: Mask
    value: float
    """Its loss over all windows, as far as it can be told, in nats."""
    num_windows: int
    """That were scored in this step."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A block is removed."""

    block: Block
    score: Score
    """Of the mask that now is in force, over all windows."""
    candidates: Sequence[Candidate]
    """All that could have gone: the plain loop would have scored each in full."""
    scores: Sequence[Score]
    """Of those that were scored in full."""
    estimates: Sequence[Estimate] = ()
    """Of those that were scored on some windows only."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Masks were judged as wholes: a level of a beam, a generation, an exchange."""

    name: str
    best: Score
    """The best mask so far, over all windows."""
    masks: Sequence[Mask]
    """All that were judged."""
    scores: Sequence[Score]
    """Of those that were scored in full."""
    num_scored: int | None = None
    """How many were scored at all; None: all."""


class Oracle(Protocol):
    """Scores masks, and takes note of what comes of it.

    Asked the same in the same order it answers the same: so a search is resumed by running it again from the start,
    with the answers on record.
    """

    @property
    def dense(self) -> Score:
        """The model as it is."""

    @property
    def groups(self) -> Sequence[range]:
        """The windows, in groups that are scored together."""

    def score(self, masks: Sequence[Mask], groups: Sequence[range] | None = None) -> list[Score]:
        """Scores in the order of the masks, over the windows of some groups (of all, if None) in their order."""

    def removed(self, step: Step) -> None: ...

    def judged(self, judged: Round) -> None: ...


@dataclass(frozen=True)
class Found:
    """What a search ends with."""

    blocks: tuple[Block, ...]
    """In the order in which to remove them."""
    scores: tuple[Score | None, ...]
    """Of the mask after each, over all windows; None where it was not scored. The last one was."""

    @classmethod
    def by(cls, steps: Sequence[Step]) -> Found:
        """Where one removal after the other led."""
        return cls(tuple(step.block for step in steps), tuple(step.score for step in steps))

    @property
    def mask(self) -> Mask:
        return Mask.of(self.blocks)


class Strategy(Protocol):
    def run(self, oracle: Oracle) -> Found: ...

    def flops_left(self, mask: Mask, num_tokens: int) -> float:
        """About the work from `mask` on, on one window of `num_tokens` tokens: only for showing progress."""
