"""Fast: the share of the matmul rate that a sweep reaches, what streaming costs, and whole searches beside ShortGPT."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import blockpruner as bp
from benchmarks.gpu import models
from benchmarks.gpu.part import Report, Setting
from benchmarks.roofline import Setting as Sweep
from benchmarks.roofline import measure, sweeps_s, wait
from blockpruner.engine.methods.block_influence import measure_influence
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import DTYPES
from blockpruner.engine.model.streaming import stream_layers
from blockpruner.engine.model.weights import Casting

LEAST_SHARE, MOST_STREAMED = 0.65, 1.10
AIMS = {"lazy": 20.0, "1se": 9.0}
"""Times ShortGPT's time, at most."""
NUM_WINDOWS, REPEATS = 4, 3


def sweep(setting: Setting, report: Report) -> None:
    """A whole step of a search of the large model on one window: resident, then streamed from host memory."""
    model = models.make(setting.large, setting.dtype, setting.device)
    decoder = Decoder(model)
    how = Sweep(setting.dtype, setting.seq_len, 2 * decoder.shape.num_layers)
    found = measure(decoder, how, torch.get_num_threads(), REPEATS)
    report.figures["resident"] = found
    parts = ", ".join(f"{name} {part['time_share']:.0%}" for name, part in found["parts"].items())
    report.add(
        f"share of the matmul rate, {setting.large}, {setting.dtype}", f"at least {LEAST_SHARE:.0%}",
        f"{found['matmul_share']:.0%} of {found['rate_gflops'] / 1000:.0f} TFLOP/s ({parts})",
        is_kept=found["matmul_share"] >= LEAST_SHARE,
    )  # fmt: skip
    is_ahead = found["host_s"] < 0.9 * found["seconds"]
    report.add(
        "host time of a sweep beside device time", "the host is ahead",
        f"{found['host_s']:.2f} of {found['seconds']:.2f} s", is_kept=is_ahead if setting.device == "cuda" else None,
    )  # fmt: skip
    model.to("cpu")
    kind = DTYPES[setting.dtype]
    device = torch.device(setting.device, 0) if setting.device == "cuda" else torch.device("cpu")
    stream_layers(model, decoder.layers, device, Casting(kind, kind))
    streamed_s = sweeps_s(Decoder(model, [device] * len(decoder.layers)), how, torch.get_num_threads(), REPEATS)
    report.figures["streamed_s"] = streamed_s
    ratio = streamed_s / found["seconds"]
    report.figures["card_waits_share"] = max(0.0, 1 - 1 / ratio)
    report.add(
        f"streamed against resident, {setting.large}", f"at most {MOST_STREAMED:.2f} times",
        f"{ratio:.2f} times", is_kept=ratio <= MOST_STREAMED,
    )  # fmt: skip


def searches(setting: Setting, report: Report) -> None:
    """A quarter of the blocks, by greedy and by lazy searches, and ShortGPT's one pass, on the same windows."""
    model, tokenizer = bp.load(setting.dense, dtype=setting.dtype)
    model.to(setting.device)
    text = bp.calibration(setting.text, tokenizer, num_samples=500, seq_len=setting.seq_len, num_windows=NUM_WINDOWS)
    num_remove = model.config.num_hidden_layers // 2

    def search(**options: Any) -> Callable[[], object]:
        return lambda: bp.search(model, text, num_remove=num_remove, **options)

    runs: dict[str, Callable[[], object]] = {
        "shortgpt": lambda: measure_influence(Decoder(model), text.tokens.to(setting.device), layers_only=True),
        "1se": search(strategy="lazy", tolerance="1se"),
        "lazy": search(strategy="lazy"),
        "greedy": search(),
    }
    runs["shortgpt"]()  # the first kernels of a process take long to load, which is not ShortGPT's time
    wait(model.device)
    times: dict[str, float] = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        wait(model.device)
        times[name] = time.perf_counter() - start
    report.figures["search_s"] = times
    for name, aim in AIMS.items():
        ratio = times[name] / times["shortgpt"]
        report.add(
            f"{name} against ShortGPT, {num_remove} blocks", f"at most {aim:g} times",
            f"{ratio:.1f} times ({times[name]:.1f} s; greedy {times['greedy']:.1f} s)", is_kept=ratio <= aim,
        )  # fmt: skip


STEPS = (sweep, searches)
