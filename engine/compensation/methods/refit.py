"""Each kept block, in order of depth, leads the pruned model's stream back to the dense model's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockpruner.engine.compensation.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from blockpruner.engine.compensation.least_squares import Sums


class Refit(Method):
    name = "refit"
    about = "each kept block from the first gap on leads the pruned stream back to the dense one"
    needs_dense = False
    needs_own = True

    def change(self, dense: Sums | None, own: Sums | None, *, ridge: float, num_free: int) -> Tensor:
        from blockpruner.engine.compensation.least_squares import solve

        assert own is not None
        return solve(own, ridge, num_free)
