"""Options for a training. The defaults are those of the paper (appendix H) where it states them."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from blockpruner.engine.options import Options
from blockpruner.engine.recovery.trained.adapters import Adapters
from blockpruner.engine.recovery.what import Trained


class Loss(StrEnum):
    TEXT = "text"
    DISTILL = "distill"


class RecoveryConfig(Options):
    """Training"""

    loss: Loss = Loss.TEXT
    """What to minimise. text: the negative log-likelihood of the rows, as in the paper; distill: the Kullback-Leibler
    divergence of the next-token distributions from those of the dense model, on the same rows."""

    train: Trained = Adapters()
    """What to train."""
    epochs: int = Field(default=1, ge=1)
    """Number of passes over the rows."""
    batch_size: int = Field(default=1, ge=1)
    """Number of rows in one forward. Shorter rows are padded on the right, and padding is not predicted."""
    accumulation: int = Field(default=4, ge=1)
    """Number of forwards per optimizer step, over all GPUs."""
    seq_len: int = Field(default=512, ge=2)
    """Maximum number of tokens in a row; longer rows are cut off. Also the number of tokens in a window of
    `perplexity`."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed for the drawn rows, their order, and the initial weights and dropout of adapters."""
