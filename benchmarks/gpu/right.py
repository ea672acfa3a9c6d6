"""Right: forked scores are those of full forwards, placements and repeats agree to the bit, two replicas equal one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.part import Report, Setting
from blockpruner.cluster.session import ray_session
from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.holding import devices_of, load_decoder
from blockpruner.engine.model.loading import DTYPES
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.scoring.probe import is_batch_invariant
from blockpruner.engine.scoring.reference import plain_window_sum
from blockpruner.engine.scoring.scorer import LocalScorer
from blockpruner.engine.scoring.scoring import ScoringReplica, ScoringSpec
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import Placement
from blockpruner.engine.work.units import KernelShape, WorkUnit, kernel_shape, make_unit

NUM_WINDOWS = 2
WITHIN = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
"""Nats per token by which a forked score may differ from a full forward."""


def scores(setting: Setting, report: Report) -> None:
    for dtype in dict.fromkeys((setting.dtype, "float32")):
        decoder = _decoder(setting, dtype, Placement.RESIDENT)
        check_removable(decoder)
        windows, masks = _windows(setting, decoder), _masks(decoder.shape.num_layers)
        forked = _forked(setting, decoder, dtype)
        sums = forked.window_sums(masks, windows)
        with torch.inference_mode():
            plain = [[plain_window_sum(prune(decoder.model, mask), window) for window in windows] for mask in masks]
        error = (sums.cpu() - torch.tensor(plain, dtype=torch.float64)).abs().max().item() / (setting.seq_len - 1)
        report.figures[f"error_nats_{dtype}"] = error
        report.figures[f"num_different_scores_{dtype}"] = len(set(map(tuple, sums.tolist())))
        report.add(
            f"forked scores against full forwards with the blocks absent, {dtype}",
            f"within {WITHIN[dtype]:g} nats a token", f"{error:.1e}", is_kept=error <= WITHIN[dtype],
        )  # fmt: skip
        again = torch.equal(forked.window_sums(masks, windows), sums)
        report.add(f"the same sweep again, {dtype}", "same bits", _bits(again), is_kept=again)


def placements(setting: Setting, report: Report) -> None:
    """Sharded over two halves on one device."""
    found: dict[Placement, Tensor] = {}
    for placement in Placement:
        decoder = _decoder(setting, setting.dtype, placement)
        forked = _forked(setting, decoder, setting.dtype)
        found[placement] = forked.window_sums(_masks(decoder.shape.num_layers), _windows(setting, decoder)).cpu()
        del decoder, forked
    for placement in (Placement.STREAMED, Placement.SHARDED):
        is_same = torch.equal(found[placement], found[Placement.RESIDENT])
        report.add(f"{placement} against resident", "same bits", _bits(is_same), is_kept=is_same)


def invariance(setting: Setting, report: Report) -> None:
    """No promise: a search finds out which it is. The kernels say why."""
    decoder = _decoder(setting, setting.dtype, Placement.RESIDENT)
    windows, kernel = _windows(setting, decoder), _kernel(setting, decoder, setting.dtype)
    found = is_batch_invariant(
        LocalScorer(ScoringReplica(decoder, windows)), decoder.shape, kernel,
        num_windows=NUM_WINDOWS, seq_len=setting.seq_len,
    )  # fmt: skip
    varying = _varying(decoder, setting)
    report.figures |= {"batch_invariant": found is True, "varying_kernels": varying}
    seen = (
        "same bits" if found is True else f"bits depend on it; kernels that vary: {', '.join(varying) or 'none alone'}"
    )
    report.add("a score in other company", "known to the run", seen, is_kept=isinstance(found, bool))


def two_replicas(setting: Setting, report: Report) -> None:
    """Two actors of Ray with half of the device each score half of the units each."""
    on_gpu = setting.device == "cuda"
    decoder = _decoder(setting, setting.dtype, Placement.RESIDENT)
    windows, kernel = _windows(setting, decoder), _kernel(setting, decoder, setting.dtype)
    shape, masks = decoder.shape, _masks(decoder.shape.num_layers)
    units = [make_unit([mask], 0, NUM_WINDOWS, shape, kernel, setting.seq_len) for mask in masks]
    expected = [ScoringReplica(decoder, windows).score(unit)[0] for unit in units]
    del decoder
    if on_gpu:
        torch.cuda.empty_cache()
    spec = ScoringSpec(
        model=ModelSource(str(setting.dense)), dtype=setting.dtype, device=setting.device,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    with ray_session(None, num_cpus=2, num_gpus=1 if on_gpu else 0):
        import ray

        class Replica:  # within the function, so that Ray sends the class itself: workers cannot import this module
            def __init__(self, spec: ScoringSpec, windows: Tensor) -> None:
                self._replica = spec.open(windows)

            def score(self, unit: WorkUnit) -> list[list[float]]:
                return self._replica.score(unit)[0]

        actor = ray.remote(num_cpus=1, num_gpus=0.5 if on_gpu else 0)(Replica)
        two = [actor.remote(spec, windows.cpu()) for _ in range(2)]
        found = ray.get([two[index % 2].score.remote(unit) for index, unit in enumerate(units)])
    report.add(
        "two replicas on one device against one", "same bits", _bits(found == expected), is_kept=found == expected
    )


STEPS = (scores, placements, invariance, two_replicas)


def _decoder(setting: Setting, dtype: str, placement: Placement) -> Decoder:
    devices = devices_of(setting.device, 1) * (2 if placement is Placement.SHARDED else 1)
    return load_decoder(ModelSource(str(setting.dense)), dtype, placement, devices)


def _windows(setting: Setting, decoder: Decoder) -> Tensor:
    vocabulary = decoder.model.config.vocab_size
    shape = (NUM_WINDOWS, setting.seq_len)
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(decoder.device)


def _masks(num_layers: int) -> list[Mask]:
    """The dense model, single blocks at both ends and in the middle, and many at once."""
    middle, last = num_layers // 2, num_layers - 1
    singles = [Mask.of([Block(kind, layer)]) for kind in (Kind.MHA, Kind.MLP) for layer in (0, middle, last)]
    odd = [Block(Kind.MHA, layer) for layer in range(1, num_layers, 2)]
    return [Mask(), *singles, Mask.of([Block(Kind.MHA, middle), Block(Kind.MLP, middle)]), Mask.of(odd)]


def _kernel(setting: Setting, decoder: Decoder, dtype: str) -> KernelShape:
    return kernel_shape(
        decoder.shape, seq_len=setting.seq_len, num_windows=NUM_WINDOWS, bytes_per_value=DTYPES[dtype].itemsize,
        threads=torch.get_num_threads(), free_bytes=decoder.free_bytes(),
    )  # fmt: skip


def _forked(setting: Setting, decoder: Decoder, dtype: str) -> ForkedPass:
    kernel = _kernel(setting, decoder, dtype)
    return ForkedPass(decoder, CallShape(sequences_per_call=kernel.rows, tokens_per_head_call=kernel.head_tokens))


@torch.inference_mode()
def _varying(decoder: Decoder, setting: Setting) -> list[str]:
    """Return the kernels whose result for one sequence depends on how many others are in the call."""
    layer, config = decoder.layers[0], decoder.model.config
    kind: dict[str, Any] = {"device": decoder.device, "dtype": decoder.model.dtype}
    stream = torch.randn(4, setting.seq_len, config.hidden_size, **kind)
    inner = torch.randn(4, setting.seq_len, config.intermediate_size, **kind)
    heads = torch.randn(4, config.num_attention_heads, setting.seq_len, 64, **kind)
    kernels: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "product (hidden to wide)": (layer.get_submodule("mlp.up_proj"), stream),
        "product (wide to hidden)": (layer.get_submodule("mlp.down_proj"), inner),
        "product (query)": (layer.get_submodule("self_attn.q_proj"), stream),
        "head": (decoder.model.lm_head, stream[:, :32]),
        "norm": (layer.get_submodule("input_layernorm"), stream),
        "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), heads),
        "softmax": (lambda x: x.float().log_softmax(-1), stream),
    }
    return [name for name, (run, given) in kernels.items() if not torch.equal(run(given)[:1], run(given[:1]))]


def _bits(is_same: bool) -> str:
    return "same bits" if is_same else "other bits"
