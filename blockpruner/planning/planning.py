"""Plans a search before anything is loaded: whether it fits, with which placement, and how long it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from transformers import PreTrainedConfig

from blockpruner.cluster.nodes import local_cpus
from blockpruner.engine.blocks import Granularity, Units
from blockpruner.engine.compensation.config import Fit
from blockpruner.engine.compensation.fitting import NUM_PARTS, fit_flops
from blockpruner.engine.compensation.memory import FitMemory
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.identity import identity
from blockpruner.engine.model.known_models import known_config, short_names
from blockpruner.engine.model.loading import (
    DTYPES,
    check_positions,
    check_tensors,
    load_config,
    materialize,
    meta_from_config,
    resolve_device,
    resolve_dtype,
)
from blockpruner.engine.model.rehearsal import rehearse
from blockpruner.engine.scoring.rate import LAYERS, Rate, measure_rate
from blockpruner.engine.search.forecast import Forecast, forecast_greedy
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.strategies.lazy import saving
from blockpruner.engine.work.memory import ModelBytes, Placement, resolve_placement, smallest_sweep_bytes
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.units import DEVICE_SHARE, KernelShape, kernel_shape, sweep_bytes
from blockpruner.planning.config import Gpus, PlanConfig
from blockpruner.searching.tables import read_table
from blockpruner.showing.console import Reporter

ASSUMED_FLOPS_PER_S = 100e12
"""Default speed of one GPU: about the speed of the official loop on an RTX 4090. According to Table 7 of the paper, it
takes 45 minutes for Llama-2-7B (16 blocks: 290 PFLOP) on two GPUs, of which `device_map="auto"` uses one at a time."""
HOST_BYTES_PER_S = 20e9
"""Rate from host memory to a GPU over PCIe 4 x16, for streamed models."""
BUILT_IN = "built-in shape"
"""Where a config is from that comes with this program. All of them are known to work."""
LAZY_STEPS = {Granularity.MIX: 12, Granularity.MHA: 12, Granularity.MLP: 12, Granularity.LAYER: 2}
"""Minimum number of steps for which the saving of the lazy search is known, by kind of blocks."""


def plan_search(config: PlanConfig, reporter: Reporter) -> dict[str, Any]:
    """Plan a search and return what `plan --json` prints."""
    model, fleet, source, seq_len = config.model, config.fleet, config.source, config.seq_len
    gpus_per_replica, num_windows = config.gpus_per_replica, config.num_windows or 1
    model_config, origin = _config(source, reporter)
    check_positions(model_config, seq_len)
    dtype = _dtype(config.dtype, source, model_config, on_gpu=fleet is not None)
    skeleton = meta_from_config(model_config, dtype, source)
    for note in check_tensors(skeleton, source):
        reporter.say(f"note: {note}")
    decoder = Decoder(skeleton)
    shape = decoder.shape
    table = None
    if config.times is not None:
        table = read_table(config.times, identity(source), config.time_for, shape)
        table.tell(f"times of {config.times}", config.time_for, reporter)
    elif config.budget_ms is not None:
        raise UserError(
            "expected `times` with `budget_ms`, since a plan loads no weights and so cannot measure what blocks cost; "
            "`blockpruner times` writes such a table, and `search` measures it by itself."
        )
    # Raises UserError if the options do not suit this model.
    space = config.space(shape, None if table is None else table.times)
    itemsize = DTYPES[dtype].itemsize
    sizes = ModelBytes.of(shape, itemsize)
    if fleet is not None and (gpus_per_replica or 1) > fleet.per_node:
        raise UserError(
            f"expected `gpus_per_replica` of at most {fleet.per_node}, the number in `gpus`, got {gpus_per_replica}."
        )
    device_bytes = fleet.memory_bytes if fleet is not None else psutil.virtual_memory().available
    held, num_devices = resolve_placement(
        config.placement,
        sizes,
        device_bytes,
        on_gpu=fleet is not None,
        gpus_per_replica=gpus_per_replica,
        gpus_per_node=fleet.per_node if fleet is not None else 0,
        working_bytes=smallest_sweep_bytes(shape, seq_len=seq_len, bytes_per_value=itemsize),
    )
    most = local_cpus() if fleet is None else fleet.num_nodes * (fleet.per_node // num_devices)
    if fleet is not None and (config.replicas or 1) > most:
        raise UserError(
            f"expected at most {most} replicas of {num_devices} GPUs on {fleet.num_nodes} nodes of "
            f"{fleet.per_node}, got {config.replicas}."
        )
    num_replicas = config.replicas or most
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
        # True on every CPU tested so far for models without experts. On GPUs a plan cannot know it.
        batch_invariant=fleet is None and not shape.routes_tokens,
    )
    cut = tuple(kind for kind in config.units.cut if any(block.kind is kind for block in decoder.narrow))
    if origin != BUILT_IN and (why := rehearse(skeleton, source, cut)):
        reporter.say(f"note: whether a search takes this model could not be tried on a copy of a few layers ({why})")
    if config.tflops is None and (fleet is None or config.measure):
        few = sizes.outside + max(LAYERS) * max(sizes.layers)
        reporter.say(
            f"measuring with {max(LAYERS)} layers of random weights ({few / 1e9:.1f} GB); set `tflops` to skip this"
        )
    rate, rate_reason = _rate(
        model_config, source, dtype, seq_len, tflops=config.tflops, measure=config.measure, on_gpu=fleet is not None
    )
    sweep_s = sizes.total / HOST_BYTES_PER_S if held is Placement.STREAMED and fleet is not None else 0.0
    num_fitted = config.num_fitted(num_windows)
    found = forecast_greedy(
        space,
        metric=config.metric,
        kernel=kernel,
        num_windows=num_windows - num_fitted,
        seq_len=seq_len,
        num_replicas=num_replicas,
        rate=rate,
        sweep_s=sweep_s,
    )
    memory_of_fit = FitMemory.of(decoder, Fit())
    refits = found.num_steps // config.compensate_every if config.compensate else 0
    refit_flops = refits * fit_flops(shape, memory_of_fit.widest, num_fitted, seq_len)
    fit_flops_per_s = rate.layers * min(num_replicas, NUM_PARTS)
    one_fit_flops = fit_flops(shape, memory_of_fit.widest, num_windows, seq_len)
    in_a_sweep = replace(kernel, masks=min(kernel.masks, shape.num_blocks))
    memory = sizes.on_device(held, num_devices) + sweep_bytes(
        shape, in_a_sweep, seq_len=seq_len, bytes_per_value=itemsize
    )
    result: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "num_blocks": shape.num_blocks,
        "num_parameters": shape.num_parameters,
        "weights_bytes": sizes.total,
        "placement": held,
        "gpus_per_replica": num_devices if fleet is not None else 0,
        "num_replicas": num_replicas,
        "memory_per_device_bytes": memory,
        "kernel": in_a_sweep.to_json(),
        "rate": {"layer_flops_per_s": rate.layers, "head_flops_per_s": rate.head, "reason": rate_reason},
        "compensation": {
            "host_bytes_per_replica": _fit_bytes(memory_of_fit, num_windows * seq_len, num_replicas, itemsize),
            "work_flops": round(one_fit_flops),
            "forecast_s": one_fit_flops / fit_flops_per_s,
        },
        "num_steps": found.num_steps,
        "strategies": {
            "greedy": {
                "num_candidates": found.num_candidates,
                "work_flops": found.work_flops,
                "forecast_s": found.seconds,
            },
            **_lazy(found, config.blocks, config.units),
            "plain loop": {
                "num_candidates": found.num_candidates,
                "work_flops": found.naive_work_flops,
                "forecast_s": found.naive_seconds,
            },
        },
    }
    for each in result["strategies"].values() if refits else ():
        each["work_flops"] += round(refit_flops)
        each["forecast_s"] += refit_flops / fit_flops_per_s
    _print(result, origin, shape, fleet, sweep_s, num_windows, seq_len, reporter)
    reporter.say(
        f"The times exclude starting and loading. The cost of a step varies by a few percent with the removed blocks. "
        f"{_about_lazy(result['strategies'], config.blocks, config.units)}"
    )
    return result


def _fit_bytes(memory: FitMemory, num_tokens: int, num_replicas: int, bytes_per_value: int) -> int:
    """Host memory for sums and streams of `compensate` with its defaults, beside the model."""
    num_replicas = min(num_replicas, NUM_PARTS)
    return memory.sums_bytes + memory.stream_bytes(num_tokens, bytes_per_value) // num_replicas


def _lazy(found: Forecast, blocks: Granularity, units: Units) -> dict[str, Any]:
    """Estimate the lazy search, if its saving is known."""
    if found.num_steps < LAZY_STEPS[blocks]:
        return {}
    work = found.naive_work_flops / saving(units, blocks)
    return {
        "lazy": {
            "num_candidates": found.num_candidates,
            "work_flops": round(work),
            "forecast_s": found.seconds * work / found.work_flops,
        }
    }


def _about_lazy(strategies: dict[str, Any], blocks: Granularity, units: Units) -> str:
    if "lazy" not in strategies:
        return f"There is no time of lazy, whose saving was measured for {LAZY_STEPS[blocks]} or more steps only."
    what = " of channels" if units.cut else "" if blocks is Granularity.MIX else f" with --blocks {blocks}"
    return f"The saving of lazy depends on the model and the text; this is its saving on SmolLM2{what}."


def _config(source: ModelSource, reporter: Reporter) -> tuple[PreTrainedConfig, str]:
    if not Path(source.name).exists() and (known := known_config(source.name)) is not None:
        return known, BUILT_IN
    try:
        made = materialize(source, "bfloat16", reporter.say, needs_weights=False)
        return load_config(made), "from its config"
    except UserError as error:
        raise UserError(f"{error} Built-in shapes: {', '.join(short_names())}.") from error


def _dtype(dtype: str, source: ModelSource, config: PreTrainedConfig, *, on_gpu: bool) -> str:
    if dtype != "auto":
        return dtype
    if not on_gpu:
        return resolve_dtype(dtype, source, torch.device("cpu"))[0]
    stored = str(config.dtype).removeprefix("torch.")
    return stored if stored in DTYPES else "bfloat16"


def _rate(
    config: PreTrainedConfig,
    source: ModelSource,
    dtype: str,
    seq_len: int,
    *,
    tflops: float | None,
    measure: bool,
    on_gpu: bool,
) -> tuple[Rate, str]:
    if tflops is not None:
        return Rate(tflops * 1e12, tflops * 1e12), f"{tflops:g} TFLOP/s per replica, as given"
    if on_gpu and not measure:
        each = ASSUMED_FLOPS_PER_S
        return Rate(
            each, each
        ), f"{each / 1e12:g} TFLOP/s per replica assumed; set yours with `tflops`, or measure it here with `measure`"
    device = str(resolve_device("auto" if on_gpu else "cpu"))
    rate = measure_rate(config, source, dtype=dtype, device=device, seq_len=seq_len, threads=1)
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
        *([("blocks", shape.note)] if shape.note else []),
        ("weights", f"{plan['weights_bytes'] / 1e9:.2f} GB in {plan['dtype']}"),
        ("devices", where),
        (
            "placement",
            f"{plan['placement']}, {plan['num_replicas']} replicas"
            + (f" of {plan['gpus_per_replica']} GPUs" if plan["gpus_per_replica"] > 1 else ""),
        ),
        (
            "memory",
            f"{plan['memory_per_device_bytes'] / 1e9:.2f} GB per device, with {kernel.masks} masks per sweep and "
            f"{kernel.rows} sequences per call",
        ),
        ("rate", plan["rate"]["reason"]),
        ("calibration", f"{num_windows} windows of {seq_len} tokens"),
        (
            "to compensate",
            f"{_time(plan['compensation']['forecast_s'])} for one fit, {plan['compensation']['work_flops'] / 1e15:.3g} "
            f"PFLOP, {plan['compensation']['host_bytes_per_replica'] / 1e9:.1f} GB of host memory per replica",
        ),
    ):
        facts.add_row(name, reporter.translate(value))
    if sweep_s:
        facts.add_row(
            "streaming", f"{sweep_s:.1f} s per sweep at {HOST_BYTES_PER_S / 1e9:g} GB/s, overlapping computation"
        )
    costs = Table("", "candidates", "work (PFLOP)", "time", title=f"{plan['num_steps']} steps", title_justify="left")
    for name, cost in plan["strategies"].items():
        costs.add_row(
            name, f"{cost['num_candidates']:,}", f"{cost['work_flops'] / 1e15:,.2f}", _time(cost["forecast_s"])
        )
    reporter.console.print(facts)
    reporter.console.print(costs)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
