"""The interface between a strategy and its surroundings: a strategy asks an oracle for scores and reports its steps.

A strategy does not know where scores come from or where its results go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.score import Score


@dataclass(frozen=True)
class Candidate:
    """A block that may be removed next, and the mask that results."""

    block: Block
    mask: Mask


@dataclass(frozen=True)
class Estimate:
    """A candidate that was dropped before it was scored on all windows."""

    mask: Mask
    value: float
    """Its estimated loss over all windows, in nats."""
    num_windows: int
    """Number of windows scored in this step."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The removal of one block."""

    block: Block
    score: Score
    """Score of the mask after the removal, over all windows."""
    candidates: Sequence[Candidate]
    """All blocks that could have been removed. The plain loop would have scored each in full."""
    scores: Sequence[Score]
    """Scores of the candidates that were scored in full."""
    estimates: Sequence[Estimate] = ()
    """Estimates for the candidates that were scored on only some windows."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round that compared whole masks, such as a generation of an evolution or a step of the searches before it."""

    name: str
    best: Score
    """The best mask so far, over all windows."""
    masks: Sequence[Mask]
    """All masks that were compared."""
    scores: Sequence[Score]
    """Scores of the masks that were scored in full."""
    num_scored: int | None = None
    """Number of masks that were scored on any windows; None means all."""
    num_left: int | None = None
    """Maximum number of rounds like this one that follow; None if unknown."""


class Oracle(Protocol):
    """Scores masks and records the steps of a search.

    The same questions in the same order get the same answers. A search is therefore resumed by running it again from
    the start with the recorded answers.
    """

    @property
    def dense(self) -> Score:
        """Score of the dense model."""

    @property
    def groups(self) -> Sequence[range]:
        """The windows, in groups that are swept together."""

    def score(self, masks: Sequence[Mask], groups: Sequence[range] | None = None) -> list[Score]:
        """Return scores in the order of the masks, over the windows of `groups` in their order (None: all groups)."""

    def removed(self, step: Step) -> Score:
        """Record a removal. Returns the score of the model with which the search goes on: that of the step, or another
        one if the blocks that remain have been refitted."""

    def judged(self, judged: Round) -> None: ...


@dataclass(frozen=True)
class Found:
    """Result of a search."""

    blocks: tuple[Block, ...]
    """Removed blocks, in the order of removal."""
    scores: tuple[Score | None, ...]
    """Score of the mask after each removal, over all windows; None where it was not scored. The last is never None."""

    @classmethod
    def by(cls, steps: Sequence[Step]) -> Found:
        """Return the result of a search that removed one block per step."""
        return cls(tuple(step.block for step in steps), tuple(step.score for step in steps))

    @property
    def mask(self) -> Mask:
        return Mask.of(self.blocks)
