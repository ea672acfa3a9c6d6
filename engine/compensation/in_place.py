"""Run a decoder with other weights in some of its output projections.

The model's own tensors stay where they are: a projection is called with other ones in their place. So this works with
any placement, also where a layer's weights are on the device only while it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blockpruner.engine.compensation.projections import Projection, Projections, Weights
from blockpruner.engine.compensation.walk import Changed
from blockpruner.engine.model.decoder import Decoder, forward_replaced


class InPlace:
    def __init__(self, decoder: Decoder, projections: Projections, *, on_device: bool = True) -> None:
        """on_device: keep the weights on the devices of their layers; else they are moved there for each call."""
        self._decoder, self._projections, self._on_device = decoder, projections, on_device
        self._name: str | None = None
        self._replaced = ExitStack()

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
            forward = partial(_run, module, module.forward, weights.to(device, dtype))
            self._replaced.enter_context(forward_replaced(module, forward))
        self._name = name

    def take_out(self) -> None:
        """Use the model's own weights again."""
        self._replaced.close()
        self._name = None


def _run(module: nn.Module, forward: Callable[..., Any], weights: Weights, inner: Tensor) -> Any:
    own = module._parameters
    there = weights.to(inner.device, inner.dtype)
    other: dict[str, Any] = {"weight": there.weight, "bias": there.bias}
    module._parameters = {**own, **{name: other[name] for name in own if name in other}}
    try:
        return forward(inner)
    finally:
        module._parameters = own
