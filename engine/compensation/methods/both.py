"""Each kept block leads the pruned model's stream back to the dense model's, and the dense stream past the gap.

The two texts of a fit count the same: the pruned stream, which has the errors of the blocks before, and the dense one,
which has none. The second keeps the fit from following the errors of a few tokens: it needs fewer of them than `refit`,
and knows the errors before it, unlike `fold`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockpruner.engine.compensation.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from blockpruner.engine.compensation.least_squares import Sums


class Both(Method):
    name = "both"
    about = "refit and fold at once: one fit on both streams"
    needs_dense = True
    needs_own = True

    def change(self, dense: Sums | None, own: Sums | None, *, ridge: float, num_free: int) -> Tensor:
        from blockpruner.engine.compensation.least_squares import solve

        assert dense is not None
        assert own is not None
        return solve((dense + own) * 0.5, ridge, num_free)
