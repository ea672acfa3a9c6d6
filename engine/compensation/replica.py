"""The replica of a compensation: leads the streams of its windows through the model, and returns sums over them.

A part of the text is a range of windows. A replica keeps the streams of the parts that it works on, so that each block
runs once per part. With the replica they are lost; another one then starts again at the embedding, with all weights
fitted so far, and gets the same bits.

Shapes: W windows of a part, N windows of a call, T tokens, H hidden size, D input size of the projections of a stage.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.compensation.in_place import InPlace
from blockpruner.engine.compensation.least_squares import Sums
from blockpruner.engine.compensation.projections import Projections, find_projections, through_norm
from blockpruner.engine.compensation.stages import Stages
from blockpruner.engine.compensation.walk import DENSE, Changed, Seen, run_stage
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.full_memory import within_memory
from blockpruner.engine.model.holding import devices_of, load_decoder, while_loading
from blockpruner.engine.model.narrowing_check import check_narrowable
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import Placement

TOKENS_PER_CALL = {"cpu": 4096, "cuda": 8192}
"""Tokens in one call of a block. Fixed for each kind of device, because the sums depend on it in their last bits."""
SMALLEST = 1e-4
"""A token whose target is smaller than this, relative to the median of its call, counts as if it were that large."""
Fitted = Mapping[int, Sequence[Changed]]
"""For each fitted stage, by its number, the weights of each pruned stream."""


@dataclass(frozen=True, eq=False)
class SumsUnit:
    """Sum one stage over one part of the text."""

    first: int
    """First window."""
    stop: int
    """One past the last window."""
    stage: int
    of_dense: bool
    """Whether to sum over the dense model's stream."""
    num_streams: int
    """Number of pruned streams, each with its own weights."""
    fitted: Fitted
    """The weights of the last fitted stage before this one, or of all of them."""
    is_whole: bool
    """Whether `fitted` has all stages, so that a replica can start at the embedding."""
    run: int
    """Which fit this is of those that the replica works on, one after the other."""
    flops: float

    @property
    def home(self) -> tuple[int, int, int]:
        """Units with the same home run on the same replica, as long as it lives."""
        return self.run, self.first, self.stop

    def __str__(self) -> str:
        return f"stage {self.stage} of windows {self.first}..{self.stop - 1}"


@dataclass(frozen=True, eq=False)
class StagesUnit:
    """Describe the stages to fit."""

    flops: float = 0.0

    @property
    def home(self) -> None:
        return None

    def __str__(self) -> str:
        return "the stages of the model"


@dataclass(frozen=True, eq=False)
class LossUnit:
    """Score changed weights on some windows."""

    first: int
    stop: int
    shared: Changed | None
    """The changed weights, the same for all windows. A scorer sends them once."""
    name: str
    flops: float

    @property
    def home(self) -> None:
        return None

    def __str__(self) -> str:
        return f"the loss of {self.name} on windows {self.first}..{self.stop - 1}"


@dataclass(frozen=True)
class StageSums:
    """Sums over a part of the text, or over all of it."""

    dense: Sums | None
    """Over the dense model's stream; None if they were not asked for."""
    pruned: tuple[Sums, ...]
    """Over each pruned stream."""

    def __add__(self, other: StageSums) -> StageSums:
        dense = self.dense + other.dense if self.dense is not None and other.dense is not None else None
        return StageSums(dense, tuple(mine + yours for mine, yours in zip(self.pruned, other.pruned, strict=True)))


@dataclass(frozen=True, kw_only=True)
class CompensationSpec:
    """Which model a replica of a compensation holds, and on which devices."""

    model: ModelSource
    """The dense model: the source that `loading.materialize` returned."""
    mask: Mask
    kept: ChannelOrder | None = None
    """The channels and heads that the narrower blocks of the mask have."""
    tokens_per_call: int
    dtype: str
    device: str
    placement: Placement = Placement.RESIDENT
    num_devices: int = 1
    threads: int

    def open(self, data: Tensor) -> CompensationReplica:
        """Load the model. data: token ids of the windows [num_windows, seq_len]."""
        torch.set_num_threads(self.threads)
        with while_loading(self.placement):
            decoder = load_decoder(self.model, self.dtype, self.placement, devices_of(self.device, self.num_devices))
            on_device = self.placement is not Placement.STREAMED
            return CompensationReplica(
                decoder, data, self.mask, self.tokens_per_call, kept=self.kept, on_device=on_device
            )


