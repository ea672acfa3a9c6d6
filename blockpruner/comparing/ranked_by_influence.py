"""Rankings by the influence of blocks on the stream: one measurement gives block influence and relative magnitude."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from blockpruner.comparing.ranked import Ranked
from blockpruner.engine.blocks import Block, Granularity, Mask

if TYPE_CHECKING:
    from torch import Tensor

    from blockpruner.engine.methods.block_influence import Influence
    from blockpruner.engine.methods.ranking import Measured
    from blockpruner.engine.model.decoder import Decoder


class RankedByInfluence(Ranked):
    @abstractmethod
    def values(self, found: Influence) -> dict[Block, float]:
        """Return the statistic that ranks."""

    def measure(self, decoder: Decoder, windows: Tensor, mask: Mask, on_window: Callable[[], None]) -> Measured:
        from blockpruner.engine.methods.block_influence import measure_influence
        from blockpruner.engine.methods.ranking import Measured

        layers_only = self.blocks is Granularity.LAYER
        found = measure_influence(decoder, windows, on_window, mask=mask, layers_only=layers_only)
        return Measured(self.values(found), found.work_flops)
