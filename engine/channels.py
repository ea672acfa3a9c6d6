"""The order of the channels of MLPs and of the KV heads of attentions, by importance: what a group in a mask means."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from blockpruner.engine.blocks import Block
from blockpruner.engine.errors import UserError

CHANNELS_FILE = "channels.npz"
"""File with the order, in a run directory and beside the weights of a model with narrower MLPs."""
Channels = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class ChannelOrder:
    """For each block the numbers of its channels (or KV heads) in the dense model, the most important one first."""

    channels: Mapping[Block, Channels] = field(repr=False)
    """A permutation of all channels of a block, or the beginning of one: the channels that a narrower block has."""

    @property
    def blocks(self) -> list[Block]:
        return sorted(self.channels, key=lambda block: block.depth)

    @classmethod
    def by(cls, importance: Mapping[Block, NDArray[np.float64]]) -> ChannelOrder:
        """Return the order for the importance of each channel [num_channels]. The first one wins ties, and a channel
        whose importance is NaN comes last."""
        return cls({block: np.argsort(-values, kind="stable").astype(np.int32) for block, values in importance.items()})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the order."""
        digest = hashlib.sha256()
        for block in self.blocks:
            digest.update(f"{block} {len(self.channels[block])}".encode())
            digest.update(np.ascontiguousarray(self.channels[block], dtype="<i4").tobytes())
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            arrays: dict[str, Any] = {str(block): self.channels[block] for block in self.blocks}
            np.savez(file, **arrays)

    @classmethod
    def read(cls, path: Path) -> ChannelOrder:
        """Raises UserError if the file is missing or damaged."""
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                found = {Block.parse(name): file[name] for name in file.files}
        except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
            raise UserError(
                f"expected the order of the channels of narrower blocks in {str(path)!r}, which is missing or damaged; "
                f"restore it, or search again."
            ) from error
        for block, values in found.items():
            if values.dtype != np.int32 or values.ndim != 1 or len(np.unique(values)) < values.size or values.min() < 0:
                raise UserError(f"{str(path)!r} is damaged ({block} has no order of channels there); restore it.")
        return cls(found)
