"""How close does the search come to the machine's limit, the rate of its matrix products?

First it runs matrix products of the model's shapes alone, with as many rows as the calls of the search; this gives the
rate. Then it runs sweeps of the search and times their parts. The share of a part is the time that its counted work
would take at this rate, divided by the measured time. The rate is measured again before every sweep, so that a machine
that slows down affects both. `matmul_share` is for an exhaustive step with default options.

    python -m benchmarks.roofline
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from benchmarks.common import console, print_json, print_table, random_1b, run_benchmark
from blockpruner.engine import losses
from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
from blockpruner.engine.model.decoder import Decoder, forward_replaced
from blockpruner.engine.model.host_memory import keep_freed_memory
from blockpruner.engine.model.loading import DTYPES, load_model, materialize
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.sweep import SweepPlan, plan_sweep
from blockpruner.engine.work.units import KernelShape, kernel_shape
from blockpruner.showing.style import save

PARTS = ("attention", "MLP", "norms, residuals", "head", "loss", "copies, rest")
COLORS = ("#2a6f97", "#e07a5f", "#bbbbbb", "#588157", "#b08900", "#444444")
RATE_S = 0.15
"""For which each shape's product is repeated."""


@dataclass(frozen=True)
class Setting:
    dtype: str
    seq_len: int
    num_masks: int


def main(
    model: Annotated[str, typer.Option(help="As for search; or random-1b, of hidden size 2048.")] = "smollm2",
    dtype: list[str] = ["bfloat16"],  # noqa: B006
    seq_len: list[int] = [512],  # noqa: B006
    num_masks: Annotated[list[int], typer.Option(help="0 for all candidates of the first step.")] = [0],  # noqa: B006
    threads: int = 2,
    repeats: int = 5,
    picture: Path | None = None,
) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()
    found: dict[Setting, dict[str, Any]] = {}
    for kind in dtype:
        decoder = Decoder(_load(model, kind))
        for length in seq_len:
            for number in num_masks:
                setting = Setting(kind, length, number or 2 * decoder.shape.num_layers)
                found[setting] = measure(decoder, setting, threads, repeats)
    rows = [
        [
            f"{setting.dtype}, {setting.seq_len} tokens, {setting.num_masks} masks",
            round(one["rate_gflops"]),
            round(one["achieved_gflops"]),
            f"{one['matmul_share']:.0%} ({one['spread'][0]:.0%}–{one['spread'][1]:.0%})",
            *(_cell(one["parts"][part]) for part in PARTS),
            round(one["seconds"], 2),
        ]
        for setting, one in found.items()
    ]
    print_table(
        f"{model}, {threads} threads: GFLOP/s, share of the matmul rate, and of each part its share of the time (in "
        f"brackets: its own share of the rate), medians of {repeats}",
        ["", "matmul", "search", "share", *PARTS, "s"],
        rows,
    )
    if picture is not None:
        _draw(found, picture)
        console.print(f"wrote {picture}")
    first = next(iter(found.values()))
    print_json(
        {
            "model": model,
            "threads": threads,
            "settings": [{**vars(setting), **one} for setting, one in found.items()],
            "matmul_share": first["matmul_share"],
        }
    )


def _load(model: str, dtype: str) -> nn.Module:
    if model == "random-1b":
        return random_1b(dtype)
    return load_model(materialize(ModelSource(model), dtype), dtype)


