"""Tries the other methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockpruner.engine.compensation.method import Method
from blockpruner.engine.compensation.methods.both import Both
from blockpruner.engine.compensation.methods.fold import Fold

if TYPE_CHECKING:
    from torch import Tensor

    from blockpruner.engine.compensation.least_squares import Sums


class Auto(Method):
    name = "auto"
    about = "the one of the others that does best on calibration windows that the fit does not see"
    needs_dense = needs_own = True

    @property
    def candidates(self) -> tuple[Method, ...]:
        return Fold(), Both()

    def change(self, dense: Sums | None, own: Sums | None, *, ridge: float, num_free: int) -> Tensor:
        raise AssertionError("one of the candidates fits")
