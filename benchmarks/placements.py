"""How much private memory does a resident and a streamed replica use, and how much time does streaming cost?

A random model of TinyLlama's shape (1.1 billion parameters, stored in bfloat16) is scored in float32. Resident, its 4.4
GB of weights are private memory. Streamed, they stay mapped from the file, and the system can drop mapped pages; only
the current layers are private. Each placement runs in its own process.

    python -m benchmarks.placements
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import console, print_json, print_table, random_1b, run_benchmark
from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.loading import DTYPES, meta_model
from blockpruner.engine.scoring.scoring import ScoringSpec
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import ModelBytes, Placement
from blockpruner.engine.work.units import kernel_shape, make_unit


def main(
    dtype: str = "float32", stored: str = "bfloat16", seq_len: int = 256, num_masks: int = 24, threads: int = 2
) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        random_1b(stored).save_pretrained(folder)
        sizes = ModelBytes.of(Decoder(meta_model(ModelSource(folder), dtype)).shape, DTYPES[dtype].itemsize)
        for placement in (Placement.RESIDENT, Placement.STREAMED):
            console.print(f"{placement}: loading and two sweeps of {num_masks} masks")
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                found = process.submit(sweep, folder, placement, dtype, seq_len, num_masks, threads).result()
            rows.append({"placement": placement, **found})
    gigabyte = 10**9
    print_table(
        f"{sizes.total / gigabyte:.2f} GB of {dtype} weights, stored in {stored}; {num_masks} masks, {seq_len} tokens",
        ["", "peak private (GB)", "peak mapped (GB)", "sweep (s)"],
        [
            [row["placement"], row["peak_anon_bytes"] / gigabyte, row["peak_file_bytes"] / gigabyte, row["sweep_s"]]
            for row in rows
        ],
    )
    resident, streamed = rows
    figures = {
        "weights_bytes": sizes.total,
        "same_bits": resident.pop("sums") == streamed.pop("sums"),
        "streamed_below_weights": streamed["peak_anon_bytes"] < sizes.total,
        "streamed_against_resident_s": streamed["sweep_s"] / resident["sweep_s"],
        "rows": rows,
    }
    console.print(
        f"same bits: {figures['same_bits']}; private memory of streamed below the weights: "
        f"{figures['streamed_below_weights']}"
    )
    print_json(figures)


def sweep(folder: str, placement: Placement, dtype: str, seq_len: int, num_masks: int, threads: int) -> dict[str, Any]:
    spec = ScoringSpec(model=ModelSource(folder), dtype=dtype, device="cpu", placement=placement, threads=threads)
    windows = torch.arange(seq_len)[None] % 32000
    with peak_memory() as peak:
        scorer = spec.open(windows)
        shape = Decoder(meta_model(spec.model, dtype)).shape
        kernel = kernel_shape(
            shape, seq_len=seq_len, num_windows=1, bytes_per_value=DTYPES[dtype].itemsize, threads=threads
        )
        masks = [Mask().without(block) for block in Granularity.MIX.candidates(shape.num_layers)[:num_masks]]
        unit = make_unit(masks, 0, 1, shape, kernel, seq_len)
        scorer.score(unit)
        start = time.perf_counter()
        sums, _ = scorer.score(unit)
        seconds = time.perf_counter() - start
    return {"sums": sums, "sweep_s": seconds, "peak_anon_bytes": peak["RssAnon"], "peak_file_bytes": peak["RssFile"]}


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """The highest RssAnon (private) and RssFile (mapped) of this process in bytes, sampled every 10 ms."""
    peak = {"RssAnon": 0, "RssFile": 0}
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.01):
            for line in Path("/proc/self/status").read_text().splitlines():
                name = line.partition(":")[0]
                if name in peak:
                    peak[name] = max(peak[name], int(line.split()[1]) * 1024)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peak
    finally:
        is_over.set()
        watcher.join()


if __name__ == "__main__":
    run_benchmark(main)
