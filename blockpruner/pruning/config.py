"""The options of pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from blockpruner.engine.errors import UserError
from blockpruner.engine.sections import Dtype, Model


class PruneConfig(Model):
    run: Path | None = None
    """Run directory of a search."""
    sequence: Path | None = None
    """File with a removal order in the official format, instead of a run."""
    num_remove: int | None = Field(default=None, ge=1)
    """Remove only the first N blocks. Default: all blocks in the run or the file."""
    dtype: Dtype = Dtype.AUTO
    """Data type of the checkpoint. auto: that in which the model is stored; for a GGUF, that of the search."""
    text_only: bool = False
    """Write the text decoder of a multimodal model alone. Default: the whole model, without blocks in the decoder."""

    compensate: bool = False
    """Also compensate, as `blockpruner compensate` does by default, on the calibration text of the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.run is None) == (self.sequence is None):
            raise UserError("expected one of `run` (a run directory) and `sequence` (a file in the official format).")
        return self
