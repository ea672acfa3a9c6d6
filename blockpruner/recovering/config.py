"""The options of a recovery."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from blockpruner.engine.recovery.config import RecoveryConfig
from blockpruner.engine.sections import Precision


class RecoverConfig(Precision, RecoveryConfig):
    folder: Path
    """Checkpoint written by prune."""
    data: str = "alpaca"
    """Training data: alpaca, wikitext2, builtin or a file, as for search."""
    text_column: str = "text"
    """Column that contains the text in a .jsonl, .json or .parquet file."""
    num_rows: int = Field(default=8000, ge=1)
    """Number of rows to draw from the data for training. The other rows are held out."""
    perplexity: tuple[str, ...] = ()
    """Text to measure the recovery on: rest (the held-out rows), wikitext2 (its test split), builtin or a file. May be
    repeated."""
    num_windows: int | None = Field(default=None, ge=1)
    """Use only the first N windows of `perplexity`."""
    gpus: int = Field(default=1, ge=1)
    """Number of GPUs of this machine to use. Each holds a copy of the model."""
    trust_remote_code: bool = False
    """Allow code that comes with the model to run."""
