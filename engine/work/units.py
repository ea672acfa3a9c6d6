"""Units of work: a chunk of masks and a group of windows that are scored in one forked pass."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.sweep import plan_sweep


@dataclass(frozen=True, kw_only=True)
class KernelShape:
    """Sizes that determine the input shapes of kernels. Some kernels give different bits for different shapes, so a run
    resolves these sizes once at its start, records them, and reuses them on resume. They never depend on the number of
    replicas."""

    rows: int
    """Sequences (rows x windows) in one call of a layer."""
    head_tokens: int
    """Tokens in one call of the vocabulary head."""
    masks: int
    """Maximum number of masks in one sweep. Their streams are in memory at the same time."""
    windows: int
    """Windows in one sweep."""
    threads: int
    """CPU threads of a replica."""
    batch_invariant: bool = False
    """Whether the probe found that a mask's score has the same bits whichever masks share its batch. Only then are
    chunks split further to feed more replicas."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def halved(self) -> KernelShape | None:
        """Halve all sizes, to try after a device ran out of memory. Returns None if all sizes are at their minimum."""
        sizes = ("rows", "head_tokens", "masks", "windows")
        smaller = replace(self, **{name: max(1, getattr(self, name) // 2) for name in sizes})
        return None if smaller == self else smaller


TOKENS_PER_CALL = 4096
"""On a 2-core CPU, calls of 2,048 to 8,192 tokens differ by less than the noise; smaller calls lower the matmul
rate."""
HEAD_TOKENS_PER_CALL = 256
"""Logits of 256 x 49,152 float32 are 48 MiB; larger calls were no faster in bfloat16."""
TOKENS_PER_ROW = 256
"""Short windows are swept together up to this many tokens, so that single rows still fill the matmul units."""
STREAM_BYTES = 256 * 2**20
"""Maximum bytes of all streams of one sweep, on a CPU."""
GPU_TOKENS_PER_CALL = 16384
GPU_HEAD_TOKENS_PER_CALL = 2048
"""Larger calls fill a GPU. The GPU values are not tuned by measurement."""
MOST_ROUNDS = 4
"""Maximum number of units per replica from windows whose masks are split. Beyond it, repeated trunks cost more than
idle replicas."""
DEVICE_SHARE = 0.9
"""Share of a GPU's memory to use. The rest is left for the driver, the allocator and other processes."""


def kernel_shape(
    shape: ModelShape,
    *,
    seq_len: int,
    num_windows: int,
    bytes_per_value: int,
    threads: int,
    free_bytes: int | None = None,
) -> KernelShape:
    """Choose the sizes for windows of `seq_len` tokens.

    free_bytes: free memory of a GPU that already holds the weights; None for a CPU, where caches matter more than
    memory. On a GPU, half of it is for the streams of a sweep and the rest for the calls. Sizes are powers of two, so
    that a GPU with slightly less free memory gets the same sizes. Raises UserError if even the smallest sweep does not
    fit.
    """
    windows = min(num_windows, windows_per_row(seq_len))
    stream_bytes = windows * seq_len * (shape.hidden_size + shape.left_width) * bytes_per_value
    if free_bytes is None:
        rows, head_tokens = TOKENS_PER_CALL // seq_len, HEAD_TOKENS_PER_CALL
        masks = STREAM_BYTES // stream_bytes
    else:
        usable = DEVICE_SHARE * free_bytes - windows * seq_len * shape.token_width * bytes_per_value
        call_tokens = min(GPU_TOKENS_PER_CALL, usable / 4 // shape.activation_bytes(bytes_per_value, seq_len))
        rows = _power_of_two(call_tokens / seq_len)
        head_tokens = _power_of_two(min(GPU_HEAD_TOKENS_PER_CALL, usable / 4 / shape.logit_bytes(bytes_per_value)))
        masks = _power_of_two(usable / 2 / stream_bytes)
    kernel = KernelShape(
        rows=max(1, rows), head_tokens=max(1, head_tokens), masks=max(1, masks), windows=windows, threads=threads
    )
    if free_bytes is not None:
        needed = sweep_bytes(shape, kernel, seq_len=seq_len, bytes_per_value=bytes_per_value)
        if needed > usable:
            raise UserError(
                f"expected {needed / 2**30:.1f} GiB of device memory for the smallest sweep over windows of {seq_len} "
                f"tokens in addition to the weights, {(needed - usable) / 2**30:.1f} GiB more than is available; use "
                f"`placement=streamed`, more `gpus_per_replica`, or a smaller `seq_len`."
            )
    return kernel


def windows_per_row(seq_len: int) -> int:
    """Number of windows that are swept together."""
    return max(1, TOKENS_PER_ROW // seq_len)


def window_groups(num_windows: int, most: int) -> list[range]:
    """All windows in nearly equal groups of at most `most` neighbours. A search draws samples from these groups, and
    the windows of a group are swept together."""
    return [range(first, stop) for first, stop in cut(num_windows, -(-num_windows // most))]


def _power_of_two(number: float) -> int:
    """Return the largest power of two that is at most `number`; 0 if `number` is below 1."""
    return 1 << int(number).bit_length() - 1 if number >= 1 else 0


def sweep_bytes(shape: ModelShape, kernel: KernelShape, *, seq_len: int, bytes_per_value: int) -> int:
    """Approximate bytes of one sweep in addition to the weights: the streams, and the largest call of a layer or of the
    head. A stream can have three children, which stay in one call."""
    widths = kernel.masks * (shape.hidden_size + shape.left_width) + shape.token_width
    streams = kernel.windows * seq_len * widths * bytes_per_value
    rows = max(kernel.rows, 3 * kernel.windows)
    call = rows * seq_len * shape.activation_bytes(bytes_per_value, seq_len)
    return streams + max(call, kernel.head_tokens * shape.logit_bytes(bytes_per_value))


@dataclass(frozen=True)
class WorkUnit:
    masks: tuple[Mask, ...]
    first: int
    """First window."""
    stop: int
    """One past the last window."""
    flops: int
    """Matmul FLOPs, known before the unit runs."""
    kernel: KernelShape
    """Sizes of the calls."""

    @property
    def home(self) -> None:
        return None

    def __str__(self) -> str:
        return f"windows {self.first}..{self.stop - 1} of masks {self.masks[0]} ... {self.masks[-1]}"


def make_unit(
    masks: Sequence[Mask],
    first: int,
    stop: int,
    shape: ModelShape,
    kernel: KernelShape,
    seq_len: int,
) -> WorkUnit:
    return WorkUnit(tuple(masks), first, stop, sweep_flops(masks, shape, seq_len) * (stop - first), kernel)


def sweep_flops(masks: Sequence[Mask], shape: ModelShape, seq_len: int, metric: Metric = PPL) -> int:
    """Matmul FLOPs of one sweep over one window. For a metric that needs the dense model, this includes the dense
    logits: the dense final stream is cached, but its logits are recomputed in every sweep."""
    dense = shape.head_flops(seq_len) if metric.needs_dense else 0
    return plan_sweep(masks, shape.num_layers).flops(shape, seq_len) + dense


def split_work(
    masks: Sequence[Mask],
    shape: ModelShape,
    kernel: KernelShape,
    *,
    groups: Sequence[range],
    seq_len: int,
    num_replicas: int,
    metric: Metric = PPL,
) -> list[WorkUnit]:
    """Split masks x groups of windows into units.

    The work is split by windows first, because windows share no trunk. Chunks hold neighbouring masks, which share the
    longest trunk. If scores are batch-invariant, chunks are split further when that finishes sooner, even though it
    computes more.
    """
    ordered = sorted(set(masks), key=lambda mask: _path(mask, shape.num_layers))
    groups = [
        range(group[part.start], group[part.stop - 1] + 1)
        for group in groups
        for part in window_groups(len(group), kernel.windows)
    ]
    fewest = -(-len(ordered) // kernel.masks)
    cuts = {(0, fewest)}
    if kernel.batch_invariant:
        # Consider splitting the masks of the windows in the last one or two rounds, or of all windows.
        rest = len(groups) % num_replicas
        for num_cut in {rest, min(len(groups), rest + num_replicas), len(groups)} - {0}:
            for multiple in range(1, MOST_ROUNDS + 1):
                number = max(fewest, -(-multiple * num_replicas // num_cut))
                cuts.add((num_cut, min(len(ordered), number)))
    chunks = {
        number: _chunks(ordered, number, shape, seq_len, metric) for number in {fewest, *(cut[1] for cut in cuts)}
    }

    def units(num_cut: int, number: int) -> list[WorkUnit]:
        whole, cut = groups[: len(groups) - num_cut], groups[len(groups) - num_cut :]
        parts = [*((chunk, whole) for chunk in chunks[fewest]), *((chunk, cut) for chunk in chunks[number])]
        return [
            WorkUnit(masks, group.start, group.stop, flops * len(group), kernel)
            for (masks, flops), windows in parts
            for group in windows
        ]

    options = [units(*cut) for cut in sorted(cuts)]
    return min(options, key=lambda option: makespan([unit.flops for unit in option], num_replicas))


def _chunks(
    ordered: Sequence[Mask], number: int, shape: ModelShape, seq_len: int, metric: Metric
) -> list[tuple[tuple[Mask, ...], int]]:
    """Cut the masks into nearly equal chunks of neighbours, each with its FLOPs for one window."""
    chunks = [tuple(ordered[start:end]) for start, end in cut(len(ordered), number)]
    return [(chunk, sweep_flops(chunk, shape, seq_len, metric)) for chunk in chunks]


def makespan(costs: Sequence[float], num_replicas: int) -> float:
    """Return the time at which the last replica finishes if each free replica takes the longest remaining unit."""
    busy_until = [0.0] * num_replicas
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(busy_until, busy_until[0] + cost)
    return max(busy_until)


def cut(length: int, num_parts: int) -> list[tuple[int, int]]:
    """Cut a range into nearly equal parts, as (first, stop)."""
    return list(pairwise(index * length // num_parts for index in range(num_parts + 1)))


def _path(mask: Mask, num_layers: int) -> list[tuple[bool, int]]:
    """Sort key that makes masks with a long common trunk neighbours."""
    lacking, kinds = mask.lacking, (Kind.MHA, Kind.MLP)
    blocks = [Block(kind, layer) for layer in range(num_layers) for kind in kinds]
    return [(mask.keeps(block.kind, block.layer), -lacking.get(block, 0)) for block in blocks]
