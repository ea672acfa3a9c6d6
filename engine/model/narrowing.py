"""Run a block without some of its groups: the module's own forward, on slices of its weights.

A group of an MLP is some of its channels, a group of an attention is a KV head with its query heads. The groups that
stay are the first ones, so a slice is no copy (of a fused projection it is one). `changes_of_order` says how the
weights of a model come into the order in which channels go. A KV head is a "channel" here, too.

Shapes: H hidden size, D number of channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blockpruner.engine.blocks import NUM_GROUPS, Block, Kind, Mask
from blockpruner.engine.channels import ChannelOrder, Channels
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.rows import Architecture, Linears
from blockpruner.engine.model.weights import Changes


@dataclass(frozen=True)
class Narrow:
    """A block whose groups can be removed one by one."""

    name: str
    """Name of its module in the layer."""
    module: nn.Module
    linears: Linears
    num_channels: int
    num_groups: int
    sizes: Mapping[str, int]
    """By the name of a linear layer: how many of its outputs, or of the inputs of the outward one, belong to a channel.
    Of a fused one, in each half."""

    @property
    def outward(self) -> nn.Module:
        return self.module.get_submodule(self.linears.outward)

    @property
    def channel_parameters(self) -> tuple[int, int]:
        """Parameters and matmul weights that are removed with one channel."""
        parameters = weights = 0
        for name in self.linears.inward:
            linear = self.module.get_submodule(name)
            outputs = self.sizes[name] * (2 if self.linears.is_fused else 1)
            weights += outputs * _size(linear, of_inputs=True)
            parameters += outputs * (linear.bias is not None)
        weights += self.sizes[self.linears.outward] * _size(self.outward)
        return parameters + weights, weights

    @property
    def column_norms(self) -> Tensor:
        """Norm of the weights of each input of the outward linear layer, float64 [D x size]."""
        weight: Any = self.outward.weight
        return weight.double().norm(dim=1 if isinstance(self.outward, Conv1D) else 0)

    @property
    def row_norms(self) -> Tensor:
        """L1 norm of the rows of each channel in the inward linear layers, float64 [D]: of each layer the mean over the
        rows of the channel, added over the layers.

        This is the importance in MultiPruner's code (arXiv 2501.09949, utils.py), which counts the rows of a KV head
        once for each of its query heads.
        """
        found = []
        for name in self.linears.inward:
            linear: Any = self.module.get_submodule(name)
            dim = 0 if isinstance(linear, Conv1D) else 1
            rows = torch.linalg.vector_norm(linear.weight, ord=1, dim=dim, dtype=torch.float64)
            found.append(rows.view(-1, self.num_channels, self.sizes[name]).mean(-1).sum(0))
        return torch.stack(found).sum(0)

    @contextmanager
    def running(self, width: int) -> Iterator[None]:
        """Let the module compute with its first `width` channels only."""
        with ExitStack() as stack:
            for name in (*self.linears.inward, self.linears.outward):
                linear: Any = self.module.get_submodule(name)
                some, tensors = slice(width * self.sizes[name]), {"weight": linear.weight}
                if name in self.linears.inward and linear.bias is not None:
                    tensors["bias"] = linear.bias
                others = {leaf: self._first(name, leaf, tensor, some) for leaf, tensor in tensors.items()}
                stack.enter_context(_parameters(linear, others))
            yield

    def _first(self, name: str, leaf: str, tensor: Tensor, some: slice) -> Tensor:
        dim = self._dim(name, leaf)
        halves = tensor.chunk(2, dim) if self._is_fused(name) else (tensor,)
        parts = [half[some] if dim == 0 else half[:, some] for half in halves]
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0]

    def _is_fused(self, name: str) -> bool:
        return self.linears.is_fused and name != self.linears.outward

    def _dim(self, name: str, leaf: str) -> int:
        """Dimension of a linear layer's weight or bias along which its channels lie."""
        is_transposed = isinstance(self.module.get_submodule(name), Conv1D)
        return int(leaf == "weight" and (name == self.linears.outward) != is_transposed)

    def taken(self, name: str, tensor: Tensor, channels: Tensor) -> Tensor:
        """Return some channels of a tensor of the block, in their order. name: that within the module, as in its state
        dict. channels: int64, on any device."""
        owner, _, leaf = name.rpartition(".")
        is_outward = owner == self.linears.outward and leaf == "weight"
        if not is_outward and owner not in self.linears.inward:
            return tensor
        size = self.sizes[owner]
        places = (channels[:, None] * size + torch.arange(size, device=channels.device)).flatten()
        if self._is_fused(owner):
            places = torch.cat([places, places + self.num_channels * size])
        return tensor.index_select(self._dim(owner, leaf), places.to(tensor.device))


def find_narrow(architecture: Architecture, layer: nn.Module, kind: Kind) -> Narrow | None:
    """Return a block of a layer if its linear layers have known names and fitting sizes; None if it can only be removed
    as a whole."""
    names = architecture.modules_of(layer, kind)
    if len(names) != 1 or (kind is Kind.MLP and architecture.inline_mlp):
        return None
    module = layer.get_submodule(names[0])
    for linears in architecture.head_linears if kind is Kind.MHA else architecture.mlp_linears:
        children = dict(module.named_children())
        found = [children.get(name) for name in (*linears.inward, linears.outward)]
        if all(isinstance(linear, nn.Linear | Conv1D) for linear in found):
            sizes = _head_sizes(module, linears) if kind is Kind.MHA else _mlp_sizes(module, linears)
            if sizes is not None:
                num_channels = _size(module.get_submodule(linears.outward), of_inputs=True) // sizes[linears.outward]
                num_groups = num_channels if kind is Kind.MHA else NUM_GROUPS
                return Narrow(names[0], module, linears, num_channels, num_groups, sizes)
    return None


