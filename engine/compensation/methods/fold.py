"""The kept block before a gap absorbs what the gap did to the dense model's stream.

ReplaceMe (lstsq.py) does so for whole layers, by a map of the MLP's output; here all inputs of the projection are used,
and the block before the gap may be an attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockpruner.engine.compensation.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from blockpruner.engine.compensation.least_squares import Sums
    from blockpruner.engine.compensation.stages import FittedStage


class Fold(Method):
    name = "fold"
    about = "the kept block before a gap absorbs it, fitted on the dense model's activations"
    needs_dense = True
    needs_own = False

    def fits(self, stage: FittedStage) -> bool:
        return stage.is_before_gap

    def change(self, dense: Sums | None, own: Sums | None, *, ridge: float, num_free: int) -> Tensor:
        from blockpruner.engine.compensation.least_squares import solve

        assert dense is not None
        return solve(dense, ridge, num_free)
