"""The options of a compensation."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from blockpruner.cluster.options import Placing, Replicas
from blockpruner.engine.compensation.config import Fit
from blockpruner.engine.sections import Calibration, Precision


class CompensateConfig(Replicas, Placing, Precision, Calibration, Fit):
    folder: Path
    """Checkpoint written by prune."""
    dense: str | None = None
    """The dense model. Default: the one that the checkpoint names."""
    perplexity: tuple[str, ...] = ()
    """Text to measure the compensation on: wikitext2 (its test split), builtin, a file or a folder. May be repeated."""
    perplexity_windows: int | None = Field(default=None, ge=1)
    """Use only the first N windows of `perplexity`."""
    trust_remote_code: bool = False
    """Allow code that comes with the model to run."""
