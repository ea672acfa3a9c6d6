"""What the blocks of a model cost in time on one device, as plain numbers, for budgets in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from blockpruner.engine.blocks import Block, Kind, Mask


class TimeOf(StrEnum):
    """What is timed."""

    DECODE = "decode"
    """One generated token, of all prompts of the batch."""
    PREFILL = "prefill"
    """The prompt, up to the first new token."""
    BOTH = "both"
    """A whole generation."""


@dataclass(frozen=True)
class BlockTimes:
    """Milliseconds of a model of L layers, and what goes of them with each block."""

    dense: float
    mha: tuple[float, ...]
    """By layer; 0 where the model has no such block."""
    mlp: tuple[tuple[float, ...], ...]
    """By layer: what the MLP costs with 1, 2, ... groups of its channels, up to all of them. Only one number for an MLP
    that goes as a whole."""

    def of(self, block: Block) -> float:
        """Return what goes with an MHA block, an MLP block or a group of channels."""
        if block.kind is Kind.MHA:
            return self.mha[block.layer]
        widths = self.mlp[block.layer]
        return widths[-1] if block.part is None else widths[block.part - 1] - widths[block.part - 2]

    def without(self, mask: Mask) -> float:
        """Return what the model is expected to take without the mask's blocks."""
        return self.dense - sum(self.of(block) for block in mask.absent)

    def share(self, mask: Mask) -> float:
        """Return the share of the dense model's time that goes with a mask."""
        return 1 - self.without(mask) / self.dense


LEAST = 0.01
"""Share of an MLP's time that a group of channels is taken to cost at least. Times are noisy, and on a GPU a narrower
MLP may be no faster; a group that costs nothing would be worth removing at any price."""


def rising(times: Sequence[float]) -> tuple[float, ...]:
    """Return the times of an MLP with 1, 2, ... groups so that each group costs something, and all of them what was
    measured."""
    found = [times[-1]]
    for number in range(len(times) - 2, -1, -1):
        highest = found[0] - LEAST * times[-1]
        lowest = (number + 1) * LEAST * times[-1]
        found.insert(0, min(max(times[number], lowest), highest))
    return tuple(found)
