"""Relative magnitude: a baseline of BlockPruner's paper, and its ablations (section 5.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockpruner.comparing.ranked import Ranked
from blockpruner.engine.blocks import Granularity, Mask

if TYPE_CHECKING:
    from torch import Tensor

    from blockpruner.engine.methods.ranking import Measured
    from blockpruner.engine.model.decoder import Decoder


class _RelativeMagnitude(Ranked):
    statistic = "relative magnitude"

    def measure(self, decoder: Decoder, windows: Tensor, mask: Mask, on_window: Callable[[], None]) -> Measured:
        from blockpruner.engine.methods.block_influence import measure_influence
        from blockpruner.engine.methods.ranking import Measured

        layers_only = self.blocks is Granularity.LAYER
        found = measure_influence(decoder, windows, on_window, mask=mask, layers_only=layers_only)
        return Measured(found.relative_magnitude, found.work_flops)


class LayersByMagnitude(_RelativeMagnitude):
    name = "rm"
    about = "whole layers by relative magnitude, measured once"
    blocks = Granularity.LAYER


class BlocksByMagnitude(_RelativeMagnitude):
    name = "rm-blocks"
    about = "MHA and MLP blocks by relative magnitude, measured once"
    blocks = Granularity.MIX


class BlocksByMagnitudeAgain(_RelativeMagnitude):
    name = "rm-blocks-again"
    about = "like rm-blocks, but measured again after each removal"
    blocks = Granularity.MIX
    again = True
