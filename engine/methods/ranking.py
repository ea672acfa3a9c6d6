"""Rank blocks or layers by how little they change the stream: one pass over the text instead of a search.

- ShortGPT (arXiv 2403.03853): whole layers by block influence, one pass.
- Relative Magnitude (arXiv 2406.10594, baseline): whole layers by relative magnitude, one pass.
- The ablations of arXiv 2406.10594, section 5.3: single MHA and MLP blocks by either statistic, with one pass in total
  or one pass per removal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.errors import SearchFailed
from blockpruner.engine.search.space import SearchSpace

DENSE = Mask()


@dataclass(frozen=True)
class Measured:
    """A statistic of blocks (or layers). The block with the lowest value is removed first."""

    values: Mapping[Block, float]
    work_flops: int
    """Matmul FLOPs of the measurement."""


@dataclass(frozen=True)
class Removal:
    block: Block
    work_flops: int
    """Matmul FLOPs spent so far."""


def rank(
    space: SearchSpace, statistic: str, measure: Callable[[Mask], Measured], *, again: bool = False
) -> Iterator[Removal]:
    """Yield removals until the budget of `space` is met: lowest value first, ties in the official order.

    statistic: name of the statistic. measure: measures all blocks that a mask keeps. again: measure again after each
    removal instead of once. Raises SearchFailed if too few values are finite (ShortGPT's code replaces NaN by 0.5).
    """
    work_flops = 0

    def in_order(mask: Mask) -> list[Block]:
        nonlocal work_flops
        found = measure(mask)
        work_flops += found.work_flops
        values = found.values
        blocks = [block for block in space.all_blocks if block in values]
        return sorted((block for block in blocks if math.isfinite(values[block])), key=lambda block: values[block])

    mask, order = DENSE, in_order(DENSE)
    while not space.is_met(mask):
        fitting = (block for block in order if not set(block.parts) & mask.absent)
        block = next((b for b in fitting if space.allows(m := mask.without(b)) and space.can_reach(m)), None)
        if block is None:
            raise SearchFailed(f"too few blocks have a finite {statistic} to remove more than {mask}.")
        yield Removal(block, work_flops)
        mask = mask.without(block)
        if again and not space.is_met(mask):
            order = in_order(mask)
