"""Blocks and masks: values that can be printed, parsed, compared and hashed."""

from __future__ import annotations

from collections import Counter
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
GROUPS = {Kind.MLP: ("group of channels", "groups of channels"), Kind.MHA: ("KV head", "KV heads")}
"""What the groups of a block are, one of them and several."""
MOST_GROUPS = 1024
"""No attention has more KV heads. Larger numbers are damage."""


@dataclass(frozen=True, slots=True)
class Block:
    """One MHA or MLP block of one decoder layer with its norm, both blocks in a layer-level search, or one group of the
    channels of an MLP or of the heads of an attention."""

    kind: Kind
    layer: int
    part: int | None = None
    """Number of a group, at least 2; None for a whole block. The groups of an MLP are NUM_GROUPS groups of its
    channels, those of an attention its KV heads, each with its query heads. Group 1 is the most important. Groups go
    from the last to the first, and with the first one the block itself goes."""

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}" + ("" if self.part is None else f"/{self.part}")

    @classmethod
    def parse(cls, text: str) -> Block:
        """Return the block whose `str(block)` is `text`, e.g. `mha.5`, or `mlp.7/4` for a group of an MLP."""
        kind, _, rest = text.partition(".")
        layer, slash, part = rest.partition("/")
        is_group = part.isdecimal() and is_part(kind, int(part))
        if kind not in list(Kind) or not layer.isdecimal() or (slash and not is_group):
            raise UserError(
                f"expected a block such as mha.5, mlp.12 or layer.3, or a group of one from mlp.12/{NUM_GROUPS} down "
                f"to mlp.12/2, got {text!r}."
            )
        return cls(Kind(kind), int(layer), int(part) if slash else None)

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Block:
        """Return the block whose `to_json()` is `values`, e.g. ["mha", 5], or ["mlp", 7, 4] for a group of an MLP."""
        kind, layer, *part = values
        return cls(Kind(kind), layer, *part)

    def to_json(self) -> list[str | int]:
        whole: list[str | int] = [str(self.kind), self.layer]
        return whole if self.part is None else [*whole, self.part]

    @property
    def whole(self) -> Block:
        """The block that a group belongs to; a whole block itself."""
        return self if self.part is None else Block(self.kind, self.layer)

    @property
    def parts(self) -> tuple[Block, ...]:
        """The MHA and MLP blocks that this block consists of."""
        if self.kind is Kind.LAYER:
            return Block(Kind.MHA, self.layer), Block(Kind.MLP, self.layer)
        return (self,)

    @property
    def depth(self) -> tuple[int, bool, int]:
        """Sort key for the order in which the stream passes the blocks: mha.0, mlp.0, mha.1, ... The groups of a
        block stand in the order in which they go."""
        return self.layer, self.kind is Kind.MLP, -(self.part or 0)


