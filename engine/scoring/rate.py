"""Measure how fast this machine scores a model, on copies of a few layers with random weights: no weight files
needed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.few_layers import with_few_layers
from blockpruner.engine.model.loading import DTYPES
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.sweep import plan_sweep
from blockpruner.engine.work.units import (
    GPU_HEAD_TOKENS_PER_CALL,
    GPU_TOKENS_PER_CALL,
    HEAD_TOKENS_PER_CALL,
    TOKENS_PER_CALL,
)

REPEATS = 3
CPU_HEAD_FLOPS = 2**40
"""Of all heads of one pass on a CPU, some five seconds: with a vocabulary of 262,144, windows are shortened for it."""
SHORTEST = 128
LAYERS = (2, 4)
"""Numbers of layers of the two copies. The difference between their times is the cost of the layers."""


@dataclass(frozen=True)
class Rate:
    """FLOPs per second of one replica. The head is slower than the layers because of its float32 log-softmax."""

    layers: float
    head: float

    def seconds(self, layer_flops: float, head_flops: float) -> float:
        return layer_flops / self.layers + head_flops / self.head


def measure_rate(
    config: PreTrainedConfig, source: ModelSource, *, dtype: str, device: str, seq_len: int, threads: int
) -> Rate:
    """Time forked passes over a window of at most `seq_len` tokens. Takes seconds, and the memory of four layers and
    the head."""
    torch.set_num_threads(threads)
    masks = _masks(Decoder(_copy_of(config, LAYERS[1], dtype, "meta", source)).shape, LAYERS[0])
    few, many = (
        _time_sweep(config, source, masks, layers, dtype=dtype, device=device, seq_len=seq_len) for layers in LAYERS
    )
    # The difference of two noisy times must not be negative or close to zero.
    layers = (many.layer_flops - few.layer_flops) / max(many.seconds - few.seconds, 0.05 * many.seconds)
    head_s = max(few.seconds - few.layer_flops / layers, 0.05 * few.seconds)
    return Rate(layers=layers, head=few.head_flops / head_s)


@dataclass(frozen=True)
class _Sweep:
    seconds: float
    layer_flops: float
    head_flops: float


def _time_sweep(
    config: PreTrainedConfig,
    source: ModelSource,
    masks: Sequence[Mask],
    num_layers: int,
    *,
    dtype: str,
    device: str,
    seq_len: int,
) -> _Sweep:
    decoder = Decoder(_copy_of(config, num_layers, dtype, device, source))
    if device == "cpu":
        seq_len = min(seq_len, max(SHORTEST, CPU_HEAD_FLOPS // (len(masks) * decoder.shape.head_flops(1))))
    window = torch.arange(seq_len, device=device)[None] % config.vocab_size
    call_tokens, head_tokens = (
        (TOKENS_PER_CALL, HEAD_TOKENS_PER_CALL) if device == "cpu" else (GPU_TOKENS_PER_CALL, GPU_HEAD_TOKENS_PER_CALL)
    )
    call_shape = CallShape(sequences_per_call=max(1, call_tokens // seq_len), tokens_per_head_call=head_tokens)
    forked = ForkedPass(decoder, call_shape)
    times = []
    for _ in range(REPEATS + 1):  # the first one is a warm-up
        start = time.perf_counter()
        forked.window_sums(masks, window).tolist()
        times.append(time.perf_counter() - start)
    head_flops = len(masks) * decoder.shape.head_flops(seq_len)
    flops = plan_sweep(masks, num_layers).flops(decoder.shape, seq_len)
    return _Sweep(statistics.median(times[1:]), flops - head_flops, head_flops)


def _masks(shape: ModelShape, num_layers: int) -> Sequence[Mask]:
    """All masks over the first layers that keep at least one block of them. They give many rows that fork early."""
    blocks = [block for block in shape.candidates(Granularity.MIX) if block.layer < num_layers]
    return [Mask.of(absent) for size in range(len(blocks)) for absent in combinations(blocks, size)]


def _copy_of(
    config: PreTrainedConfig, num_layers: int, dtype: str, device: str, source: ModelSource
) -> PreTrainedModel:
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(
                with_few_layers(config, num_layers),
                dtype=DTYPES[dtype],
                trust_remote_code=source.trust_remote_code,
            )
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:  # few layers may be too few
        raise UserError(
            f"cannot measure with {num_layers} layers of a model of type {config.model_type!r} "
            f"({type(error).__name__}: {first_line(error)[:200]}); set `tflops`."
        ) from error
