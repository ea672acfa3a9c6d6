"""The forked pass: compute the token losses of many masks in one sweep over the layers.

The result is exact: every row goes through the same operations as a forward pass without the mask's blocks.
Shapes: S slots, W windows, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from blockpruner.engine.blocks import Mask
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.given import Beside
from blockpruner.engine.model.selecting import RowChoice
from blockpruner.engine.work.sweep import Child, Family, SweepPlan, plan_sweep


@dataclass(frozen=True, kw_only=True)
class CallShape:
    """Size of one call. It is fixed for a run, because some kernels give different bits for different shapes."""

    sequences_per_call: int
    """Sequences (rows x windows) in one call of a layer. A call holds at least one family of rows."""
    tokens_per_head_call: int
    """Tokens in one call of the vocabulary head, whose logits are the largest tensor."""


class ForkedPass:
    """Scores sets of masks on a decoder."""

    def __init__(self, decoder: Decoder, call_shape: CallShape) -> None:
        self.decoder = decoder
        self.call_shape = call_shape
        self._dense: dict[tuple[int, ...], Tensor] = {}
        """Final streams [T, H] of the dense model, by the token ids of the window."""

    @torch.inference_mode()
    def window_sums(self, masks: Sequence[Mask], windows: Tensor, metric: Metric = PPL) -> Tensor:
        """Sum the token losses of each window under each mask, in nats.

        masks: M masks. windows: token ids [W, T] on the decoder's device. Returns sums over the T - 1 predicted tokens,
        float64 [M, W] on that device.
        """
        plan = self._plan(masks)
        streams = self._final_streams(plan, windows)
        dense = self._dense_stream(windows) if metric.needs_dense else None
        sums = self._loss_sums(streams, windows, metric, dense)
        return sums.index_select(0, _indices(plan.slot_of, sums.device))

    def _plan(self, masks: Sequence[Mask]) -> SweepPlan:
        for mask in masks:
            self.decoder.shape.check_needed(mask)
        return plan_sweep(masks, len(self.decoder.layers), has_rest=self.decoder.architecture.has_rest)

    def _final_streams(self, plan: SweepPlan, windows: Tensor) -> Tensor:
        """Return the streams [S, W, T, H] after the last layer."""
        embedded, beside = self.decoder.start(windows)
        streams = embedded.new_empty(plan.num_slots, *embedded.shape)
        streams[0] = embedded
        with self.decoder.selective():
            for layer, families in enumerate(plan.layers):
                streams = streams.to(self.decoder.layer_devices[layer])
                for batch in self._batches(families, windows):
                    self._run(layer, batch, streams, beside)
        return streams.to(windows.device)

    def _dense_stream(self, windows: Tensor) -> Tensor:
        """Return the dense model's final stream [W, T, H]. It is cached in host memory. The logits, hundreds of times
        as large, are recomputed when needed, so the full distributions stay available."""
        found = []
        for window in windows:
            key = tuple(window.tolist())
            if key not in self._dense:
                plan = self._plan([Mask()])
                self._dense[key] = self._final_streams(plan, window.unsqueeze(0))[0, 0].cpu()
            found.append(self._dense[key])
        return torch.stack(found).to(windows.device)

    def _batches(self, families: Sequence[Family], windows: Tensor) -> Iterator[list[Family]]:
        """Batch families into calls of the call shape. A family is never split, so its attention runs once."""
        max_rows = max(1, self.call_shape.sequences_per_call // windows.shape[0])
        batch: list[Family] = []
        num_rows = 0
        for family in families:
            if batch and num_rows + len(family.children) > max_rows:
                yield batch
                batch, num_rows = [], 0
            batch.append(family)
            num_rows += len(family.children)
        if batch:
            yield batch

    def _run(self, layer: int, families: list[Family], streams: Tensor, beside: Beside) -> None:
        """Run one layer for some families and write the slots of their children in `streams` [S, W, T, H]."""
        children = [child for family in families for child in family.children]
        parents = [family.parent for family in families for _ in family.children]
        attention = mlp = None
        num_windows, device = streams.shape[1], streams.device
        if not all(child.mha and not child.mha_lacks for child in children) or len(children) > len(families):
            attention = _choose_attention(families, num_windows, device)
        if not all(child.mlp and not child.mlp_lacks for child in children):
            mlp = _choose_mlp(children, num_windows, device)
        given, stream = beside.of(layer, parents), _rows(streams, parents).flatten(0, 1)
        output = self.decoder.run_layer(layer, stream, attention=attention, mlp=mlp, given=given)
        beside.note(given, [child.slot for child in children])
        _write_rows(streams, children, output)

    def _loss_sums(self, streams: Tensor, windows: Tensor, metric: Metric, dense: Tensor | None) -> Tensor:
        """Turn final streams [S, W, T, H], the dense model's stream [W, T, H] and token ids [W, T] into loss sums,
        float64 [S, W]."""
        num_windows, num_targets = windows.shape[0], windows.shape[1] - 1
        size = self.call_shape.tokens_per_head_call
        windows_per_call = max(1, size // num_targets)
        sums = streams.new_zeros(len(streams), num_windows, dtype=torch.float64)
        for first in range(0, num_windows, windows_per_call):
            some = slice(first, first + windows_per_call)
            losses: list[list[Tensor]] = [[] for _ in streams]
            for part in _parts(num_targets, size):
                reference = None if dense is None else self.decoder.logits(dense[some, part])
                for stream, parts in zip(streams, losses, strict=True):
                    logits = self.decoder.logits(stream[some, part])
                    targets = windows[some, part.start + 1 : part.stop + 1]
                    parts.append(metric.token_losses(logits, targets, reference))
            for slot, parts in enumerate(losses):
                sums[slot, some] = torch.cat(parts, dim=1).sum(dim=1, dtype=torch.float64)
        return sums


def _parts(length: int, size: int) -> list[slice]:
    """Cut `length` tokens into the fewest nearly equal parts of at most `size`. This avoids a short tail of a few rows,
    for which some kernels round differently."""
    count = -(-length // size)
    bounds = [index * length // count for index in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _rows(streams: Tensor, slots: list[int]) -> Tensor:
    """Return the streams of the given slots [n, W, T, H], as a view if the slots are consecutive."""
    if slots == list(range(slots[0], slots[0] + len(slots))):
        return streams[slots[0] : slots[0] + len(slots)]
    return streams.index_select(0, _indices(slots, streams.device))


def _indices(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Copy indices to the device. A GPU copy uses pinned memory, since an ordinary copy would wait for queued work."""
    indices = torch.tensor(numbers, dtype=torch.long)
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices.to(device)


