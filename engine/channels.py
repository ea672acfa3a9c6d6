"""The order of the channels of MLPs, by importance: what a group of channels in a mask means."""

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

from blockpruner.engine.errors import UserError

CHANNELS_FILE = "channels.npz"
"""File with the order, in a run directory and beside the weights of a model with narrower MLPs."""
Channels = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class ChannelOrder:
    """For each MLP the numbers of its channels in the dense model, the most important one first."""

    channels: Mapping[int, Channels] = field(repr=False)
    """By layer: a permutation of all channels, or the beginning of one, of the channels that a narrower MLP has."""

    @classmethod
    def by(cls, importance: Mapping[int, NDArray[np.float64]]) -> ChannelOrder:
        """Return the order for the importance of each channel [num_channels]. The first one wins ties, and a channel
        whose importance is NaN comes last."""
        return cls({layer: np.argsort(-values, kind="stable").astype(np.int32) for layer, values in importance.items()})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the order."""
        digest = hashlib.sha256()
        for layer, channels in sorted(self.channels.items()):
            digest.update(f"mlp.{layer} {len(channels)}".encode())
            digest.update(np.ascontiguousarray(channels, dtype="<i4").tobytes())
        return digest.hexdigest()

    def kept(self, widths: Mapping[int, int]) -> ChannelOrder:
        """Return the first channels of some MLPs. widths: their numbers, by layer."""
        return ChannelOrder({layer: self.channels[layer][:width] for layer, width in sorted(widths.items())})

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            arrays: dict[str, Any] = {f"mlp.{layer}": channels for layer, channels in self.channels.items()}
            np.savez(file, **arrays)

    @classmethod
    def read(cls, path: Path) -> ChannelOrder:
        """Raises UserError if the file is missing or damaged."""
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                found = {int(name.removeprefix("mlp.")): file[name] for name in file.files}
        except (OSError, ValueError, EOFError, KeyError, AttributeError, BadZipFile) as error:
            raise UserError(
                f"expected the order of the channels of narrower MLPs in {str(path)!r}, which is missing or damaged; "
                f"restore it, or search again."
            ) from error
        for layer, values in found.items():
            if values.dtype != np.int32 or values.ndim != 1 or len(np.unique(values)) < values.size or values.min() < 0:
                raise UserError(f"{str(path)!r} is damaged (mlp.{layer} is no order of channels); restore it.")
        return cls(found)
