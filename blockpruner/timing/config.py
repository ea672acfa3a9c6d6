"""The options of a speed measurement."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.sections import Model, Precision


class LatencyConfig(Precision, Workload, Model):
    repeats: int = Field(default=20, ge=1)
    """Number of measured generations, after one warm-up."""
    dense: str | None = Field(default=None, examples=["MODEL"])
    """Dense model to compare a pruned checkpoint with. Default: the model recorded in the checkpoint."""
    no_dense: bool = False
    """Measure a pruned checkpoint without its dense model."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads. Default: all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dense is not None and self.no_dense:
            raise UserError("expected either `dense` or `no_dense`, and not both.")
        return self
