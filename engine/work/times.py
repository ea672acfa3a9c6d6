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


UNIT = {TimeOf.DECODE: "a generated token", TimeOf.PREFILL: "a prompt", TimeOf.BOTH: "a whole generation"}


Widths = tuple[float, ...]
"""What a block costs with 1, 2, ... of its groups, up to all of them. Only one number for a block that goes as a whole,
and 0 where the model has none."""


@dataclass(frozen=True)
class BlockTimes:
    """Milliseconds of a model of L layers, and what goes of them with each block."""

    dense: float
    mha: tuple[Widths, ...]
    """By layer."""
    mlp: tuple[Widths, ...]

    def widths(self, block: Block) -> Widths:
        return (self.mha if block.kind is Kind.MHA else self.mlp)[block.layer]

    def of(self, block: Block) -> float:
        """Return what goes with an MHA block, an MLP block or a group of one."""
        widths = self.widths(block)
        return widths[-1] if block.part is None else widths[block.part - 1] - widths[block.part - 2]

    def without(self, mask: Mask) -> float:
        """Return what the model is expected to take without the mask's blocks."""
        return self.dense - sum(self.of(block) for block in mask.absent)

    def share(self, mask: Mask) -> float:
        """Return the share of the dense model's time that goes with a mask."""
        return 1 - self.without(mask) / self.dense


LEAST = 0.05
"""Share of its even part of a block's time that a group is taken to cost at least. Times are noisy, and on a GPU a
narrower block may be no faster; a group that costs nothing would be worth removing at any price."""


def rising(times: Sequence[float]) -> Widths:
    """Return the times of a block with 1, 2, ... groups so that each group costs something, and all of them what was
    measured."""
    least = LEAST * times[-1] / len(times)
    found = [times[-1]]
    for number in range(len(times) - 1, 0, -1):
        found.insert(0, min(max(times[number - 1], number * least), found[0] - least))
    return tuple(found)
