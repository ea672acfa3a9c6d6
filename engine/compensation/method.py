"""Base class of the methods: which sums they need, and how they turn them into changed weights."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from blockpruner.engine.options import Choice

if TYPE_CHECKING:
    from torch import Tensor

    from blockpruner.engine.compensation.least_squares import Sums
    from blockpruner.engine.compensation.stages import FittedStage


class Method(Choice):
    """Fits the output projections of one stage after the other. Torch is imported only where a method computes."""

    package = "blockpruner.engine.compensation.methods"
    needs_dense: ClassVar[bool]
    """Whether it needs sums over the dense model's stream."""
    needs_own: ClassVar[bool]
    """Whether it needs sums over the stream of the pruned model, with all that was fitted before."""

    @property
    def candidates(self) -> tuple[Method, ...]:
        """The methods to try: this one, unless it chooses among others."""
        return (self,)

    def fits(self, stage: FittedStage) -> bool:
        """Whether it changes a stage."""
        return True

    @abstractmethod
    def change(self, dense: Sums | None, own: Sums | None, *, ridge: float, num_free: int) -> Tensor:
        """Return the change of a stage's weights [H, D], float64.

        The sums are those of the projections' inputs and of what is missing after the stage: the dense model's stream
        at the next kept block, minus the stream as the unchanged weights leave it. ridge, num_free: see `solve`.
        """
