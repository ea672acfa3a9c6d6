"""How much faster is an exhaustive step with the forked pass than with the plain loop?

Both score the same candidates (single removals) on the same window in one process, taking turns. The plain loop runs a
full forward per candidate with the block physically absent; its pruned models are built before the clock starts, and
its memory is managed as in any program, while the forked pass keeps freed memory as a replica does. The bound is naive
FLOPs / forked FLOPs; a larger ratio means that the machine also runs the forked pass at a higher rate.

    python -m benchmarks.search_time
"""

from __future__ import annotations

import ctypes
import resource
import statistics
import sys
import time
from typing import Annotated

import torch
import typer

from benchmarks.common import console, print_json, print_table, run_benchmark
from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.calibration import calibration_windows
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.host_memory import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory
from blockpruner.engine.model.loading import DTYPES, load_model, load_tokenizer, materialize
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.scoring.reference import plain_window_sum
from blockpruner.engine.sections import Calibration, ModelSource
from blockpruner.engine.work.sweep import plan_sweep
from blockpruner.engine.work.units import kernel_shape

M_MMAP_THRESHOLD = -3


def main(
    model: str = "smollm2",
    dtype: str = "bfloat16",
    seq_len: int = 512,
    threads: int = 2,
    repeats: int = 3,
    forked_only: Annotated[bool, typer.Option(help="Run only the forked pass, to measure its peak memory.")] = False,
) -> None:
    torch.set_num_threads(threads)
    source = materialize(ModelSource(model), dtype)
    dense = load_model(source, dtype)
    decoder = Decoder(dense)
    shape = decoder.shape
    tokenizer = load_tokenizer(source)
    windows = calibration_windows(
        Calibration(calibration=("builtin",), num_samples=16, seq_len=seq_len, seed=42, num_windows=1), tokenizer
    ).tokens
    masks = [Mask().without(block) for block in Granularity.MIX.candidates(shape.num_layers)]
    kernel = kernel_shape(
        shape, seq_len=seq_len, num_windows=1, bytes_per_value=DTYPES[dtype].itemsize, threads=threads
    )
    forked = ForkedPass(decoder, CallShape(sequences_per_call=kernel.rows, tokens_per_head_call=kernel.head_tokens))
    pruned = [] if forked_only else [prune(dense, mask) for mask in masks]

    def run_plain() -> list[float]:
        return [plain_window_sum(candidate, windows[0]) for candidate in pruned]

    def run_forked() -> list[float]:
        # In chunks as a run would do them: streams of one chunk lie in memory together.
        chunks = [masks[start : start + kernel.masks] for start in range(0, len(masks), kernel.masks)]
        return [total for chunk in chunks for total in forked.window_sums(chunk, windows)[:, 0].tolist()]

    runs = {"forked": run_forked} if forked_only else {"plain": run_plain, "forked": run_forked}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    sums: dict[str, list[float]] = {}
    for round_ in range(repeats + 1):  # the first warms up
        for name, run in runs.items():
            keep_freed_memory() if name == "forked" else _give_freed_memory_back()
            start = time.perf_counter()
            sums[name] = run()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    naive_flops = sum(shape.forward_flops(mask, seq_len) for mask in masks)
    forked_flops = plan_sweep(masks, shape.num_layers).flops(shape, seq_len)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights_bytes = sum(weight.numel() * weight.element_size() for weight in dense.parameters())
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    work = {"plain": naive_flops, "forked": forked_flops}
    print_table(
        f"One exhaustive step: {len(masks)} candidates, one window of {seq_len} tokens, {dtype}, {threads} threads",
        ["", "work (TFLOP)", "median (s)", "min (s)", "max (s)", "GFLOP/s"],
        [
            [name, work[name] / 1e12, medians[name], min(times), max(times), round(work[name] / medians[name] / 1e9)]
            for name, times in seconds.items()
        ],
    )
    figures = {
        "model": model,
        "dtype": dtype,
        "seq_len": seq_len,
        "threads": threads,
        "num_candidates": len(masks),
        "naive_work_flops": naive_flops,
        "forked_work_flops": forked_flops,
        "bound": naive_flops / forked_flops,
        "median_s": medians,
        "peak_rss_bytes": peak_bytes,
        "weights_bytes": weights_bytes,
    }
    if not forked_only:
        ratio = statistics.median(p / f for p, f in zip(seconds["plain"], seconds["forked"], strict=True))
        figures["wall_ratio"] = ratio
        pairs = zip(sums["plain"], sums["forked"], strict=True)
        figures["max_relative_difference"] = max(abs(p - f) / p for p, f in pairs)
        console.print(
            f"wall-time ratio {ratio:.2f}, bound by counting {figures['bound']:.2f} ({ratio / figures['bound']:.0%}); "
            f"largest relative difference of a score {figures['max_relative_difference']:.1e}"
        )
    console.print(f"peak memory {peak_bytes / 2**20:.0f} MiB, of which weights {weights_bytes / 2**20:.0f} MiB")
    print_json(figures)


def _give_freed_memory_back() -> None:
    """Set the thresholds that glibc reaches by itself in a process that frees tensors."""
    if sys.platform == "linux":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)


if __name__ == "__main__":
    run_benchmark(main)
