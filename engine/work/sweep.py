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
    mlp: bool
    mha_lacks: int = 0
    """Groups that the attention lacks."""
    mlp_lacks: int = 0


@dataclass(frozen=True)
class Family:
    """A row that enters a layer, and the rows that leave it. A row that nothing happens to stays in its slot and is no
    child."""

    parent: int
    children: tuple[Child, ...]

    @property
    def attentions(self) -> set[int]:
        """The attention computations, by the groups that they lack: one for all children that keep it and lack as many,
        because they have the same input."""
        return {child.mha_lacks for child in self.children if child.mha}

    @property
    def mlps(self) -> list[int]:
        """The MLP computations, by the groups that they lack: one per child that keeps it, because the inputs
        differ."""
        return [child.mlp_lacks for child in self.children if child.mlp]

    @property
    def num_mha(self) -> int:
        return len(self.attentions)

    @property
    def num_mlp(self) -> int:
        return len(self.mlps)


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
            attentions = Counter(lacks for family in families for lacks in family.attentions)
            mlps = Counter(lacks for family in families for lacks in family.mlps)
            for kind, computed in ((Kind.MHA, attentions), (Kind.MLP, mlps)):
                block = Block(kind, layer)
                total += sum(number * shape.block_flops(block, num_tokens, lacks) for lacks, number in computed.items())
        return total


def plan_sweep(masks: Sequence[Mask], num_layers: int, *, has_rest: bool = False) -> SweepPlan:
    """Plan the forked pass that scores `masks` (at least one). Equal masks are computed once.

    has_rest: layers do something to their stream beside their blocks, so rows without both blocks pass them, too. What
    that costs, if anything, is not counted as work: it is the same for every mask.
    """
    distinct = list(dict.fromkeys(masks))
    lacking = {mask: mask.lacking for mask in distinct}
    rows = {0: distinct}
    num_slots = 1
    layers = []
    for layer in range(num_layers):
        families = []
        for parent, members in list(rows.items()):
            parting: dict[tuple[bool, bool, int, int], list[Mask]] = defaultdict(list)
            for mask in members:
                mha, mlp = (lacking[mask].get(Block(kind, layer), 0) for kind in (Kind.MHA, Kind.MLP))
                parting[mask.keeps(Kind.MHA, layer), mask.keeps(Kind.MLP, layer), mha, mlp].append(mask)
            # Masks that skip both blocks keep the parent's slot and need no copy. If there are none, the first child
            # takes the slot.
            order = sorted(parting, key=lambda path: path[:2] != (False, False))
            children = []
            for index, path in enumerate(order):
                slot = parent if index == 0 else num_slots
                num_slots += index > 0
                rows[slot] = parting[path]
                if has_rest or path[:2] != (False, False):
                    children.append(Child(slot, *path))
            if children:
                families.append(Family(parent, tuple(children)))
        layers.append(tuple(families))
    slot_of_mask = {mask: slot for slot, members in rows.items() for mask in members}
    return SweepPlan(tuple(layers), tuple(slot_of_mask[mask] for mask in masks), num_slots)
