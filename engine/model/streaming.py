"""Streamed placement: run a model that is larger than its device.

Every sweep visits each layer once, in order, for all masks. A layer's weights are therefore needed on the device only
while it computes. They stay in host memory or mapped from their file, and are copied while the previous layer computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blockpruner.engine.model.weights import Casting, Changes, move_outside, moved, put, tensors_of

CPU = torch.device("cpu")


def stream_layers(model: nn.Module, layers: Sequence[nn.Module], device: torch.device, casting: Casting) -> LayerStream:
    """Put everything except the layers on the device, and copy each layer when it is called."""
    move_outside(model, layers, device, casting)
    return LayerStream(layers, device, casting)


@dataclass(frozen=True)
class _Weights:
    """One layer's tensors on the device, in the order of `tensors_of`."""

    tensors: list[Tensor]
    copied: Any
    """CUDA event that marks the end of the copy; None on a CPU."""


class LayerStream:
    """Copies the weights of each layer to the device when it is called, and those of the next layer while it computes.

    It replaces the layers' `forward`, so that the weights are in place for any caller.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, casting: Casting) -> None:
        self._device = device
        self._casting = casting
        self._places = [list(tensors_of(layer)) for layer in layers]
        self._host = [[getattr(owner, name) for owner, name in places] for places in self._places]
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="layer-stream")
        self._copy_stream = torch.cuda.Stream(device) if device.type != "cpu" else None
        self._changes: Changes = {}
        self._at_hand: int | None = None
        self._coming: tuple[int, Future[_Weights]] | None = None
        for index, layer in enumerate(layers):
            layer.__dict__["forward"] = partial(self._run, index, layer.forward)

    def change(self, changes: Changes) -> None:
        """Change parameters from now on each time that they come to the device. The host's own stay as they are, since
        they may be mapped from a file that other processes map, too."""
        if self._coming is not None:
            self._coming[1].exception()  # waits for a copy that would be of the tensors as they were until now
            self._coming = None
        if self._at_hand is not None:
            self._put(self._at_hand, self._host[self._at_hand])
            self._at_hand = None
        self._changes = changes

    def _run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if index != self._at_hand:
            self._bring(index)
        return forward(*args, **kwargs)

    def _bring(self, index: int) -> None:
        coming, self._coming = self._coming, None
        if coming is not None and (coming[1].exception() is not None or coming[0] != index):
            coming = None  # an unneeded layer, or a copy that ran out of memory, which may be free by now
        weights = (coming or self._send(index))[1].result()
        # Do not release the current layer earlier: the copy does not wait for it, and would overwrite memory in use.
        if self._at_hand is not None:
            self._put(self._at_hand, self._host[self._at_hand])
            self._at_hand = None
        if weights.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(weights.copied)
        self._put(index, weights.tensors)
        self._at_hand = index
        self._coming = self._send((index + 1) % len(self._host))  # after the last layer, the next sweep starts

    def _send(self, index: int) -> tuple[int, Future[_Weights]]:
        asked = torch.cuda.current_stream(self._device).record_event() if self._copy_stream else None
        return index, self._copier.submit(self._copy, index, asked)

    @torch.inference_mode()
    def _copy(self, index: int, asked: Any) -> _Weights:
        """Copy a layer's weights. Runs in the copier's thread.

        asked: CUDA event that marks all work queued on the device when this copy was requested. The copy waits for it,
        because the program runs ahead of the device. Otherwise layers would pile up on the device, or be overwritten
        while still in use.
        """
        if self._copy_stream is None:
            here = [moved(host, self._device, self._casting) for host in self._host[index]]
            return _Weights(self._changed(index, here), None)
        asked.synchronize()
        with torch.cuda.stream(self._copy_stream):
            tensors = [
                _pinned(moved(host, CPU, self._casting).detach()).to(self._device, non_blocking=True)
                for host in self._host[index]
            ]
            return _Weights(self._changed(index, tensors), self._copy_stream.record_event())

    def _changed(self, index: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [
            self._changes[place](tensor) if place in self._changes else tensor
            for place, tensor in zip(self._places[index], tensors, strict=True)
        ]

    def _put(self, index: int, tensors: Sequence[Tensor]) -> None:
        for (owner, name), tensor in zip(self._places[index], tensors, strict=True):
            put(owner, name, tensor)


def _pinned(tensor: Tensor) -> Tensor:
    try:
        return tensor.pin_memory()
    except RuntimeError as error:  # its text says "out of memory", but the device's memory is not full
        warnings.warn(f"host memory cannot be pinned, so layers are copied more slowly: {error}", stacklevel=2)
        return tensor
