"""Sharded placement: split the layers over the devices of one replica, which compute one after another."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from blockpruner.engine.model.weights import Casting, move_outside, moved, put, tensors_of


def shard_layers(
    model: nn.Module, layers: Sequence[nn.Module], devices: Sequence[torch.device], home: torch.device, casting: Casting
) -> None:
    """Put layer n on devices[n] and the rest on `home`. A layer accepts input on any device and returns its output
    there."""
    move_outside(model, layers, home, casting)
    for layer, device in zip(layers, devices, strict=True):
        for owner, name in tensors_of(layer):
            put(owner, name, moved(getattr(owner, name), device, casting))
        layer.__dict__["forward"] = partial(_hop, layer.forward, device)


def _hop(forward: Callable[..., Any], device: torch.device, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    def to(place: torch.device, values: Any) -> Any:
        return tree_map(lambda value: value.to(place) if _moves(value) else value, values)

    args, kwargs = to(device, (args, kwargs))
    return to(hidden.device, forward(hidden.to(device), *args, **kwargs))


def _moves(value: Any) -> bool:
    """Whether an argument lies on a device: tensors, and what layers leave for each other, which moves in place."""
    return isinstance(value, Tensor) or (isinstance(value, MutableMapping) and hasattr(value, "to"))
