"""What a mask scored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blockpruner.engine.blocks import Mask


@dataclass(frozen=True)
class Score:
    """The loss of one mask: for every window the sum over its tokens, in nats."""

    mask: Mask
    window_sums: tuple[float, ...]
    num_targets: int
    """Tokens of one window that are summed: seq_len - 1, as many as are predicted."""

    @property
    def value(self) -> float:
        """Mean over windows of the mean token loss (BlockPruner's perplexity is exp of it, where the loss is the NLL).
        Summed exactly, so that it depends on no order."""
        return math.fsum(self.window_sums) / len(self.window_sums) / self.num_targets


def perplexity(nll: float) -> float:
    """exp(nll), as in the official code; infinite where that overflows."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
