"""Units of work: a chunk of masks x a group of windows, scored in one forked pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from engine.blocks import Kind, Mask
from engine.shape import ModelShape
from engine.sweep import plan_sweep


@dataclass(frozen=True, kw_only=True)
class KernelShape:
    """Sizes that decide what one kernel sees. Some kernels give other bits for other shapes, so these are resolved once
    at the start of a run, recorded, and used again on resume; never chosen from the number of replicas."""

    rows: int
    """Sequences (rows x windows) in one call of a layer."""
    head_tokens: int
    """Tokens in one call of the vocabulary head."""
    masks: int
    """Masks in one sweep at most: their streams lie in memory together."""
    windows: int
    """Windows in one sweep."""
    threads: int
    """CPU threads of a replica."""
    batch_invariant: bool = False
    """Whether a mask's score was seen to be the same bits in any company. Only then are chunks split further to feed
    more replicas."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


TOKENS_PER_CALL = 4096
"""On a 2-core CPU calls of 2,048 to 8,192 tokens differ by less than the noise; smaller ones lose matmul rate."""
HEAD_TOKENS_PER_CALL = 256
"""Logits of 256 x 49,152 float32 are 48 MiB; larger calls were no faster in bfloat16."""
TOKENS_PER_ROW = 256
"""Short windows are swept together up to so many tokens, so that single rows still fill the matmul units."""
STREAM_BYTES = 256 * 2**20
"""All streams of one sweep together."""


def kernel_shape(
    shape: ModelShape, *, seq_len: int, num_windows: int, bytes_per_value: int, threads: int
) -> KernelShape:
    """The default sizes for windows of `seq_len` tokens."""
    windows = min(num_windows, max(1, TOKENS_PER_ROW // seq_len))
    stream_bytes = windows * seq_len * shape.hidden_size * bytes_per_value
    return KernelShape(
        rows=max(1, TOKENS_PER_CALL // seq_len),
        head_tokens=HEAD_TOKENS_PER_CALL,
        masks=max(1, STREAM_BYTES // stream_bytes),
        windows=windows,
        threads=threads,
    )


@dataclass(frozen=True)
class WorkUnit:
    masks: tuple[Mask, ...]
    first: int
    """First window."""
    stop: int
    """One past the last window."""
    flops: int
    """Matmul FLOPs, counted before it runs."""


def split_work(
    masks: Sequence[Mask],
    shape: ModelShape,
    kernel: KernelShape,
    *,
    num_windows: int,
    seq_len: int,
    num_replicas: int,
) -> list[WorkUnit]:
    """Cut masks x windows into units.

    Windows are spread first, since they share no trunk. Chunks hold neighbours, which share the longest trunk; they are
    cut further only where there are more replicas than units and scores are batch-invariant.
    """
    ordered = sorted(set(masks), key=lambda mask: _path(mask, shape.num_layers))
    groups = _cut(num_windows, -(-num_windows // kernel.windows))
    num_chunks = -(-len(ordered) // kernel.masks)
    if kernel.batch_invariant:
        num_chunks = min(len(ordered), max(num_chunks, -(-num_replicas // len(groups))))
    units = []
    for start, end in _cut(len(ordered), num_chunks):
        chunk = tuple(ordered[start:end])
        flops = plan_sweep(chunk, shape.num_layers).flops(shape, seq_len)
        units += [WorkUnit(chunk, first, stop, flops * (stop - first)) for first, stop in groups]
    return units


def _cut(length: int, num_parts: int) -> list[tuple[int, int]]:
    """Nearly equal parts of a range, as (first, stop)."""
    return list(pairwise(index * length // num_parts for index in range(num_parts + 1)))


def _path(mask: Mask, num_layers: int) -> list[bool]:
    """Sorted by this, masks with a long common trunk are neighbours."""
    return [mask.keeps(kind, layer) for layer in range(num_layers) for kind in (Kind.MHA, Kind.MLP)]
