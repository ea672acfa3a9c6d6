"""Blocks and masks: values that can be printed, parsed, compared and hashed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from blockpruner.engine.errors import UserError


class Kind(StrEnum):
    MHA = "mha"
    MLP = "mlp"
    LAYER = "layer"
    """Both blocks of one decoder layer, removed together."""


NUM_GROUPS = 4
"""Number of groups into which the channels of an MLP are cut, if groups of channels are units."""


@dataclass(frozen=True, slots=True)
class Block:
    """One MHA or MLP block of one decoder layer with its norm, both blocks in a layer-level search, or one group of the
    channels of an MLP."""

    kind: Kind
    layer: int
    part: int | None = None
    """Number of a group of an MLP's channels, from 2 to NUM_GROUPS; None for a whole block. Group 1 has the most
    important channels. Groups go from the last to the first, and with the first one the block itself goes."""

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}" + ("" if self.part is None else f"/{self.part}")

    @classmethod
    def parse(cls, text: str) -> Block:
        """Return the block whose `str(block)` is `text`, e.g. `mha.5`, or `mlp.7/4` for a group of channels."""
        kind, _, rest = text.partition(".")
        layer, slash, part = rest.partition("/")
        is_group = kind == Kind.MLP and part in map(str, range(2, NUM_GROUPS + 1))
        if kind not in list(Kind) or not layer.isdecimal() or (slash and not is_group):
            raise UserError(
                f"expected a block such as mha.5, mlp.12 or layer.3, or a group of channels from mlp.12/{NUM_GROUPS} "
                f"down to mlp.12/2, got {text!r}."
            )
        return cls(Kind(kind), int(layer), int(part) if slash else None)

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Block:
        """Return the block whose `to_json()` is `values`, e.g. ["mha", 5], or ["mlp", 7, 4] for a group of channels."""
        kind, layer, *part = values
        return cls(Kind(kind), layer, *part)

    def to_json(self) -> list[str | int]:
        whole: list[str | int] = [str(self.kind), self.layer]
        return whole if self.part is None else [*whole, self.part]

    @property
    def whole(self) -> Block:
        """The block that a group of channels belongs to; a whole block itself."""
        return self if self.part is None else Block(self.kind, self.layer)

    @property
    def parts(self) -> tuple[Block, ...]:
        """The MHA and MLP blocks that this block consists of."""
        if self.kind is Kind.LAYER:
            return Block(Kind.MHA, self.layer), Block(Kind.MLP, self.layer)
        return (self,)

    @property
    def depth(self) -> tuple[int, bool, int]:
        """Sort key for the order in which the stream passes the blocks: mha.0, mlp.0, mha.1, ... The groups of an MLP
        stand in the order in which they go."""
        return self.layer, self.kind is Kind.MLP, -(self.part or 0)


@dataclass(frozen=True, slots=True)
class Mask:
    """The set of blocks that are absent. The empty mask is the dense model.

    Of an MLP it holds the block itself, or those of its groups of channels that are absent, never both.
    """

    absent: frozenset[Block] = frozenset()

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> Mask:
        """Return the mask without these blocks, layers and groups of channels, in any order.

        Raises UserError if groups of an MLP are absent that are not its last ones.
        """
        mask = cls(_largest(part for block in blocks for part in block.parts))
        for block in mask.absent:
            if block.part is not None and block.part <= mask.num_groups(block.layer):
                raise UserError(
                    f"expected the groups of channels of {block.whole} to go from the last to the first, got {block} "
                    f"without {Block(block.kind, block.layer, block.part + 1)}."
                )
        return mask

    def without(self, block: Block) -> Mask:
        """Return this mask with one more block, layer or group of channels absent."""
        if block.part is None and all(one.part is None for one in self.absent):
            return Mask(self.absent.union(block.parts))
        return Mask(_largest([*self.absent, *block.parts]))

    def can_lose(self, block: Block) -> bool:
        """Whether a block, all of a layer, or a group of channels is there and may go next."""
        if self.absent.intersection(part.whole for part in block.parts):
            return False
        return block.part is None or block.part == self.num_groups(block.layer)

    def keeping(self, block: Block) -> Mask:
        """Return this mask with a block (or layer) restored."""
        return Mask(self.absent.difference(block.parts))

    def keeps(self, kind: Kind, layer: int) -> bool:
        return Block(kind, layer) not in self.absent

    def num_groups(self, layer: int) -> int:
        """Return how many groups of its channels the MLP of a layer keeps: NUM_GROUPS, fewer, or 0 if it is absent."""
        if Block(Kind.MLP, layer) in self.absent:
            return 0
        return NUM_GROUPS - sum(Block(Kind.MLP, layer, part) in self.absent for part in range(2, NUM_GROUPS + 1))

    @property
    def narrowed(self) -> frozenset[int]:
        """Layers whose MLP lacks some, but not all, of its channels."""
        return frozenset(block.layer for block in self.absent if block.part is not None)

    def __str__(self) -> str:
        return "+".join(str(block) for block in sorted(self.absent, key=lambda b: b.depth)) or "dense"

    @classmethod
    def parse(cls, text: str) -> Mask:
        """Return the mask whose `str(mask)` is `text`, e.g. `mha.3+mlp.7`."""
        return cls() if text == "dense" else cls.of(Block.parse(part) for part in text.split("+"))


def are_removals(blocks: Iterable[Block]) -> bool:
    """Whether blocks can go one after the other: none twice, and groups of channels from the last to the first."""
    mask = Mask()
    for block in blocks:
        if not mask.can_lose(block):
            return False
        mask = mask.without(block)
    return True


def _largest(blocks: Iterable[Block]) -> frozenset[Block]:
    """Leave out groups of channels of blocks that are there themselves."""
    found = frozenset(blocks)
    return frozenset(block for block in found if block.part is None or block.whole not in found)


class Mixers(StrEnum):
    """Which token mixers a search may remove."""

    ALL = "all"
    ATTENTION = "attention"
    """Only those with a KV cache, which grows with the text."""


class Units(StrEnum):
    """What a search removes in one step."""

    BLOCKS = "blocks"
    CHANNELS = "channels"
    """Of an MLP, a group of its channels."""


class Granularity(StrEnum):
    """Which blocks a search may remove (paper section 5.2: both kinds, one kind, whole layers)."""

    MIX = "mix"
    MHA = "mha"
    MLP = "mlp"
    LAYER = "layer"

    def candidates(self, num_layers: int) -> list[Block]:
        """Return all blocks that can be removed, in the official order: all MHA blocks by layer, then all MLP
        blocks."""
        kinds = (Kind.MHA, Kind.MLP) if self is Granularity.MIX else (Kind(self.value),)
        return [Block(kind, layer) for kind in kinds for layer in range(num_layers)]
