"""Removal orders from how little blocks or layers change the stream: a pass over the text instead of a search.

- ShortGPT (arXiv 2403.03853): whole layers by block influence, one pass.
- Relative Magnitude (arXiv 2406.10594, baseline): whole layers by relative magnitude, one pass.
- The ablations of arXiv 2406.10594, section 5.3: single MHA and MLP blocks by either, one pass or one a removal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from blockpruner.engine.blocks import Block, Granularity, Mask
from blockpruner.engine.errors import SearchFailed
from blockpruner.engine.methods.block_influence import DENSE, measure_influence
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.search.space import SearchSpace


class Statistic(StrEnum):
    BI = "block influence"
    RM = "relative magnitude"


@dataclass(frozen=True)
class Removal:
    block: Block
    work_flops: int
    """Of the matmuls until it was known."""


def rank(
    decoder: Decoder,
    windows: Tensor,
    space: SearchSpace,
    statistic: Statistic,
    *,
    again: bool = False,
    on_window: Callable[[], None] = lambda: None,
) -> Iterator[Removal]:
    """What goes next, until the budget of `space` is met: the lowest first, the official order among equals.

    again: measure anew after each removal; else once. windows: token ids [num_windows, seq_len]. Raises SearchFailed if
    too few values are finite (ShortGPT's code counts NaN as 0.5).
    """

    work_flops = 0

    def measured(mask: Mask) -> list[Block]:
        nonlocal work_flops
        layers_only = space.blocks is Granularity.LAYER
        found = measure_influence(decoder, windows, on_window, mask=mask, layers_only=layers_only)
        work_flops += found.work_flops
        values = found.block_influence if statistic is Statistic.BI else found.relative_magnitude
        blocks = [block for block in space.blocks.candidates(space.shape.num_layers) if block in values]
        return sorted((block for block in blocks if math.isfinite(values[block])), key=lambda block: values[block])

    mask, order = DENSE, measured(DENSE)
    while not space.is_met(mask):
        fitting = (block for block in order if not set(block.parts) & mask.absent)
        block = next((b for b in fitting if space.allows(m := mask.without(b)) and space.can_reach(m)), None)
        if block is None:
            raise SearchFailed(f"too few blocks have a finite {statistic} to remove more than {mask}.")
        yield Removal(block, work_flops)
        mask = mask.without(block)
        if again and not space.is_met(mask):
            order = measured(mask)
