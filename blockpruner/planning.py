"""Before anything is loaded: would it fit, how would it be held, how long would it take?"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from transformers import PreTrainedConfig

from blockpruner.cluster.nodes import local_cpus
from blockpruner.engine.blocks import Granularity
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.known_models import known_config, short_names
from blockpruner.engine.model.loading import (
    DTYPES,
    ModelSource,
    check_positions,
    load_config,
    materialize,
    meta_from_config,
    resolve_device,
    resolve_dtype,
)
from blockpruner.engine.scoring.rate import LAYERS, Rate, measure_rate
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.forecast import Forecast, forecast_greedy
from blockpruner.engine.search.lazy import SAVING
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.work.memory import GIB, ModelBytes, Placement, resolve_placement, smallest_sweep_bytes
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.units import DEVICE_SHARE, KernelShape, kernel_shape, sweep_bytes
from blockpruner.showing.console import Reporter

ASSUMED_FLOPS_PER_S = 100e12
"""Of one GPU, where no rate was stated: about what the official loop gets out of an RTX 4090. By the paper's Table 7 it
takes 45 minutes for Llama-2-7B (16 blocks: 290 PFLOP) on two, of which `device_map="auto"` uses one at a time."""
HOST_BYTES_PER_S = 20e9
"""From host memory to a GPU over PCIe 4 x16; streamed models need it."""
LAZY_STEPS = 12
"""From which on it is known what the lazy search saves."""


@dataclass(frozen=True)
class Gpus:
    per_node: int
    memory_bytes: int
    num_nodes: int

    @staticmethod
    def parse(text: str, num_nodes: int) -> Gpus:
        """`2x24GB`: two GPUs of 24 GB (10^9 bytes; GiB for 2^30) in each node."""
        found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\d+(?:\.\d+)?)\s*(GB|GiB|G)", text.strip(), flags=re.IGNORECASE)
        if found is None or int(found[1] or 1) == 0 or float(found[2]) == 0:
            raise UserError(f"expected --gpus like 2x24GB (number x memory), got {text!r}.")
        unit = GIB if found[3].lower() == "gib" else 10**9
        return Gpus(int(found[1] or 1), int(float(found[2]) * unit), num_nodes)


def plan_search(
    model: str,
    reporter: Reporter,
    *,
    gpus: str | None,
    num_nodes: int = 1,
    placement: str = "auto",
    gpus_per_replica: int | None = None,
    replicas: int | None = None,
    budget: Budget,
    blocks: Granularity = Granularity.MIX,
    seq_len: int = 2048,
    num_windows: int = 13,
    dtype: str = "auto",
    tflops: float | None = None,
    measure: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Returns what `plan --json` prints. gpus: None for the CPUs of this machine."""
    if tflops is not None and measure:
        raise UserError("expected either --tflops or --measure, and not both.")
    fleet = Gpus.parse(gpus, num_nodes) if gpus is not None else None
    source = ModelSource(model, revision, trust_remote_code)
    config, origin = _config(source, reporter)
    check_positions(config, seq_len)
    dtype = _dtype(dtype, source, config, on_gpu=fleet is not None)
    shape = Decoder(meta_from_config(config, dtype, source)).shape
    SearchSpace(shape=shape, blocks=blocks, budget=budget)  # refuses what this model cannot meet
    itemsize = DTYPES[dtype].itemsize
    sizes = ModelBytes.of(shape, itemsize)
    if fleet is not None and (gpus_per_replica or 1) > fleet.per_node:
        raise UserError(
            f"expected --gpus-per-replica of at most {fleet.per_node}, as --gpus says, got {gpus_per_replica}."
        )
    device_bytes = fleet.memory_bytes if fleet is not None else psutil.virtual_memory().available
    held, num_devices = resolve_placement(
        placement,
        sizes,
        device_bytes,
        on_gpu=fleet is not None,
        gpus_per_replica=gpus_per_replica,
        gpus_per_node=fleet.per_node if fleet is not None else 0,
        working_bytes=smallest_sweep_bytes(shape, seq_len=seq_len, bytes_per_value=itemsize),
    )
    most = local_cpus() if fleet is None else fleet.num_nodes * (fleet.per_node // num_devices)
    if fleet is not None and (replicas or 1) > most:
        raise UserError(
            f"expected at most {most} replicas of {num_devices} GPUs on {fleet.num_nodes} nodes of "
            f"{fleet.per_node}, got {replicas}."
        )
    num_replicas = replicas or most
    free_bytes = None if fleet is None else device_bytes - sizes.on_device(held, num_devices)
    kernel = replace(
        kernel_shape(
            shape,
            seq_len=seq_len,
            num_windows=num_windows,
            bytes_per_value=itemsize,
            threads=1,
            free_bytes=free_bytes,
        ),
        # Without experts seen on every CPU so far; of a GPU a plan cannot know.
        batch_invariant=fleet is None and not shape.routes_tokens,
    )
    if tflops is None and (fleet is None or measure):
        few = sizes.outside + max(LAYERS) * max(sizes.layers)
        reporter.say(
            f"measuring with {max(LAYERS)} layers of random weights ({few / 1e9:.1f} GB); --tflops does without"
        )
    rate, rate_reason = _rate(config, dtype, seq_len, tflops=tflops, measure=measure, on_gpu=fleet is not None)
    sweep_s = sizes.total / HOST_BYTES_PER_S if held is Placement.STREAMED and fleet is not None else 0.0
    found = forecast_greedy(
        shape,
        blocks=blocks,
        budget=budget,
        kernel=kernel,
        num_windows=num_windows,
        seq_len=seq_len,
        num_replicas=num_replicas,
        rate=rate,
        sweep_s=sweep_s,
    )
    in_a_sweep = replace(kernel, masks=min(kernel.masks, 2 * shape.num_layers))
    memory = sizes.on_device(held, num_devices) + sweep_bytes(
        shape, in_a_sweep, seq_len=seq_len, bytes_per_value=itemsize
    )
    result = {
        "model": model,
        "dtype": dtype,
        "num_blocks": 2 * shape.num_layers,
        "num_parameters": shape.num_parameters,
        "weights_bytes": sizes.total,
        "placement": held,
        "gpus_per_replica": num_devices if fleet is not None else 0,
        "num_replicas": num_replicas,
        "memory_per_device_bytes": memory,
        "kernel": in_a_sweep.to_json(),
        "rate": {"layer_flops_per_s": rate.layers, "head_flops_per_s": rate.head, "reason": rate_reason},
        "num_steps": found.num_steps,
        "strategies": {
            "greedy": {
                "num_candidates": found.num_candidates,
                "work_flops": found.work_flops,
                "forecast_s": found.seconds,
            },
            **_lazy(found, blocks),
            "plain loop": {
                "num_candidates": found.num_candidates,
                "work_flops": found.naive_work_flops,
                "forecast_s": found.naive_seconds,
            },
        },
    }
    _print(result, origin, shape, fleet, sweep_s, num_windows, seq_len, reporter)
    return result


def _lazy(found: Forecast, blocks: Granularity) -> dict[str, Any]:
    """Only for what was measured: searches of some length over both kinds of blocks."""
    if blocks is not Granularity.MIX or found.num_steps < LAZY_STEPS:
        return {}
    work = found.naive_work_flops / SAVING
    return {
        "lazy": {
            "num_candidates": found.num_candidates,
            "work_flops": round(work),
            "forecast_s": found.seconds * work / found.work_flops,
        }
    }


def _config(source: ModelSource, reporter: Reporter) -> tuple[PreTrainedConfig, str]:
    if not Path(source.name).exists() and (known := known_config(source.name)) is not None:
        return known, "its shape is built in"
    try:
        made = materialize(source, "bfloat16", reporter.say)
        return load_config(made), "from its config"
    except UserError as error:
        raise UserError(f"{error} Shapes that are built in: {', '.join(short_names())}.") from error


def _dtype(dtype: str, source: ModelSource, config: PreTrainedConfig, *, on_gpu: bool) -> str:
    if dtype != "auto":
        return dtype
    if not on_gpu:
        return resolve_dtype(dtype, source, torch.device("cpu"))[0]
    stored = str(config.dtype).removeprefix("torch.")
    return stored if stored in DTYPES else "bfloat16"


def _rate(
    config: PreTrainedConfig, dtype: str, seq_len: int, *, tflops: float | None, measure: bool, on_gpu: bool
) -> tuple[Rate, str]:
    if tflops is not None:
        return Rate(tflops * 1e12, tflops * 1e12), f"{tflops:g} TFLOP/s a replica, as stated"
    if on_gpu and not measure:
        each = ASSUMED_FLOPS_PER_S
        return Rate(
            each, each
        ), f"{each / 1e12:g} TFLOP/s a replica assumed; state yours with --tflops, or --measure here"
    device = str(resolve_device("auto" if on_gpu else "cpu"))
    rate = measure_rate(config, dtype=dtype, device=device, seq_len=seq_len, threads=1)
    return (
        rate,
        f"measured here on {device}: {rate.layers / 1e12:.3g} TFLOP/s in layers, {rate.head / 1e12:.3g} in the head",
    )


def _print(
    plan: dict[str, Any],
    origin: str,
    shape: ModelShape,
    fleet: Gpus | None,
    sweep_s: float,
    num_windows: int,
    seq_len: int,
    reporter: Reporter,
) -> None:
    kernel = KernelShape(**plan["kernel"])
    where = (
        "this machine's CPUs"
        if fleet is None
        else f"{fleet.num_nodes} x {fleet.per_node} GPUs of {fleet.memory_bytes / 1e9:g} GB "
        f"({100 * DEVICE_SHARE:.0f} % of it used)"
    )
    facts = Table(show_header=False, box=None)
    for name, value in (
        ("model", f"{plan['model']}: {plan['num_blocks']} blocks, {shape.num_parameters:,} parameters ({origin})"),
        ("weights", f"{plan['weights_bytes'] / 1e9:.2f} GB in {plan['dtype']}"),
        ("devices", where),
        (
            "placement",
            f"{plan['placement']}, {plan['num_replicas']} replicas"
            + (f" of {plan['gpus_per_replica']} GPUs" if plan["gpus_per_replica"] > 1 else ""),
        ),
        (
            "memory",
            f"{plan['memory_per_device_bytes'] / 1e9:.2f} GB a device, with {kernel.masks} masks in a sweep and "
            f"{kernel.rows} sequences in a call",
        ),
        ("rate", plan["rate"]["reason"]),
        ("calibration", f"{num_windows} windows of {seq_len} tokens"),
    ):
        facts.add_row(name, value)
    if sweep_s:
        facts.add_row("streaming", f"{sweep_s:.1f} s a sweep at {HOST_BYTES_PER_S / 1e9:g} GB/s, beside the arithmetic")
    costs = Table("", "candidates", "work (PFLOP)", "time", title=f"{plan['num_steps']} steps", title_justify="left")
    for name, cost in plan["strategies"].items():
        costs.add_row(
            name, f"{cost['num_candidates']:,}", f"{cost['work_flops'] / 1e15:,.2f}", _time(cost["forecast_s"])
        )
    reporter.console.print(facts)
    reporter.console.print(costs)
    reporter.say(
        "Time without starting and loading. How much a step costs depends on which blocks go: a few percent. What lazy "
        "saves depends on the model and the text; this is what it saved on SmolLM2."
    )


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
