"""The plan of one forked pass: which rows exist at each layer, which of them compute its blocks, and where they fork.

All masks of a set share one residual stream up to the first block in which they differ. A row is one distinct stream
and occupies one slot of the stream buffer. The plan is plain data, so its FLOPs are known before it runs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.work.shape import ModelShape


@dataclass(frozen=True)
class Child:
    """A row that leaves a layer, with the blocks of the layer that it passed through: at least one, unless the layer
    does something to its stream beside them."""

    slot: int
    mha: bool
    mlp: int
    """Groups of the MLP's channels that it passed through: NUM_GROUPS for the whole MLP, 0 without it."""


@dataclass(frozen=True)
class Family:
    """A row that enters a layer, and the rows that leave it. A row that nothing happens to stays in its slot and is no
    child."""

    parent: int
    children: tuple[Child, ...]

    @property
    def num_mha(self) -> int:
        """Number of attention computations: one for all children that keep it, because they have the same input."""
        return int(any(child.mha for child in self.children))

    @property
    def num_mlp(self) -> int:
        """Number of MLP computations: one per child that keeps it, because the inputs differ."""
        return sum(child.mlp > 0 for child in self.children)


@dataclass(frozen=True)
class SweepPlan:
    layers: tuple[tuple[Family, ...], ...]
    slot_of: tuple[int, ...]
    """For each mask, the slot of its final stream. Equal masks share a slot."""
    num_slots: int

    def flops(self, shape: ModelShape, num_tokens: int) -> int:
        """Matmul FLOPs of the sweep over one window of `num_tokens` tokens."""
        total = self.num_slots * shape.head_flops(num_tokens)
        for layer, families in enumerate(self.layers):
            num_mha = sum(family.num_mha for family in families)
            total += num_mha * shape.block_flops(Block(Kind.MHA, layer), num_tokens)
            widths = Counter(child.mlp for family in families for child in family.children)
            total += sum(number * shape.mlp_flops(layer, width, num_tokens) for width, number in widths.items())
        return total


def plan_sweep(masks: Sequence[Mask], num_layers: int, *, has_rest: bool = False) -> SweepPlan:
    """Plan the forked pass that scores `masks` (at least one). Equal masks are computed once.

    has_rest: layers do something to their stream beside their blocks, so rows without both blocks pass them, too. What
    that costs, if anything, is not counted as work: it is the same for every mask.
    """
    distinct = list(dict.fromkeys(masks))
    rows = {0: distinct}
    num_slots = 1
    layers = []
    for layer in range(num_layers):
        families = []
        for parent, members in list(rows.items()):
            parting: dict[tuple[bool, int], list[Mask]] = defaultdict(list)
            for mask in members:
                parting[mask.keeps(Kind.MHA, layer), mask.num_groups(layer)].append(mask)
            # Masks that skip both blocks keep the parent's slot and need no copy. If there are none, the first child
            # takes the slot.
            order = sorted(parting, key=lambda keeps: keeps != (False, 0))
            children = []
            for index, keeps in enumerate(order):
                slot = parent if index == 0 else num_slots
                num_slots += index > 0
                rows[slot] = parting[keeps]
                if has_rest or keeps != (False, 0):
                    children.append(Child(slot, *keeps))
            if children:
                families.append(Family(parent, tuple(children)))
        layers.append(tuple(families))
    slot_of_mask = {mask: slot for slot, members in rows.items() for mask in members}
    return SweepPlan(tuple(layers), tuple(slot_of_mask[mask] for mask in masks), num_slots)
