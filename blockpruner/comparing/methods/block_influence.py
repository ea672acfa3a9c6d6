"""Block influence: ShortGPT (arXiv 2403.03853), and the ablations of BlockPruner's paper (section 5.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockpruner.comparing.ranked import Ranked
from blockpruner.engine.blocks import Granularity, Mask

if TYPE_CHECKING:
    from torch import Tensor

    from blockpruner.engine.methods.ranking import Measured
    from blockpruner.engine.model.decoder import Decoder


class _BlockInfluence(Ranked):
    statistic = "block influence"

    def measure(self, decoder: Decoder, windows: Tensor, mask: Mask, on_window: Callable[[], None]) -> Measured:
        from blockpruner.engine.methods.block_influence import measure_influence
        from blockpruner.engine.methods.ranking import Measured

        layers_only = self.blocks is Granularity.LAYER
        found = measure_influence(decoder, windows, on_window, mask=mask, layers_only=layers_only)
        return Measured(found.block_influence, found.work_flops)


class ShortGpt(_BlockInfluence):
    name = "shortgpt"
    about = "whole layers by block influence, measured once (arXiv 2403.03853)"
    blocks = Granularity.LAYER


class BlocksByInfluence(_BlockInfluence):
    name = "bi-blocks"
    about = "MHA and MLP blocks by block influence, measured once"
    blocks = Granularity.MIX


class BlocksByInfluenceAgain(_BlockInfluence):
    name = "bi-blocks-again"
    about = "like bi-blocks, but measured again after each removal"
    blocks = Granularity.MIX
    again = True