class Sweeps:
    """The sweeps of one exhaustive step on one window, with the sizes that a search chooses."""

    def __init__(self, decoder: Decoder, setting: Setting, threads: int) -> None:
        shape, length = decoder.shape, setting.seq_len
        masks = [Mask().without(block) for block in Granularity.MIX.candidates(shape.num_layers)]
        masks = masks[:: max(1, len(masks) // setting.num_masks)][: setting.num_masks]
        window = torch.randint(decoder.model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        self._window = window.to(decoder.device)
        self.kernel = kernel_shape(
            shape, seq_len=length, num_windows=1, bytes_per_value=DTYPES[setting.dtype].itemsize, threads=threads,
            free_bytes=decoder.free_bytes(),
        )  # fmt: skip
        size = self.kernel.masks
        self.chunks = [masks[start : start + size] for start in range(0, len(masks), size)]
        calls = CallShape(sequences_per_call=self.kernel.rows, tokens_per_head_call=self.kernel.head_tokens)
        self._pass = ForkedPass(decoder, calls)

    def run(self) -> tuple[float, float]:
        """Return the seconds until the host has issued them, and until they are done."""
        start = time.perf_counter()
        for chunk in self.chunks:
            self._pass.window_sums(chunk, self._window)
        issued = time.perf_counter() - start
        wait(self._window.device)
        return issued, time.perf_counter() - start


def sweeps_s(decoder: Decoder, setting: Setting, threads: int, repeats: int) -> float:
    """Return the median seconds of the sweeps after a warm-up, for any placement."""
    sweeps = Sweeps(decoder, setting, threads)
    return statistics.median([sweeps.run()[1] for _ in range(repeats + 1)][1:])


def measure(decoder: Decoder, setting: Setting, threads: int, repeats: int) -> dict[str, Any]:
    """Return shares, rates and seconds, medians of the repeats. Works on a GPU, too: there the parts are timed by CUDA
    events, and `host_s` is the time until the host has issued a sweep. The model must be resident: the rate is measured
    where the weights are."""
    shape, length = decoder.shape, setting.seq_len
    sweeps = Sweeps(decoder, setting, threads)
    work = _work(decoder, [plan_sweep(chunk, shape.num_layers) for chunk in sweeps.chunks], length)
    shares, rates, seconds, host_s, times = [], [], [], [], defaultdict(list)
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            ideal = _ideal_s(decoder, sweeps.kernel, length, work, DTYPES[setting.dtype])
            with _timed_parts(decoder) as parts:
                issued, took = sweeps.run()
            if repeat == 0:
                continue  # warms up
            shares.append(sum(ideal.values()) / took)
            rates.append(sum(work.values()) / sum(ideal.values()))
            seconds.append(took)
            host_s.append(issued)
            parts["norms, residuals"] -= parts["attention"] + parts["MLP"]
            parts["copies, rest"] = took - sum(parts.values())
            for part in PARTS:
                times[part].append((parts[part] / took, ideal.get(part, 0.0) / max(parts[part], 1e-9)))
    return {
        "matmul_share": statistics.median(shares),
        "spread": [min(shares), max(shares)],
        "rate_gflops": statistics.median(rates) / 1e9,
        "achieved_gflops": sum(work.values()) / statistics.median(seconds) / 1e9,
        "seconds": statistics.median(seconds),
        "host_s": statistics.median(host_s),
        "parts": {
            part: {
                "time_share": statistics.median(of_time for of_time, _ in times[part]),
                "matmul_share": statistics.median(of_rate for _, of_rate in times[part]) if part in work else None,
            }
            for part in PARTS
        },
    }


def _work(decoder: Decoder, plans: list[SweepPlan], length: int) -> dict[str, float]:
    """Return the counted FLOPs of each part."""
    shape = decoder.shape
    work = dict.fromkeys(("attention", "MLP", "head"), 0.0)
    for plan in plans:
        work["head"] += plan.num_slots * shape.head_flops(length)
        for layer, families in enumerate(plan.layers):
            work["attention"] += sum(f.num_mha for f in families) * shape.block_flops(Block(Kind.MHA, layer), length)
            work["MLP"] += sum(f.num_mlp for f in families) * shape.block_flops(Block(Kind.MLP, layer), length)
    return work


def _ideal_s(
    decoder: Decoder, kernel: KernelShape, length: int, work: dict[str, float], dtype: torch.dtype
) -> dict[str, float]:
    """Return the seconds that each part's work would take as matrix products of its shapes alone."""
    names = decoder.architecture
    layer, rows = decoder.layers[0], kernel.rows * length
    products = {
        "attention": [m.weight for m in layer.get_submodule(names.mixers[0]).modules() if isinstance(m, nn.Linear)],
        "MLP": [m.weight for m in layer.get_submodule(names.mlps[0]).modules() if isinstance(m, nn.Linear)],
        "head": [decoder.model.get_output_embeddings().weight],
    }
    ideal = {}
    for part, weights in products.items():
        num_rows = min(length, kernel.head_tokens) if part == "head" else rows
        took = flops = 0.0
        for weight in weights:
            stream = torch.randn(num_rows, weight.shape[1], device=weight.device).to(dtype)
            took += _time(lambda stream=stream, weight=weight: F.linear(stream, weight), weight.device)  # type: ignore[misc]
            flops += 2 * num_rows * weight.numel()
        ideal[part] = work[part] * took / flops
    return ideal


def _time(product: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of a call."""
    product()
    wait(device)
    times: list[float] = []
    while sum(times) < RATE_S or len(times) < 5:
        start = time.perf_counter()
        product()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what was issued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _moment(device: torch.device) -> Any:
    """Return the time on a CPU, and on a GPU an event that marks the place among what was issued."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(start: Any, stop: Any) -> float:
    """Return seconds. Events must be over."""
    return stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1000


@contextmanager
def _timed_parts(decoder: Decoder) -> Iterator[dict[str, float]]:
    """Measure the seconds of each part while the context is open. Layers include their blocks."""
    spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    moments: list[tuple[str, Any, Any]] = []
    names, device = decoder.architecture, decoder.device

    def wrap(owner: Any, name: str, part: str, stack: ExitStack) -> None:
        previous = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = _moment(device)
            try:
                return previous(*args, **kwargs)
            finally:
                moments.append((part, start, _moment(device)))

        if isinstance(owner, nn.Module):  # a streamed layer has a forward of its own, which must come back
            stack.enter_context(forward_replaced(owner, timed))
        else:
            setattr(owner, name, timed)
            stack.callback(setattr, owner, name, previous)

    with ExitStack() as stack:
        for layer in decoder.layers:
            wrap(layer, "forward", "norms, residuals", stack)
            wrap(layer.get_submodule(names.mixers[0]), "forward", "attention", stack)
            wrap(layer.get_submodule(names.mlps[0]), "forward", "MLP", stack)
        wrap(decoder, "logits", "head", stack)
        wrap(losses, "token_nll", "loss", stack)
        yield spent
    wait(device)
    for part, start, stop in moments:
        spent[part] += _between(start, stop)


def _cell(part: dict[str, float | None]) -> str:
    own = "" if part["matmul_share"] is None else f" ({part['matmul_share']:.0%})"
    return f"{part['time_share']:.0%}{own}"


def _draw(found: dict[Setting, dict[str, Any]], path: Path) -> None:
    """Draw the share of the time of each part, one bar per setting; the mark is arithmetic at the full rate."""
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(found)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{s.dtype}, {s.seq_len} tokens, {s.num_masks} masks" for s in found]
    start = [0.0] * len(found)
    for part, color in zip(PARTS, COLORS, strict=True):
        shares = [100 * one["parts"][part]["time_share"] for one in found.values()]
        axes.barh(labels, shares, left=start, color=color, label=part)
        start = [before + share for before, share in zip(start, shares, strict=True)]
    axes.plot(
        [100 * one["matmul_share"] for one in found.values()], labels, "k|", markersize=18, label="at the matmul rate"
    )
    axes.invert_yaxis()
    axes.set(xlabel="share of the time (%)", xlim=(0, 100))
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.18))
    save(figure, path)


if __name__ == "__main__":
    run_benchmark(main)
