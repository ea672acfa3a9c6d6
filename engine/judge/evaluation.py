"""Perplexity of a model on a test text, measured as in the paper: windows of 2,048 tokens, batch 1."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.engine.score import perplexity
from blockpruner.engine.scoring.reference import plain_window_sum


def mean_nll(model: PreTrainedModel, window: Tensor) -> float:
    """Mean token NLL of a window of token ids [seq_len], in nats. The first token is only context."""
    return plain_window_sum(model, window.to(model.device)) / (len(window) - 1)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean over windows of the mean token NLL."""

    value: float
    """NaN if the loss of a window is not finite."""
    stderr: float | None
    """Standard error over windows (delta method); None for a single window."""
    num_windows: int

    @classmethod
    def of(cls, nlls: Sequence[float]) -> Perplexity:
        """nlls: mean token NLL of each window, in nats."""
        if not all(map(math.isfinite, nlls)):
            return cls(math.nan, None, len(nlls))
        value = perplexity(math.fsum(nlls) / len(nlls))
        stderr = value * statistics.stdev(nlls) / math.sqrt(len(nlls)) if len(nlls) > 1 else None
        return cls(value, stderr, len(nlls))


def evaluate_perplexity(
    model: PreTrainedModel, windows: Tensor, on_window: Callable[[], None] = lambda: None
) -> Perplexity:
    """Measure the perplexity. windows: token ids [num_windows, seq_len]. `on_window` is called after each window."""
    nlls = []
    for window in windows:
        nlls.append(mean_nll(model, window))
        on_window()
    return Perplexity.of(nlls)
