"""How fast this machine scores a model: measured on a copy of some layers with random weights, so without its files."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import DTYPES
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.work.sweep import plan_sweep
from blockpruner.engine.work.units import (
    GPU_HEAD_TOKENS_PER_CALL,
    GPU_TOKENS_PER_CALL,
    HEAD_TOKENS_PER_CALL,
    TOKENS_PER_CALL,
)

REPEATS = 3
LAYERS = (2, 4)
"""Of the two copies: what one takes longer than the other is the cost of layers."""


@dataclass(frozen=True)
class Rate:
    """FLOPs per second of one replica. The head, with its float32 log-softmax, is slower than the layers."""

    layers: float
    head: float

    def seconds(self, layer_flops: float, head_flops: float) -> float:
        return layer_flops / self.layers + head_flops / self.head


def measure_rate(config: PreTrainedConfig, *, dtype: str, device: str, seq_len: int, threads: int) -> Rate:
    """Forked passes over a window of `seq_len` tokens; takes seconds, and the memory of four layers and the head."""
    torch.set_num_threads(threads)
    few, many = (_time_sweep(config, layers, dtype=dtype, device=device, seq_len=seq_len) for layers in LAYERS)
    # Differences of noisy times must not come out negative, nor next to nothing.
    layers = (many.layer_flops - few.layer_flops) / max(many.seconds - few.seconds, 0.05 * many.seconds)
    head_s = max(few.seconds - few.layer_flops / layers, 0.05 * few.seconds)
    return Rate(layers=layers, head=few.head_flops / head_s)


@dataclass(frozen=True)
class _Sweep:
    seconds: float
    layer_flops: float
    head_flops: float


def _time_sweep(config: PreTrainedConfig, num_layers: int, *, dtype: str, device: str, seq_len: int) -> _Sweep:
    decoder = Decoder(_copy_of(config, num_layers, dtype, device))
    masks = _masks(LAYERS[0])
    window = torch.arange(seq_len, device=device)[None] % config.vocab_size
    call_tokens, head_tokens = (
        (TOKENS_PER_CALL, HEAD_TOKENS_PER_CALL) if device == "cpu" else (GPU_TOKENS_PER_CALL, GPU_HEAD_TOKENS_PER_CALL)
    )
    call_shape = CallShape(sequences_per_call=max(1, call_tokens // seq_len), tokens_per_head_call=head_tokens)
    forked = ForkedPass(decoder, call_shape)
    times = []
    for _ in range(REPEATS + 1):  # the first one warms up
        start = time.perf_counter()
        forked.window_sums(masks, window).tolist()
        times.append(time.perf_counter() - start)
    head_flops = len(masks) * decoder.shape.head_flops(seq_len)
    flops = plan_sweep(masks, num_layers).flops(decoder.shape, seq_len)
    return _Sweep(statistics.median(times[1:]), flops - head_flops, head_flops)


def _masks(num_layers: int) -> Sequence[Mask]:
    """All masks over the first layers that keep at least one of their blocks: many rows, forked early."""
    blocks = Granularity.MIX.candidates(num_layers)
    return [Mask.of(absent) for size in range(len(blocks)) for absent in combinations(blocks, size)]


def _copy_of(config: PreTrainedConfig, num_layers: int, dtype: str, device: str) -> torch.nn.Module:
    small = copy.deepcopy(config)
    small.num_hidden_layers = num_layers
    if getattr(small, "layer_types", None) is not None:
        small.layer_types = small.layer_types[:num_layers]
    with torch.device(device):
        return AutoModelForCausalLM.from_config(small, dtype=DTYPES[dtype])
