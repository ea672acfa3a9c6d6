"""The options of a measurement of what blocks cost in time."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.sections import Model, Precision


class TimesConfig(Precision, Workload, Model):
    repeats: int = Field(default=5, ge=1)
    """Number of measured generations of each model, after one warm-up."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads. Default: all."""
    run: Path | None = None
    """Also measure the model that the search in this run directory found, beside what the table expects of it."""
