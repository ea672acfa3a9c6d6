"""Kullback-Leibler divergence from the dense model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockpruner.engine.metrics.metric import Metric

if TYPE_CHECKING:
    from torch import Tensor


class Kl(Metric):
    name = "kl"
    about = "Kullback-Leibler divergence of the next-token distributions from the dense model's"
    label = "KL divergence"
    key = "kl"

    def token_losses(self, logits: Tensor, targets: Tensor, dense: Tensor | None) -> Tensor:
        from blockpruner.engine.losses import token_kl

        assert dense is not None
        return token_kl(logits, dense)
