"""What a replica of a compensation holds in host memory, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from blockpruner.engine.compensation.config import RIDGES, Fit
from blockpruner.engine.model.decoder import Decoder


@dataclass(frozen=True)
class FitMemory:
    hidden_size: int
    widest: int
    """Largest input size of a projection."""
    num_streams: int
    """Pruned streams that are led side by side."""

    @classmethod
    def of(cls, decoder: Decoder, fit: Fit) -> FitMemory:
        """decoder: with or without weights."""
        hidden_size = decoder.model.config.hidden_size
        widths = [hidden_size]
        for module in (module for layer in decoder.layers for module in layer.modules()):
            if isinstance(module, nn.Linear) and module.out_features == hidden_size:
                widths.append(module.in_features)
            elif isinstance(module, Conv1D) and module.nf == hidden_size:
                widths.append(module.nx)
        candidates = fit.method.candidates
        is_one = fit.ridge is not None or len(candidates) > 1  # only the first method is fitted with several ridges
        streams = [1 if is_one else len(RIDGES) for method in candidates if method.needs_own]
        return cls(hidden_size, max(widths), max(streams, default=0))

    @property
    def result_bytes(self) -> int:
        """Sums of a stage over one part of the text, in float64: of the dense stream and of each pruned one."""
        return 8 * (1 + self.num_streams) * self.widest * (self.widest + self.hidden_size)

    @property
    def sums_bytes(self) -> int:
        """The sums, with one product beside them."""
        return self.result_bytes * (self.num_streams + 2) // (self.num_streams + 1)

    def stream_bytes(self, num_tokens: int, bytes_per_value: int) -> int:
        """The streams of all windows: that of the dense model twice, and the pruned ones."""
        return num_tokens * self.hidden_size * bytes_per_value * (2 + self.num_streams)
