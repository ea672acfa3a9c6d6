"""What a model takes on a device, as plain arithmetic: which placement fits, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

from engine.shape import ModelShape
from engine.units import DEVICE_SHARE

LAYERS_AT_ONCE = 3
"""Of a streamed model: the one that computes, the one that is copied, and one whose last kernels may still run."""


class Placement(StrEnum):
    """How a replica holds its model."""

    RESIDENT = "resident"
    """All weights on one device."""
    STREAMED = "streamed"
    """Layers in host memory or mapped from their file, copied to the device one ahead of the arithmetic."""
    SHARDED = "sharded"
    """Layers split over the devices of one replica."""


@dataclass(frozen=True)
class ModelBytes:
    """Sizes of a model's weights in one dtype."""

    layers: tuple[int, ...]
    outside: int
    """Embedding, final norm and head."""

    @staticmethod
    def of(shape: ModelShape, bytes_per_value: int) -> ModelBytes:
        layers = tuple(
            bytes_per_value * (mha.num_parameters + mlp.num_parameters + shared)
            for mha, mlp, shared in zip(shape.mha, shape.mlp, shape.shared, strict=True)
        )
        return ModelBytes(layers, bytes_per_value * shape.num_parameters - sum(layers))

    @property
    def total(self) -> int:
        return sum(self.layers) + self.outside

    def on_device(self, placement: Placement, num_devices: int = 1) -> int:
        """Weights on the fullest device of a replica."""
        if placement is Placement.STREAMED:
            return self.outside + LAYERS_AT_ONCE * max(self.layers)
        if placement is Placement.RESIDENT:
            return self.total
        shares = [0] * num_devices
        for size, device in zip(self.layers, split_layers(self, num_devices), strict=True):
            shares[device] += size
        shares[0] += self.outside
        return max(shares)


def split_layers(sizes: ModelBytes, num_devices: int) -> list[int]:
    """For each layer the device that holds it: consecutive layers, nearly equal bytes, the first device also having
    what lies outside of the layers."""
    share = sizes.total / num_devices
    middles = [end - size / 2 for end, size in zip(accumulate(sizes.layers), sizes.layers, strict=True)]
    return [min(num_devices - 1, int((sizes.outside + middle) / share)) for middle in middles]


def choose_placement(
    sizes: ModelBytes, device_bytes: int, *, devices_per_replica: Sequence[int], working_bytes: int
) -> tuple[Placement, int] | None:
    """The first placement that fits, and its devices per replica; None if none does.

    Resident if one device holds the model. Else streamed, since all devices then work at all times, while of a sharded
    replica one does. Sharded only where streaming does not fit (or was excluded by asking for several devices).

    devices_per_replica: the numbers that may be used, ascending. working_bytes: for the smallest useful sweep.
    """
    usable = int(DEVICE_SHARE * device_bytes) - working_bytes
    if 1 in devices_per_replica:
        for placement in (Placement.RESIDENT, Placement.STREAMED):
            if sizes.on_device(placement) <= usable:
                return placement, 1
    for num_devices in devices_per_replica:
        if num_devices > 1 and sizes.on_device(Placement.SHARDED, num_devices) <= usable:
            return Placement.SHARDED, num_devices
    return None
