"""The options of a fit."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from blockpruner.engine.compensation.method import Method
from blockpruner.engine.compensation.methods.auto import Auto
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
