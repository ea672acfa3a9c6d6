"""Run an MLP with only some of its channels: the module's own forward, on slices of its weights.

The channels that stay are the first ones, so a slice is no copy (of a fused projection it is one). `put_in_order`
brings the channels of a model into the order in which they go, and back.

Shapes: H hidden size, D number of channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blockpruner.engine.blocks import NUM_GROUPS, Kind, Mask
from blockpruner.engine.channels import ChannelOrder, Channels
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.rows import Architecture, MlpLinears


@dataclass(frozen=True)
class Narrow:
    """An MLP whose channels can be removed."""

    name: str
    """Name of its module in the layer."""
    module: nn.Module
    linears: MlpLinears
    num_channels: int

    @property
    def inward(self) -> list[nn.Module]:
        return [self.module.get_submodule(name) for name in self.linears.inward]

    @property
    def outward(self) -> nn.Module:
        return self.module.get_submodule(self.linears.outward)

    @property
    def channel_parameters(self) -> tuple[int, int]:
        """Parameters and matmul weights that are removed with one channel."""
        factor = 2 if self.linears.is_fused else 1
        ins = self.inward
        weights = factor * sum(_other_size(linear) for linear in ins) + _other_size(self.outward, of_outputs=True)
        return weights + factor * sum(linear.bias is not None for linear in ins), weights

    @property
    def column_norms(self) -> Tensor:
        """Norm of each channel's weights in the output projection, float64 [D]."""
        weight: Any = self.outward.weight
        return weight.double().norm(dim=1 if isinstance(self.outward, Conv1D) else 0)

    @contextmanager
    def running(self, width: int) -> Iterator[None]:
        """Let the module compute with its first `width` channels only."""
        with (
            _parameters([(linear, self._first_outputs(linear, width)) for linear in self.inward]),
            _parameters([(self.outward, {"weight": _inputs(self.outward, slice(width))})]),
        ):
            yield

    def _first_outputs(self, linear: nn.Module, width: int) -> dict[str, Tensor]:
        return _outputs(linear, slice(width), is_fused=self.linears.is_fused)

    def taken(self, name: str, weight: Tensor, channels: Tensor) -> Tensor:
        """Return some channels of a tensor of the MLP. name: that within the module, as in its state dict. channels:
        int64, on any device."""
        owner, _, leaf = name.rpartition(".")
        channels = channels.to(weight.device)
        if owner == self.linears.outward and leaf == "weight":
            return weight.index_select(0 if isinstance(self.outward, Conv1D) else 1, channels)
        if owner in self.linears.inward:
            is_transposed = leaf == "weight" and isinstance(self.module.get_submodule(owner), Conv1D)
            if self.linears.is_fused:
                channels = torch.cat([channels, channels + self.num_channels])
            return weight.index_select(1 if is_transposed else 0, channels)
        return weight


def find_narrow(architecture: Architecture, layer: nn.Module) -> Narrow | None:
    """Return the MLP of a layer if its linear layers have known names and fitting sizes; None if it can only be removed
    as a whole."""
    names = architecture.modules_of(layer, Kind.MLP)
    if len(names) != 1 or architecture.inline_mlp:
        return None
    module = layer.get_submodule(names[0])
    for linears in architecture.mlp_linears:
        children = dict(module.named_children())
        found = [children.get(name) for name in (*linears.inward, linears.outward)]
        if not all(isinstance(linear, nn.Linear | Conv1D) for linear in found):
            continue
        *ins, out = found
        num_channels = _size(out, of_inputs=True)
        expected = (2 if linears.is_fused else 1) * num_channels
        others = [linear for linear in module.modules() if linear not in found and list(linear.parameters(False))]
        if all(_size(linear) == expected for linear in ins) and num_channels >= NUM_GROUPS and not others:
            return Narrow(names[0], module, linears, num_channels)
    return None