@dataclass
class _Part:
    """The streams of a part, in host memory."""

    stage: int
    """The stage that reads the streams next."""
    dense: Tensor
    """[W, T, H]"""
    pruned: list[Tensor | None]
    """[W, T, H] each. None: still the dense model's."""
    target: Tensor | None = None
    """The dense model's stream [W, T, H] at the next stage with a kept block, once it is known."""


class CompensationReplica:
    """Owns one copy of the dense model and runs units with it. It does not know where it runs."""

    def __init__(
        self,
        decoder: Decoder,
        windows: Tensor,
        mask: Mask,
        tokens_per_call: int,
        *,
        found: Projections | None = None,
        kept: ChannelOrder | None = None,
        on_device: bool = True,
    ) -> None:
        """windows: token ids [num_windows, seq_len]. found: the output projections of a model that was checked before.
        kept: the channels and heads that its narrower blocks have; `release` brings the model's back into their own
        order. on_device: see `InPlace`. Raises UserError if the model's blocks cannot be removed, or if none of the
        others can be fitted."""
        if found is None:
            check_removable(decoder)
            found = find_projections(decoder)
        if kept is not None:
            check_narrowable(decoder, tuple({block.kind for block in kept.blocks}))
            decoder.put_in_order(kept)
        self._decoder, self._windows = decoder, windows
        self._in_place = InPlace(decoder, found, on_device=on_device)
        self.stages = Stages.of(decoder, mask, found)
        self._wide = torch.promote_types(decoder.model.dtype, torch.float32)
        self._windows_per_call = max(1, tokens_per_call // windows.shape[1])
        self._parts: dict[tuple[int, int, int], _Part] = {}

    def score(self, unit: StagesUnit | SumsUnit | LossUnit) -> tuple[Any, float]:
        """Return what the unit asks for, and the seconds taken. Raises DeviceMemoryError.

        For SumsUnit a StageSums, or None if this replica needs a unit that `is_whole`; for LossUnit the summed token
        losses of each window, in nats; for StagesUnit the stages to fit, and the blocks that cannot be, with reasons.
        """
        start = time.perf_counter()

        def answer() -> Any:
            with torch.inference_mode(), self._decoder.selective():
                if isinstance(unit, SumsUnit):
                    return self._sums(unit)
                if isinstance(unit, LossUnit):
                    return self._losses(unit)
                return self.stages.to_fit, self.stages.reasons

        return within_memory(answer, self._decoder.device), time.perf_counter() - start

    def free_bytes(self) -> int | None:
        return self._decoder.free_bytes()

    def release(self) -> None:
        """Bring the channels of the model back into their own order."""
        self._decoder.put_in_order(None)

    def _sums(self, unit: SumsUnit) -> StageSums | None:
        part = self._part(unit)
        if part is None:
            return None
        self._lead(part, unit)
        part.target = torch.empty_like(part.dense)
        dense: Sums | None = None
        pruned: list[Sums | None] = [None] * unit.num_streams
        for some in self._calls(len(part.dense)):
            before = self._put(part.dense[some])
            target, own = self._to_next(before, unit.stage)
            part.target[some] = target.to(part.target.device)
            if unit.of_dense:
                dense = _plus(dense, self._sum(unit.stage, before, target, own))
            for number, stream in enumerate(part.pruned):
                mine = before if stream is None else self._put(stream[some])
                pruned[number] = _plus(pruned[number], self._sum(unit.stage, mine, target))
        return StageSums(None if dense is None else dense.cpu(), tuple(one.cpu() for one in pruned if one is not None))

    def _part(self, unit: SumsUnit) -> _Part | None:
        """Return the streams of a unit's part, if they can be led to its stage."""
        part = self._parts.get(unit.home)
        if unit.is_whole or (not unit.fitted and part is None):
            ids = self._windows[unit.first : unit.stop]
            calls = [self._decoder.embed(self._put(ids[some])).cpu() for some in self._calls(len(ids))]
            self._parts = {home: old for home, old in self._parts.items() if home[0] == unit.run}
            part = self._parts[unit.home] = _Part(0, torch.cat(calls), [None] * unit.num_streams)
        elif part is not None and part.stage not in (unit.stage, *unit.fitted):
            return None  # it worked on this part some stages ago, and does not know what was fitted since
        return part

    def _lead(self, part: _Part, unit: SumsUnit) -> None:
        """Lead the streams of a part to the stage of a unit, one kept stage after the other."""
        while part.stage < unit.stage:
            changes = [self._ready(changed) for changed in unit.fitted.get(part.stage, [])]
            if self.stages.is_before_gap(part.stage):  # from here on they differ
                part.pruned = [part.dense.clone() if stream is None else stream for stream in part.pruned]
            ahead = torch.empty_like(part.dense) if part.target is None else part.target
            for some in self._calls(len(part.dense)):
                if part.target is None:
                    ahead[some] = self._to_next(self._put(part.dense[some]), part.stage)[0].to(ahead.device)
                for number, stream in enumerate(part.pruned):
                    if stream is not None:
                        changed = changes[number] if changes else {}
                        found, _ = self._run(part.stage, self._put(stream[some]), changed)
                        stream[some] = found.to(stream.device)
            part.stage, part.dense, part.target = self.stages.after(part.stage), ahead, None

    def _to_next(self, stream: Tensor, stage: int) -> tuple[Tensor, tuple[Tensor, dict[Block, Seen]]]:
        """Lead a stream [N, T, H] of the dense model from a stage to the next one with a kept block. Also returns what
        the stage itself gave."""
        after, seen = self._run(stage, stream, {}, is_dense=True)
        target = after
        for later in range(stage + 1, self.stages.after(stage)):
            target, _ = self._run(later, target, {}, is_dense=True)
        return target, (after, seen)

    def _sum(
        self,
        stage: int,
        stream: Tensor,
        target: Tensor,
        known: tuple[Tensor, dict[Block, Seen]] | None = None,
    ) -> Sums:
        """Sum over the tokens of some windows. stream: that before the stage [N, T, H]. target: where it should lead
        [N, T, H]. known: what the stage gives for the stream if no block is absent.

        An error counts relative to the size of the target, because a norm divides by it before the next block.
        """
        if known is None or self.stages.is_changed(stage):
            known = self._run(stage, stream, {})
        after, seen = known
        target = target.to(after.device, self._wide)
        residual, sizes = target - after.to(self._wide), target.square().mean(-1)
        weights = 1 / sizes.clamp_min(SMALLEST * sizes.median())
        columns = []
        for block in self.stages.fitted(stage):
            projection = self.stages.projections[block]
            columns.append(projection.scale * seen[block].input.to(self._wide))
            if projection.gain is not None:
                output = seen[block].output.to(self._wide)
                residual, weights = through_norm(residual, weights, output, projection.gain.to(output.device))
        if any(self.stages.projections[block].weights.bias is not None for block in self.stages.fitted(stage)):
            columns.append(torch.ones_like(columns[0][..., :1]))
        return Sums.of(torch.cat(columns, dim=-1).flatten(0, 1), residual.flatten(0, 1), weights.flatten())

    def _losses(self, unit: LossUnit) -> list[float]:
        """Sum the token losses of each window of a pruned model with changed weights, in nats."""
        sums: list[float] = []
        assert unit.shared is not None
        self._in_place.put(unit.name, unit.shared)
        try:
            for window in self._windows[unit.first : unit.stop]:
                ids = self._put(window.unsqueeze(0))
                stream = self._decoder.embed(ids)
                for stage in range(len(self.stages.all)):
                    stream, _ = self._run(stage, stream, {})
                logits = self._decoder.logits(stream[:, :-1].to(self._decoder.device))
                sums.append(float(PPL.token_losses(logits, ids[:, 1:], None).sum(dtype=torch.float64)))
        finally:
            self._in_place.take_out()
        return sums

    def _run(
        self, stage: int, stream: Tensor, changed: Changed, *, is_dense: bool = False
    ) -> tuple[Tensor, dict[Block, Seen]]:
        blocks = self.stages.all[stage] if is_dense else self.stages.kept(stage)
        mask = DENSE if is_dense else self.stages.mask
        return run_stage(self._decoder, blocks, stream, self.stages.projections, changed, mask)

    def _ready(self, changed: Changed) -> Changed:
        """Return weights in the dtype of the model, on the devices of their layers."""
        devices, dtype = self._decoder.layer_devices, self._decoder.model.dtype
        return {block: weights.to(devices[block.layer], dtype) for block, weights in changed.items()}

    def _calls(self, num_windows: int) -> Iterator[slice]:
        size = self._windows_per_call
        yield from (slice(first, min(first + size, num_windows)) for first in range(0, num_windows, size))

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._decoder.device)


def _plus(before: Sums | None, more: Sums) -> Sums:
    return more if before is None else before + more
