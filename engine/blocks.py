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


@dataclass(frozen=True, slots=True)
class Block:
    """One MHA or MLP block of one decoder layer with its norm, or both blocks in a layer-level search."""

    kind: Kind
    layer: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Block:
        """Return the block whose `str(block)` is `text`, e.g. `mha.5`."""
        kind, _, layer = text.partition(".")
        if kind not in list(Kind) or not layer.isdecimal():
            raise UserError(f"expected a block such as mha.5, mlp.12 or layer.3, got {text!r}.")
        return cls(Kind(kind), int(layer))

    @classmethod
    def from_json(cls, pair: Sequence[Any]) -> Block:
        """Return the block whose `to_json()` is `pair`, e.g. ["mha", 5]."""
        kind, layer = pair
        return cls(Kind(kind), layer)

    def to_json(self) -> list[str | int]:
        return [str(self.kind), self.layer]

    @property
    def parts(self) -> tuple[Block, ...]:
        """The MHA and MLP blocks that this block consists of."""
        if self.kind is Kind.LAYER:
            return Block(Kind.MHA, self.layer), Block(Kind.MLP, self.layer)
        return (self,)

    @property
    def depth(self) -> tuple[int, bool]:
        """Sort key for the order in which the stream passes the blocks: mha.0, mlp.0, mha.1, ..."""
        return self.layer, self.kind is Kind.MLP


@dataclass(frozen=True, slots=True)
class Mask:
    """The set of blocks that are absent. The empty mask is the dense model."""

    absent: frozenset[Block] = frozenset()

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> Mask:
        return cls(frozenset(part for block in blocks for part in block.parts))

    def without(self, block: Block) -> Mask:
        """Return this mask with one more block (or layer) absent."""
        return Mask(self.absent.union(block.parts))

    def keeping(self, block: Block) -> Mask:
        """Return this mask with a block (or layer) restored."""
        return Mask(self.absent.difference(block.parts))

    def keeps(self, kind: Kind, layer: int) -> bool:
        return Block(kind, layer) not in self.absent

    def __str__(self) -> str:
        return "+".join(str(block) for block in sorted(self.absent, key=lambda b: b.depth)) or "dense"

    @classmethod
    def parse(cls, text: str) -> Mask:
        """Return the mask whose `str(mask)` is `text`, e.g. `mha.3+mlp.7`."""
        return cls() if text == "dense" else cls.of(Block.parse(part) for part in text.split("+"))


class Mixers(StrEnum):
    """Which token mixers a search may remove."""

    ALL = "all"
    ATTENTION = "attention"
    """Only those with a KV cache, which grows with the text."""


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
