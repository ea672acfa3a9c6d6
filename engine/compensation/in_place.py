"""Run a decoder with other weights in some of its output projections.

The model's own tensors stay where they are: a projection is called with other ones in their place. So this works with
any placement, also where a layer's weights are on the device only while it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from blockpruner.engine.blocks import Block
from blockpruner.engine.compensation.projections import Projection, Weights, find_projections
from blockpruner.engine.compensation.walk import Changed
from blockpruner.engine.model.decoder import Decoder


class InPlace:
    def __init__(self, decoder: Decoder, *, on_device: bool = True) -> None:
        """on_device: keep the weights on the devices of their layers; else they are moved there for each call."""
        self._decoder, self._on_device = decoder, on_device
        self._name: str | None = None
        self._forwards: list[nn.Module] = []

    def put(self, name: str, changed: Changed) -> None:
        """Use other weights from now on. name: identifies them."""
        if name == self._name:
            return
        self.take_out()
        dtype = self._decoder.model.dtype
        for block, weights in changed.items():
            projection = self._projections[block]
            assert isinstance(projection, Projection)
            device = self._decoder.layer_devices[block.layer] if self._on_device else torch.device("cpu")
            module = projection.module
            module.__dict__["forward"] = partial(_run, module, module.forward, weights.to(device, dtype))
            self._forwards.append(module)
        self._name = name

    def take_out(self) -> None:
        """Use the model's own weights again."""
        for module in self._forwards:
            del module.__dict__["forward"]
        self._forwards, self._name = [], None

    @cached_property
    def _projections(self) -> Mapping[Block, Projection | str]:
        return find_projections(self._decoder)


def _run(module: nn.Module, forward: Callable[..., Any], weights: Weights, inner: Tensor) -> Any:
    own = module._parameters
    there = weights.to(inner.device, inner.dtype)
    other: dict[str, Any] = {"weight": there.weight, "bias": there.bias}
    module._parameters = {**own, **{name: other[name] for name in own if name in other}}
    try:
        return forward(inner)
    finally:
        module._parameters = own