@dataclass(frozen=True, slots=True)
class Mask:
    """The set of blocks that are absent. The empty mask is the dense model.

    Of a block it holds the block itself, or those of its groups that are absent, never both.
    """

    absent: frozenset[Block] = frozenset()

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> Mask:
        """Return the mask without these blocks, layers and groups, in any order.

        Raises UserError if groups of a block are absent that are not its last ones, as far as can be told here: an
        attention may have any number of them.
        """
        mask = cls(_largest(part for block in blocks for part in block.parts))
        for block, number in mask.lacking.items():
            last = (
                NUM_GROUPS
                if block.kind is Kind.MLP
                else max(one.part or 0 for one in mask.absent if one.whole == block)
            )
            first = last - number + 1
            if Block(block.kind, block.layer, first) not in mask.absent:
                raise UserError(
                    f"expected the groups of {block} to go from the last to the first, got {mask}, which keeps "
                    f"{Block(block.kind, block.layer, last)} or one after it."
                )
        return mask

    def without(self, block: Block) -> Mask:
        """Return this mask with one more block, layer or group absent."""
        if block.part is None and all(one.part is None for one in self.absent):
            return Mask(self.absent.union(block.parts))
        return Mask(_largest([*self.absent, *block.parts]))

    def can_lose(self, block: Block) -> bool:
        """Whether a block, all of a layer, or a group is there and may go next, as far as can be told here."""
        if self.absent.intersection(part.whole for part in block.parts):
            return False
        number = self.lacking.get(block.whole, 0)
        if block.part is None or (number == 0 and block.kind is Kind.MHA):
            return True
        if number == 0:
            return block.part == NUM_GROUPS
        return block.part == min(one.part or 0 for one in self.absent if one.whole == block.whole) - 1

    def keeping(self, block: Block) -> Mask:
        """Return this mask with a block (or layer) restored."""
        return Mask(self.absent.difference(block.parts))

    def keeps(self, kind: Kind, layer: int) -> bool:
        return Block(kind, layer) not in self.absent

    @property
    def lacking(self) -> dict[Block, int]:
        """The blocks that lack some, but not all, of their groups, and how many they lack."""
        return Counter(block.whole for block in self.absent if block.part is not None)

    def __str__(self) -> str:
        return "+".join(str(block) for block in sorted(self.absent, key=lambda b: b.depth)) or "dense"

    @classmethod
    def parse(cls, text: str) -> Mask:
        """Return the mask whose `str(mask)` is `text`, e.g. `mha.3+mlp.7`."""
        return cls() if text == "dense" else cls.of(Block.parse(part) for part in text.split("+"))


def is_part(kind: str, part: int) -> bool:
    """Whether a block of a kind can have a group of this number, beside the first."""
    return (
        2 <= part <= {Kind.MLP: NUM_GROUPS, Kind.MHA: MOST_GROUPS}.get(Kind(kind), 0) if kind in list(Kind) else False
    )


def are_removals(blocks: Iterable[Block]) -> bool:
    """Whether blocks can go one after the other: none twice, and groups from the last to the first."""
    mask = Mask()
    for block in blocks:
        if not mask.can_lose(block):
            return False
        mask = mask.without(block)
    return True


def amount(blocks: Iterable[Block], noun: str = "blocks") -> str:
    """Say how much is gone after these removals: `8 blocks`, or `2 blocks, 5 groups of channels and 1 KV head` if some
    are groups of blocks that are still there. noun: what stands behind the number of whole blocks (or layers)."""
    gone = _largest(blocks)
    num_whole = sum(block.part is None for block in gone)
    if num_whole == len(gone):
        return f"{num_whole} {noun}"
    told = [f"{num_whole} {noun}"] if num_whole else []
    for kind, (one, several) in GROUPS.items():
        if number := sum(block.part is not None and block.kind is kind for block in gone):
            told.append(f"{number} {several if number > 1 else one}")
    return " and ".join(filter(None, [", ".join(told[:-1]), told[-1]]))


def removals_told(blocks: Sequence[Block]) -> str:
    """Say how many removals these are, of which each takes a block (or layer), or a group of one."""
    are_whole = all(block.part is None for block in blocks)
    return f"{len(blocks)} blocks" if are_whole else f"{len(blocks)} blocks and parts of blocks"


def _largest(blocks: Iterable[Block]) -> frozenset[Block]:
    """Leave out groups of blocks that are there themselves."""
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
    HEADS = "heads"
    """Of an attention, a KV head with its query heads."""
    ALL = "all"

    @property
    def cut(self) -> tuple[Kind, ...]:
        """The kinds of blocks that go in groups."""
        return {
            Units.BLOCKS: (), Units.CHANNELS: (Kind.MLP,), Units.HEADS: (Kind.MHA,), Units.ALL: (Kind.MHA, Kind.MLP),
        }[self]  # fmt: skip


class OrderedBy(StrEnum):
    """What makes a channel, or a KV head, important."""

    OUTPUT = "output"
    """What it adds to the output of its block over the calibration text."""
    WEIGHTS = "weights"
    """The size of the weights that compute it."""


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
