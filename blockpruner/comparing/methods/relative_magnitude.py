"""Relative magnitude: a baseline of BlockPruner's paper, and its ablations (section 5.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockpruner.comparing.ranked_by_influence import RankedByInfluence
from blockpruner.engine.blocks import Block, Granularity

if TYPE_CHECKING:
    from blockpruner.engine.methods.block_influence import Influence


class _RelativeMagnitude(RankedByInfluence):
    statistic = "relative magnitude"

    def values(self, found: Influence) -> dict[Block, float]:
        return found.relative_magnitude


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
