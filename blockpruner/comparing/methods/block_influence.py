"""Block influence: ShortGPT (arXiv 2403.03853), and the ablations of BlockPruner's paper (section 5.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockpruner.comparing.ranked_by_influence import RankedByInfluence
from blockpruner.engine.blocks import Block, Granularity

if TYPE_CHECKING:
    from blockpruner.engine.methods.block_influence import Influence


class _BlockInfluence(RankedByInfluence):
    statistic = "block influence"

    def values(self, found: Influence) -> dict[Block, float]:
        return found.block_influence


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
