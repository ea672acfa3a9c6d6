"""Estimate the memory of a model and choose a placement that fits, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

from blockpruner.engine.errors import UserError
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.units import DEVICE_SHARE, KernelShape, sweep_bytes

GIB = 2**30

LAYERS_AT_ONCE = 3
"""Layers of a streamed model on the device: one that computes, one being copied, one whose kernels may still run."""


class Placement(StrEnum):
    """How a replica holds its model."""

    RESIDENT = "resident"
    """All weights on one device."""
    STREAMED = "streamed"
    """Layers in host memory or mapped from their file, each copied to the device while the previous one computes."""
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
        """Bytes of weights on the fullest device of a replica."""
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
    """Assign each layer to a device: consecutive layers, nearly equal bytes per device. The first device also holds the
    weights outside the layers."""
    share = sizes.total / num_devices
    middles = [end - size / 2 for end, size in zip(accumulate(sizes.layers), sizes.layers, strict=True)]
    return [min(num_devices - 1, int((sizes.outside + middle) / share)) for middle in middles]


def smallest_sweep_bytes(shape: ModelShape, *, seq_len: int, bytes_per_value: int) -> int:
    """Working memory in bytes of the smallest sweep."""
    least = KernelShape(rows=1, head_tokens=1, masks=2, windows=1, threads=1)
    return sweep_bytes(shape, least, seq_len=seq_len, bytes_per_value=bytes_per_value)


def choose_placement(
    sizes: ModelBytes, device_bytes: int, *, devices_per_replica: Sequence[int], working_bytes: int
) -> tuple[Placement, int] | None:
    """Return the first placement that fits and its number of devices per replica, or None if none fits.

    The order is: resident, if one device holds the model; streamed, which keeps all devices busy, while a sharded
    replica uses one device at a time; sharded, if streaming does not fit or several devices per replica were asked for.

    devices_per_replica: allowed numbers, ascending. working_bytes: working memory of the smallest useful sweep.
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


def resolve_placement(
    asked: str,
    sizes: ModelBytes,
    device_bytes: int,
    *,
    on_gpu: bool,
    gpus_per_replica: int | None,
    gpus_per_node: int,
    working_bytes: int,
) -> tuple[Placement, int]:
    """Return the requested placement, or for `auto` the first that fits, and its number of devices per replica.

    device_bytes: memory of one GPU, or free host memory. Raises UserError if the model does not fit.
    """
    if (gpus_per_replica or 1) > 1 and asked in (Placement.RESIDENT, Placement.STREAMED):
        raise UserError(
            f"expected `gpus_per_replica=1` with `placement={asked}`, got {gpus_per_replica}: only a sharded model "
            f"spans several GPUs."
        )
    if gpus_per_replica == 1 and asked == Placement.SHARDED:
        raise UserError("expected `gpus_per_replica` of at least 2 with `placement=sharded`, got 1.")
    if not on_gpu:
        if asked == Placement.SHARDED or gpus_per_replica:
            raise UserError("expected GPUs for `gpus_per_replica` and `placement=sharded`, but this is a run on CPUs.")
        if asked != "auto":
            return Placement(asked), 1
        fits = sizes.total + working_bytes <= DEVICE_SHARE * device_bytes
        return Placement.RESIDENT if fits else Placement.STREAMED, 1  # a streamed model may stay on disk
    numbers = [gpus_per_replica] if gpus_per_replica else list(range(1, gpus_per_node + 1))
    if asked == Placement.SHARDED:
        numbers = [number for number in numbers if number > 1] or [2]
    if asked in ("auto", Placement.SHARDED):
        found = choose_placement(sizes, device_bytes, devices_per_replica=numbers, working_bytes=working_bytes)
    else:
        needed = sizes.on_device(Placement(asked)) + working_bytes
        found = (Placement(asked), 1) if needed <= DEVICE_SHARE * device_bytes else None
    if found is None:
        tried = "no placement" if asked == "auto" else f"`placement={asked}`"
        raise UserError(
            f"expected a model that fits, but {sizes.total / GIB:.1f} GiB of weights do not fit GPUs of "
            f"{device_bytes / GIB:.1f} GiB ({100 * DEVICE_SHARE:.0f} % of it used) with {tried} and "
            f"{max(numbers)} GPUs per replica; {what_fits(sizes, device_bytes, working_bytes)}."
        )
    return found


def what_fits(sizes: ModelBytes, device_bytes: int, working_bytes: int) -> str:
    """Advise the user which placement would fit."""
    found = choose_placement(sizes, device_bytes, devices_per_replica=(1, 2, 4, 8, 16), working_bytes=working_bytes)
    if found is None:
        return f"a streamed one needs {(sizes.on_device(Placement.STREAMED) + working_bytes) / GIB:.1f} GiB"
    placement, num_devices = found
    with_devices = f" with `gpus_per_replica={num_devices}`" if num_devices > 1 else ""
    return f"`placement={placement}`{with_devices} would fit"
