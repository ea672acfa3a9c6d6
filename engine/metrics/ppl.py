"""Perplexity, the paper's metric."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.score import perplexity

if TYPE_CHECKING:
    from torch import Tensor


class Ppl(Metric):
    name = "ppl"
    about = "perplexity of the calibration text (BlockPruner)"
    label = key = "perplexity"
    needs_dense = False

    def token_losses(self, logits: Tensor, targets: Tensor, dense: Tensor | None) -> Tensor:
        from blockpruner.engine.losses import token_nll

        return token_nll(logits, targets)

    def recorded(self, value: float) -> dict[str, float | None]:
        return {"nll": value, "perplexity": perplexity(value)}


PPL = Ppl()
