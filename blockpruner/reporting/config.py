"""The options of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import model_validator

from blockpruner.engine.errors import UserError
from blockpruner.engine.options import Options


class ReportConfig(Options):
    runs: tuple[Path, ...]
    """Run directories of searches on the same model."""
    out: Path | None = None
    """Folder for the figures and the page. Default: the run directory."""
    influence: bool = False
    """First measure the block influence of every block and layer with one pass over the calibration text, and store it
    in RUN/influence.json."""
    evaluation: tuple[Path, ...] = ()
    """Output file of `evaluate --json` to show as a table. May be repeated."""
    latency: tuple[Path, ...] = ()
    """Output file of `latency --json` to show as a table. May be repeated."""
    trust_remote_code: bool = False
    """Allow code that comes with the model to run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({run.resolve() for run in self.runs}) < len(self.runs):
            raise UserError("expected each run once, got one of them twice.")
        if self.out is None and len(self.runs) > 1:
            raise UserError(f"expected `out`, a folder for the figures of {len(self.runs)} runs together.")
        return self
