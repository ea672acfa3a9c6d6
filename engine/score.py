"""Scores of masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blockpruner.engine.blocks import Mask


@dataclass(frozen=True)
class Score:
    """The loss of one mask: for each window, the sum over its tokens, in nats."""

    mask: Mask
    window_sums: tuple[float, ...]
    num_targets: int
    """Number of predicted tokens in one window: seq_len - 1."""

    @property
    def value(self) -> float:
        """Mean over windows of the mean token loss. If the loss is the NLL, the paper's perplexity is exp of it. The
        sum is exact, so it does not depend on the order."""
        return math.fsum(self.window_sums) / len(self.window_sums) / self.num_targets


def perplexity(nll: float) -> float:
    """Return exp(nll), as in the official code, or infinity if that overflows."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
