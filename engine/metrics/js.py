"""Jensen-Shannon divergence from the dense model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockpruner.engine.metrics.metric import Metric

if TYPE_CHECKING:
    from torch import Tensor


class Js(Metric):
    name = "js"
    about = "Jensen-Shannon divergence between the next-token distributions and the dense model's (FinerCut)"
    label = "JS divergence"
    key = "js"

    def token_losses(self, logits: Tensor, targets: Tensor, dense: Tensor | None) -> Tensor:
        from blockpruner.engine.losses import token_js

        assert dense is not None
        return token_js(logits, dense)
