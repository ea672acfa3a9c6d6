"""Perplexity of a model on a test text, as the paper measures it: windows of 2,048 tokens, batch 1."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from engine.reference import plain_window_sum
from engine.score import perplexity


@dataclass(frozen=True)
class Perplexity:
    value: float
    stderr: float | None
    """Standard error over windows (delta method); None for a single window."""
    num_windows: int


def evaluate_perplexity(
    model: PreTrainedModel, windows: Tensor, on_window: Callable[[], None] = lambda: None
) -> Perplexity:
    """windows: token ids [num_windows, seq_len]. exp of the mean over windows of the mean token NLL."""
    nlls = []
    for window in windows.to(model.device):
        nlls.append(plain_window_sum(model, window) / (len(window) - 1))
        on_window()
    value = perplexity(math.fsum(nlls) / len(nlls))
    stderr = value * statistics.stdev(nlls) / math.sqrt(len(nlls)) if len(nlls) > 1 else None
    return Perplexity(value, stderr, len(nlls))
