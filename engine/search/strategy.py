"""Base class of search strategies."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from blockpruner.engine.blocks import Mask, OrderedBy
from blockpruner.engine.options import Choice
from blockpruner.engine.search.oracle import Found, Oracle
from blockpruner.engine.search.space import SearchSpace


class Strategy(Choice):
    """A way to search for masks. The fields of a strategy are its options.

    A strategy gets scores only by passing sets of masks to an oracle. It does not know where they come from.
    """

    package = "blockpruner.engine.strategies"
    heeds: ClassVar[frozenset[str]] = frozenset()
    """Optional search options that this strategy supports, out of `units`, `per`, `max_perplexity`, `audit` and
    `compensate`."""
    grows: ClassVar[bool] = False
    """Whether a search with a larger budget starts with the same removals, so that a finished run can be extended."""
    ordered_by: ClassVar[OrderedBy] = OrderedBy.OUTPUT
    """By what channels and heads are ordered where they go in groups."""

    def check(self, space: SearchSpace) -> None:
        """Raise UserError if the options do not fit the space. The default accepts every space."""

    @abstractmethod
    def run(self, space: SearchSpace, oracle: Oracle, *, seed: int = 0) -> Found:
        """Search until the budget of `space` is met.

        Must be deterministic: a search is resumed by running it again with the recorded answers.
        seed: seed for strategies that draw random numbers.
        """

    @abstractmethod
    def flops_left(self, space: SearchSpace, mask: Mask, num_tokens: int, rounds_left: int | None = None) -> float:
        """Approximate FLOPs left after `mask`, for one window of `num_tokens` tokens. Used by the progress bar.

        rounds_left: `Round.num_left` of the last round.
        """
