"""Base class of metrics. Torch is imported only where a metric computes, so that names and help are fast."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from blockpruner.engine.options import Choice

if TYPE_CHECKING:
    from torch import Tensor


class Metric(Choice):
    """A loss per token. A mask's value is the mean over all tokens, in nats; lower is better."""

    package = "blockpruner.engine.metrics"
    label: ClassVar[str]
    """Name of the displayed number."""
    key: ClassVar[str]
    """Key under which the displayed number is recorded."""
    needs_dense: ClassVar[bool] = True
    """Whether the metric needs the dense model's logits."""

    @abstractmethod
    def token_losses(self, logits: Tensor, targets: Tensor, dense: Tensor | None) -> Tensor:
        """Return the losses [...] of tokens with logits [..., vocab] and target ids [...].

        dense: the dense model's logits [..., vocab]; None if the metric does not need them.
        """

    def recorded(self, value: float) -> dict[str, float | None]:
        """Return a mask's value as ledgers and tables record it. Only the NLL has a perplexity."""
        return {"nll": None, "perplexity": None, self.key: value}

    def shown(self, recorded: Mapping[str, object]) -> float | None:
        """Return the displayed number from a record; None if it is not finite or not known."""
        value: Any = recorded.get(self.key)
        return value