def _mlp_sizes(module: nn.Module, linears: Linears) -> dict[str, int] | None:
    num_channels = _size(module.get_submodule(linears.outward), of_inputs=True)
    expected = (2 if linears.is_fused else 1) * num_channels
    names = (*linears.inward, linears.outward)
    outputs = [_size(module.get_submodule(name)) for name in linears.inward]
    if num_channels < NUM_GROUPS or any(size != expected for size in outputs) or _others(module, names):
        return None
    return dict.fromkeys(names, 1)


def _head_sizes(module: nn.Module, linears: Linears) -> dict[str, int] | None:
    """Query heads lie in the order of the KV heads that they belong to, as in all of transformers' types."""
    head_dim = getattr(module, "head_dim", None)
    queries, *keys = (_size(module.get_submodule(name)) for name in linears.inward)
    inputs = _size(module.get_submodule(linears.outward), of_inputs=True)
    if not isinstance(head_dim, int) or len(set(keys)) > 1 or keys[0] % head_dim:
        return None
    num_kv_heads = keys[0] // head_dim
    if num_kv_heads < 2 or queries % num_kv_heads or inputs != queries:
        return None
    names = (*linears.inward, linears.outward)
    if any(parameter.numel() != head_dim for parameter in _others(module, names)):  # norms of single heads are none
        return None
    group = queries // num_kv_heads
    return {names[0]: group, **dict.fromkeys(linears.inward[1:], head_dim), linears.outward: group}


def _others(module: nn.Module, names: tuple[str, ...]) -> list[nn.Parameter]:
    """Return the parameters of a module that are not those of some linear layers."""
    return [one for name, one in module.named_parameters() if name.rpartition(".")[0] not in names]


def changes_of_order(
    narrow: Mapping[Block, Narrow], order: ChannelOrder, devices: Sequence[torch.device], *, back: bool = False
) -> Changes:
    """Return what brings the channels of the blocks that an order names into it, or back from it. Channels that it does
    not name come last. devices: of each layer, where its parameters are changed."""
    changes: dict[tuple[nn.Module, str], Callable[[Tensor], Tensor]] = {}
    for block in order.blocks:
        one = narrow[block]
        first = channels_of(order, block, one.num_channels, len(order.channels[block]))
        rest = np.setdiff1d(np.arange(one.num_channels), first)
        channels = torch.from_numpy(np.concatenate([first, rest]).astype(np.int64))
        channels = (torch.argsort(channels) if back else channels).to(devices[block.layer])
        for name in (*one.linears.inward, one.linears.outward):
            linear = one.module.get_submodule(name)
            for leaf, _ in linear.named_parameters(recurse=False):
                changes[linear, leaf] = partial(one.taken, f"{name}.{leaf}", channels=channels)
    return changes


def channels_of(order: ChannelOrder | None, block: Block, num_channels: int, width: int) -> Channels:
    """Return the numbers of the first `width` channels of a block, int32. Raises UserError if the order is not one of
    this model."""
    found = None if order is None else order.channels.get(block)
    if found is None or len(found) < width or found.max() >= num_channels:
        what = "channels" if block.kind is Kind.MLP else "KV heads"
        raise UserError(
            f"expected the order of the {num_channels} {what} of {block}, which the search that removed some of "
            f"them recorded, got {'none' if found is None else 'that of another model'}; give its run directory."
        )
    return found[:width]


def check_narrowed(mask: Mask, narrow: Mapping[Block, Narrow], model_type: str) -> None:
    """Raise UserError if a mask lacks groups that the model does not have."""
    for block, number in sorted(mask.lacking.items(), key=lambda pair: pair[0].depth):
        if block not in narrow:
            raise UserError(
                f"expected masks without groups of {block}, since a model of type {model_type!r} has a block there "
                f"that can only be removed as a whole, got {mask}."
            )
        last = narrow[block].num_groups
        if Block(block.kind, block.layer, last - number + 1) not in mask.absent:
            raise UserError(f"expected the last of the {last} groups of {block} to be absent, got {mask}.")


def without_shared(narrow: Mapping[Block, Narrow]) -> dict[Block, Narrow]:
    """Leave out blocks whose weights several layers use."""
    owners: dict[int, set[Block]] = {}
    for block, one in narrow.items():
        for parameter in one.module.parameters():
            owners.setdefault(id(parameter), set()).add(block)
    shared = {block for blocks in owners.values() if len(blocks) > 1 for block in blocks}
    return {block: one for block, one in narrow.items() if block not in shared}


def _size(linear: Any, *, of_inputs: bool = False) -> int:
    """Number of outputs of a linear layer, or of its inputs."""
    is_first = of_inputs == isinstance(linear, Conv1D)
    return int(linear.weight.shape[0 if is_first else 1])


@contextmanager
def _parameters(linear: nn.Module, others: dict[str, Tensor]) -> Iterator[None]:
    """Give a linear layer other parameters for a time."""
    own, num_outputs = linear._parameters, getattr(linear, "nf", None)
    linear._parameters = {**own, **others}  # type: ignore[dict-item]
    if isinstance(linear, Conv1D):  # it shapes its output by this number
        linear.nf = others["weight"].shape[1]
    try:
        yield
    finally:
        linear._parameters = own
        if num_outputs is not None:
            linear.nf = num_outputs
