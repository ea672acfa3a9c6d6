"""Move weights between devices and dtypes, tensor by tensor, without a second copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Changes = Mapping[tuple[nn.Module, str], Callable[[Tensor], Tensor]]
"""What some parameters are to become, by the module that owns them and their names there."""


@dataclass(frozen=True)
class Casting:
    """Casts weights of dtype `stored` to dtype `computed`. Weights that the model keeps in another dtype are
    unchanged."""

    stored: torch.dtype
    computed: torch.dtype

    def __call__(self, weights: Tensor) -> Tensor:
        return weights.to(self.computed) if weights.dtype == self.stored else weights


def tensors_of(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the owning module and the name of every parameter and buffer."""
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            yield from ((owner, name) for name, tensor in tensors.items() if tensor is not None)


def put(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer by a tensor of any dtype and device."""
    if name not in owner._parameters:
        owner._buffers[name] = tensor
    elif isinstance(tensor, nn.Parameter):
        owner._parameters[name] = tensor
    else:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def moved(tensor: Tensor, device: torch.device, casting: Casting) -> Tensor:
    """Return the tensor on a device; parameters are also cast. If nothing changes, return the tensor itself, so that it
    stays mapped from its file."""
    if not isinstance(tensor, nn.Parameter):
        return tensor.to(device)
    there = casting(tensor.detach()).to(device)
    return tensor if there.dtype == tensor.dtype and there.device == tensor.device else there


def move_outside(model: nn.Module, layers: Sequence[nn.Module], device: torch.device, casting: Casting) -> None:
    """Move everything except the layers (embedding, final norm, head). Tied weights stay tied."""
    inside = {id(owner) for layer in layers for owner in layer.modules()}
    done: dict[int, Tensor] = {}
    for owner, name in tensors_of(model):
        if id(owner) in inside:
            continue
        before = getattr(owner, name)
        if id(before) not in done:
            put(owner, name, moved(before, device, casting))
            done[id(before)] = getattr(owner, name)
        else:
            put(owner, name, done[id(before)])
