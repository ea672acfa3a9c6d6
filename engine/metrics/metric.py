"""What a mask is scored by."""

from __future__ import annotations

from enum import StrEnum


class Metric(StrEnum):
    PPL = "ppl"
    """Perplexity of the calibration text (BlockPruner); its losses are NLLs."""
    KL = "kl"
    """Kullback-Leibler divergence of the pruned model's next-token distributions from the dense model's."""
    JS = "js"
    """Jensen-Shannon divergence between them (FinerCut)."""

    @property
    def needs_dense(self) -> bool:
        """Whether the dense model's distributions must be known."""
        return self is not Metric.PPL