def _write_rows(streams: Tensor, children: list[Child], output: Tensor) -> None:
    for child, rows in zip(children, output.unflatten(0, (len(children), -1)), strict=True):
        streams[child.slot] = rows


def _choose_attention(families: list[Family], num_windows: int, device: torch.device) -> RowChoice:
    """Run attention once per family and number of groups that it lacks, on the first child that keeps it so. All such
    children get the result."""
    found: dict[int, RowChoice] = {}
    for lacks in sorted({0, *(lacks for family in families for lacks in family.attentions)}):
        computed: list[int] = []
        receivers: list[int] = []
        sources: list[int] = []
        index = 0
        for family in families:
            children = enumerate(family.children, start=index)
            keepers = [place for place, child in children if child.mha and child.mha_lacks == lacks]
            index += len(family.children)
            if keepers:
                receivers += keepers
                sources += [len(computed)] * len(keepers)
                computed.append(keepers[0])
        found[lacks] = _row_choice(computed, receivers, sources, num_rows=index, num_windows=num_windows, device=device)
    return replace(found.pop(0), narrower=found)


def _choose_mlp(children: list[Child], num_windows: int, device: torch.device) -> RowChoice:
    """Run the MLP for each child that keeps it, for all children together that lack as many of its groups."""
    found: dict[int, RowChoice] = {}
    for lacks in sorted({0, *(child.mlp_lacks for child in children if child.mlp)}):
        keepers = [index for index, child in enumerate(children) if child.mlp and child.mlp_lacks == lacks]
        sources = range(len(keepers))
        found[lacks] = _row_choice(
            keepers, keepers, sources, num_rows=len(children), num_windows=num_windows, device=device
        )
    return replace(found.pop(0), narrower=found)


def _row_choice(
    computed: Sequence[int],
    receivers: Sequence[int],
    sources: Sequence[int],
    *,
    num_rows: int,
    num_windows: int,
    device: torch.device,
) -> RowChoice:
    """Convert rows to sequences: row r of a call is the sequences r x W to r x W + W - 1."""

    def sequences(rows: Sequence[int]) -> Tensor:
        return _indices([row * num_windows + window for row in rows for window in range(num_windows)], device)

    return RowChoice(sequences(computed), sequences(receivers), sequences(sources), num_rows * num_windows)