def put_in_order(narrow: Mapping[int, Narrow], order: ChannelOrder, *, back: bool = False) -> None:
    """Bring the channels of the MLPs that an order names into it, or back from it. Channels that it does not name come
    last. What the model computes stays the same, up to rounding."""
    for layer in sorted(order.channels):
        mlp = narrow[layer]
        first = channels_of(order, layer, mlp.num_channels, len(order.channels[layer]))
        rest = np.setdiff1d(np.arange(mlp.num_channels), first)
        channels = torch.from_numpy(np.concatenate([first, rest]).astype(np.int64))
        channels = torch.argsort(channels) if back else channels
        for linear_name in (*mlp.linears.inward, mlp.linears.outward):
            for leaf, parameter in mlp.module.get_submodule(linear_name).named_parameters(recurse=False):
                parameter.data = mlp.taken(f"{linear_name}.{leaf}", parameter.data, channels)


def channels_of(order: ChannelOrder | None, layer: int, num_channels: int, width: int) -> Channels:
    """Return the numbers of the first `width` channels of an MLP, int32. Raises UserError if the order is not one of
    this model."""
    found = None if order is None else order.channels.get(layer)
    if found is None or len(found) < width or found.max() >= num_channels:
        raise UserError(
            f"expected the order of the {num_channels} channels of mlp.{layer}, which the search that removed some of "
            f"them recorded, got {'none' if found is None else 'that of another model'}; give its run directory."
        )
    return found[:width]


def check_narrowed(mask: Mask, narrow: Mapping[int, Narrow], model_type: str) -> None:
    """Raise UserError if a mask lacks channels of an MLP that can only be removed as a whole."""
    if wrong := sorted(mask.narrowed - narrow.keys()):
        raise UserError(
            f"expected masks without groups of channels of mlp.{wrong[0]}, since a model of type {model_type!r} has an "
            f"MLP there that can only be removed as a whole, got {mask}."
        )


def without_shared(narrow: Mapping[int, Narrow]) -> dict[int, Narrow]:
    """Leave out MLPs whose weights several layers use."""
    owners: dict[int, set[int]] = {}
    for layer, mlp in narrow.items():
        for parameter in mlp.module.parameters():
            owners.setdefault(id(parameter), set()).add(layer)
    shared = {layer for layers in owners.values() if len(layers) > 1 for layer in layers}
    return {layer: mlp for layer, mlp in narrow.items() if layer not in shared}


def _size(linear: Any, *, of_inputs: bool = False) -> int:
    """Number of outputs of a linear layer, or of its inputs."""
    is_first = of_inputs == isinstance(linear, Conv1D)
    return int(linear.weight.shape[0 if is_first else 1])


def _other_size(linear: Any, *, of_outputs: bool = False) -> int:
    return _size(linear, of_inputs=not of_outputs)


def _inputs(linear: Any, some: slice) -> Tensor:
    weight: Tensor = linear.weight
    return weight[some] if isinstance(linear, Conv1D) else weight[:, some]


def _outputs(linear: Any, some: slice, *, is_fused: bool) -> dict[str, Tensor]:
    dim = 1 if isinstance(linear, Conv1D) else 0
    found = {"weight": _sliced(linear.weight, dim, some, is_fused=is_fused)}
    if linear.bias is not None:
        found["bias"] = _sliced(linear.bias, 0, some, is_fused=is_fused)
    return found


def _sliced(values: Tensor, dim: int, some: slice, *, is_fused: bool) -> Tensor:
    halves = values.chunk(2, dim) if is_fused else (values,)
    parts = [half[some] if dim == 0 else half[:, some] for half in halves]
    return torch.cat(parts, dim) if is_fused else parts[0]


@contextmanager
def _parameters(others: Sequence[tuple[nn.Module, dict[str, Tensor]]]) -> Iterator[None]:
    """Give modules other parameters for a time."""
    own = [(module, module._parameters, getattr(module, "nf", None)) for module, _ in others]
    for module, tensors in others:
        module._parameters = {**module._parameters, **tensors}  # type: ignore[dict-item]
        if isinstance(module, Conv1D):  # it shapes its output by this number
            module.nf = tensors["weight"].shape[1]
    try:
        yield
    finally:
        for module, parameters, num_outputs in own:
            module._parameters = parameters
            if num_outputs is not None:
                module.nf = num_outputs
