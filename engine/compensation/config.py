"""The options of a fit."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from blockpruner.engine.compensation.method import Method
from blockpruner.engine.compensation.methods.auto import Auto
from blockpruner.engine.errors import UserError
from blockpruner.engine.options import Options

RIDGES = (0.03, 0.1, 0.3)
"""Ridges that are tried unless one is given."""


class Fit(Options):
    """Fit"""

    method: Method = Auto()
    """How to fit the output projections of the blocks that remain."""
    ridge: Annotated[float | None, BeforeValidator(lambda value: None if value == "auto" else value)] = Field(
        default=None, ge=0, le=1e6, examples=["auto|R"]
    )
    """Strength of the ridge, as a multiple of the mean squared input of a projection. auto: the one that does best on
    calibration windows that the fit does not see."""


class InSearch(Options):
    """Compensation in the search"""

    compensate: bool = False
    """Refit the blocks that remain before the search goes on, so that later choices know what they make up for."""
    compensate_every: int = Field(default=1, ge=1)
    """With compensate: Refit after every N removals."""
    compensate_windows: int | None = Field(default=None, ge=1)
    """With compensate: Fit on the last N calibration windows, which then are not scored. Default: half of them."""

    @model_validator(mode="after")
    def _check_compensate(self) -> Self:
        for name in ("compensate_every", "compensate_windows"):
            if not self.compensate and getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(f"expected `{name}` with `compensate`, got it without.")
        return self

    def num_fitted(self, num_windows: int) -> int:
        """Return on how many of the windows to refit; 0 without `compensate`. Raises UserError if too few are left."""
        if not self.compensate:
            return 0
        number = num_windows // 2 if self.compensate_windows is None else self.compensate_windows
        if not 1 <= number < num_windows:
            raise UserError(
                f"expected fewer than the {num_windows} calibration windows for `compensate_windows`, and at least one "
                f"to score, got {number}; raise `num_samples` or lower `seq_len`."
            )
        return number


IN_SEARCH_RIDGE = 0.1
"""Ridge of the fits of a search. It was the best one, or as good, in all fits on SmolLM2 of a few thousand tokens."""
