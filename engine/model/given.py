"""What layers are given beside their stream that differs from sequence to sequence: values of the tokens, such as the
per-layer inputs of Gemma 4, and what mixers leave for those of later layers, such as keys and values.

Shapes: W windows, R rows of a call, N = R x W sequences (row r of a call is the sequences r x W to r x W + W - 1).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blockpruner.engine.model.selecting import RowChoice

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of one call, without the stream."""
Left = Mapping[str, tuple[Tensor, ...]]


@dataclass
class Given:
    """For one call of a layer over N sequences."""

    values: Mapping[int, Tensor] = field(default_factory=dict)
    """Values of the tokens [N, T, ...], by the place of the argument. The stream has place 0."""
    left: Left = field(default_factory=dict)
    """Tensors [N, ...] that earlier mixers left. The call adds those of its own mixer."""
    _put: Left = field(default_factory=dict)

    def put_into(self, call: Call, device: torch.device, mapping: str, attention: RowChoice | None) -> Call:
        """Return the arguments of a call on a device with these. mapping: name of the argument in which mixers leave
        something for each other. attention: for which sequences the mixer, which alone uses it, is computed."""
        args, kwargs = call
        if self.values:
            args = tuple(self.values.get(place, value) for place, value in enumerate(args, start=1))
        if mapping:
            left = {key: tuple(one.to(device) for one in tensors) for key, tensors in self.left.items()}
            self._put = {key: tuple(_computed(one, attention) for one in left[key]) for key in left}
            kwargs = {**kwargs, mapping: type(kwargs[mapping])(self._put)}
        return args, kwargs

    def take_from(self, mapping: MutableMapping[str, tuple[Tensor, ...]], attention: RowChoice | None) -> None:
        """Note what the mixer of a call left in its mapping."""
        new = {key: tensors for key, tensors in mapping.items() if tensors is not self._put.get(key)}
        self.left = {**self.left, **{key: tuple(_received(one, attention) for one in new[key]) for key in new}}


def _computed(values: Tensor, attention: RowChoice | None) -> Tensor:
    return values if attention is None else values.index_select(0, attention.computed)


def _received(values: Tensor, attention: RowChoice | None) -> Tensor:
    """Return the values of the computed sequences [C, ...] for all N that receive them."""
    if attention is None:
        return values
    found = values.new_zeros(attention.num_sequences, *values.shape[1:])
    return found.index_copy_(0, attention.receivers, values.index_select(0, attention.sources))


class Beside:
    """For the rows of a sweep over W windows, each in a slot of its own."""

    def __init__(self, values: Sequence[Mapping[int, Tensor]]) -> None:
        """values: for each layer, values of the windows' tokens [W, T, ...] by the place of the argument."""
        self._values = values
        self._left: dict[int, dict[str, tuple[Tensor, ...]]] = {}
        """By slot. Rows that have forked share the tensors [W, ...] that were left before."""

    def of(self, layer: int, slots: Sequence[int]) -> Given:
        """Return what a call of a layer is given for the rows in these slots."""
        values = {place: torch.cat([value] * len(slots)) for place, value in self._values[layer].items()}
        if not self._left:
            return Given(values)
        left = [self._left.get(slot, {}) for slot in slots]
        return Given(values, {key: _joined([one[key] for one in left]) for key in left[0]})

    def having(self, left: Left) -> Beside:
        """Return the same for one row in slot 0, for which earlier mixers left these tensors [W, ...]."""
        found = Beside(self._values)
        found._left[0] = dict(left)
        return found

    def note(self, given: Given, slots: Sequence[int]) -> None:
        """Note what a call left for the rows that it put into these slots."""
        if not given.left:
            return
        for row, slot in enumerate(slots):
            self._left[slot] = {key: _row(tensors, row, len(slots)) for key, tensors in given.left.items()}


def _joined(rows: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def _row(tensors: tuple[Tensor, ...], row: int, num_rows: int) -> tuple[Tensor, ...]:
    return tuple(tensor.unflatten(0, (num_rows, -1))[row] for tensor in tensors)
