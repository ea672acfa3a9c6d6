"""How well does a search scale to many replicas?

1. Real: the same search of SmolLM2 on one and two replicas of one thread, and the overhead of driver and Ray per unit.
2. Simulated: the dispatcher's own code on a simulated fleet of 2 to 256 replicas. The time of a unit is its FLOPs at a
   stated rate, times a factor drawn from the units of the real run, plus the measured overhead.

Efficiency is the time of one replica without repeated trunks, divided by (replicas x time).

    python -m benchmarks.scaling                  # about 10 minutes on 2 cores
    python -m benchmarks.scaling --no-real        # the simulation alone, with the overhead and spread given
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import matplotlib.pyplot as plt
import torch
import typer
from rich.console import Console

from benchmarks.common import console, print_json, print_table, run_benchmark
from benchmarks.simulation import SimulatedFleet
from blockpruner.cluster.actor import ReplicaActor
from blockpruner.cluster.dispatch import Dispatcher
from blockpruner.cluster.nodes import Needs, Node
from blockpruner.cluster.session import ray_session
from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.known_models import known_config
from blockpruner.engine.model.loading import meta_from_config
from blockpruner.engine.scoring.replica import ReplicaSpec
from blockpruner.engine.scoring.scoring import ScoringSpec
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.units import KernelShape, WorkUnit, kernel_shape, make_unit, split_work, sweep_flops
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.reading import read_events
from blockpruner.showing.console import Reporter

matplotlib.use("Agg")
REPLICAS = (2, 4, 8, 16, 32, 64, 128, 256)
MODELS = ("llama-2-7b", "llama-2-13b", "llama-2-70b")
WINDOWS = (13, 64)
SEQ_LEN = 2048
PARTIAL = 8
"""Candidates of a partial step, as a lazy strategy asks for."""
FLOPS_PER_S = 100e12
GPUS_PER_NODE = 8
KERNEL = KernelShape(rows=1, head_tokens=1, masks=1, windows=1, threads=1)


class NullReplica(ReplicaActor):
    """Does nothing, so that only the overhead of a call is timed."""

    def load(self, spec: ReplicaSpec, data: Any) -> str:
        return "nothing"

    def score(self, unit: WorkUnit, shared: Sequence[Any] = ()) -> tuple[list[list[float]], float]:
        return [[0.0] * (unit.stop - unit.first)] * len(unit.masks), 1e-6


def real_runs(seq_len: int, num_windows: int, num_remove: int) -> dict[str, Any]:
    """Return the wall seconds of a search on one and two replicas, and the spread of the units' times per FLOP."""
    walls, orders, factors = {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        for replicas in (1, 2):
            config = SearchConfig(
                model="smollm2",
                calibration=("builtin",),
                num_samples=16,
                seq_len=seq_len,
                num_windows=num_windows,
                num_remove=num_remove,
                replicas=replicas,
                threads_per_replica=1,
            )
            out = Path(folder) / str(replicas)
            run = run_search(config, out, Reporter(Console(stderr=True)))
            walls[replicas] = run["totals"]["wall_s"]
            orders[replicas] = [(step["block"], step["nll"]) for step in run["steps"]]
            if replicas == 2:
                units = [event for event in read_events(out) if event["type"] == "unit" and event["step"] > 0]
                rates = [event["flops"] / event["seconds"] for event in units]
                factors = sorted(statistics.median(rates) / rate for rate in rates)
    return {
        "wall_s": walls,
        "speedup": walls[1] / walls[2],
        "same_bits": orders[1] == orders[2],
        "unit_factors": [round(factor, 4) for factor in factors],
    }


def overhead_s(num_units: int = 2000, num_replicas: int = 2) -> float:
    """Return the overhead of driver and Ray: seconds per unit without work."""
    with ray_session(None, num_replicas):
        from blockpruner.cluster import fleet as fleet_module

        setattr(fleet_module, "ReplicaActor", NullReplica)  # noqa: B010 - no part of its interface
        needs = Needs(1, 0)
        spec = ScoringSpec(model=ModelSource("none"), dtype="float32", device="cpu", threads=1)
        fleet = fleet_module.RayFleet(spec, torch.zeros(1), needs, expected=None)
        with Dispatcher(fleet, needs, num_replicas, lambda text: None) as dispatcher:
            masks = tuple(Mask().without(block) for block in Granularity.MIX.candidates(32))
            units = [WorkUnit(masks, number, number + 1, 1, KERNEL) for number in range(num_units)]
            list(dispatcher.run(units[:100]))
            start = time.perf_counter()
            list(dispatcher.run(units))
            return (time.perf_counter() - start) / num_units


def driver_s(num_units: int = 2000) -> float:
    """Return the overhead of the dispatcher alone: seconds per unit, on a simulated fleet of eight."""
    nodes = [Node("n", "n", 64, 8, 0)]
    masks = tuple(Mask().without(block) for block in Granularity.MIX.candidates(32))
    units = [WorkUnit(masks, number, number + 1, 10**12, KERNEL) for number in range(num_units)]
    fleet = SimulatedFleet(nodes, lambda unit: 1.0)
    with Dispatcher(fleet, Needs(1, 1), None, lambda text: None) as dispatcher:
        start = time.perf_counter()
        list(dispatcher.run(units))
        return (time.perf_counter() - start) / num_units


def shape_of(model: str) -> ModelShape:
    config = known_config(model)
    assert config is not None
    return Decoder(meta_from_config(config, "bfloat16", ModelSource(model))).shape


def candidates(shape: ModelShape, num_gone: int) -> list[Mask]:
    """Return the candidates after `num_gone` removals, which are spread over the model."""
    gone, blocks = Mask(), Granularity.MIX.candidates(shape.num_layers)
    for step in range(num_gone):
        gone = gone.without(blocks.pop(step * 7 % len(blocks)))
    return [gone.without(block) for block in blocks]


class Scaling:
    """Simulated steps for one model, calibration and number of replicas."""

    def __init__(
        self,
        shape: ModelShape,
        num_windows: int,
        num_replicas: int,
        *,
        split: bool,
        factors: Sequence[float],
        task_s: float,
    ) -> None:
        self.shape, self.num_windows, self.num_replicas = shape, num_windows, num_replicas
        self.kernel = kernel_shape(
            shape, seq_len=SEQ_LEN, num_windows=num_windows, bytes_per_value=2, threads=1, free_bytes=10 * 2**30
        )
        if split:
            self.kernel = KernelShape(**{**self.kernel.to_json(), "batch_invariant": True})
        draw = random.Random(0)
        num_nodes = -(-num_replicas // GPUS_PER_NODE)
        nodes = [Node(f"n{index:03}", f"n{index:03}", 64, GPUS_PER_NODE, 0) for index in range(num_nodes)]
        fleet = SimulatedFleet(
            nodes,
            lambda unit: unit.flops / FLOPS_PER_S * draw.choice(factors),
            call_s=task_s,
            driver_s=task_s,
        )
        self.fleet, self.mean_factor = fleet, statistics.mean(factors)
        self.dispatcher = Dispatcher(fleet, Needs(1, 1), num_replicas, lambda text: None)
        # After this all replicas are loaded.
        list(self.dispatcher.run([make_unit([Mask()], 0, 1, shape, self.kernel, SEQ_LEN)]))

    def step(self, masks: Sequence[Mask]) -> tuple[float, float]:
        """Return the seconds of one replica without repeated trunks, and of these replicas."""
        units = split_work(
            masks,
            self.shape,
            self.kernel,
            groups=[range(self.num_windows)],
            seq_len=SEQ_LEN,
            num_replicas=self.num_replicas,
        )
        alone = sweep_flops(sorted_like(units), self.shape, SEQ_LEN) * self.num_windows
        start = self.fleet.now()
        list(self.dispatcher.run(units))
        return alone / FLOPS_PER_S * self.mean_factor, self.fleet.now() - start


def sorted_like(units: Sequence[WorkUnit]) -> list[Mask]:
    return list(dict.fromkeys(mask for unit in units for mask in unit.masks))


def efficiency(steps: Sequence[tuple[float, float]], num_replicas: int) -> float:
    return sum(alone for alone, _ in steps) / num_replicas / sum(taken for _, taken in steps)


def simulate(factors: Sequence[float], task_s: float) -> list[dict[str, Any]]:
    rows = []
    for model in MODELS:
        shape = shape_of(model)
        num_steps = round(0.25 * 2 * shape.num_layers)
        searched = [candidates(shape, gone) for gone in range(0, num_steps, 4)]
        for num_windows in WINDOWS:
            for num_replicas in REPLICAS:
                for split in (True, False):
                    scaling = Scaling(shape, num_windows, num_replicas, split=split, factors=factors, task_s=task_s)
                    first = scaling.step(searched[0])
                    search = [scaling.step(masks) for masks in searched]
                    partial = [scaling.step(masks[5 :: len(masks) // PARTIAL][:PARTIAL]) for masks in searched]
                    rows.append(
                        {
                            "model": model,
                            "num_windows": num_windows,
                            "chunks_split": split,
                            "num_replicas": num_replicas,
                            "step": efficiency([first], num_replicas),
                            "search": efficiency(search, num_replicas),
                            "partial": efficiency(partial, num_replicas),
                            "step_s": first[1],
                        }
                    )
    return rows


def draw_scaling(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, all_axes = plt.subplots(1, len(WINDOWS), figsize=(10, 4), sharey=True, layout="constrained")
    for axes, num_windows in zip(all_axes, WINDOWS, strict=True):
        for model, color in zip(MODELS, ("#2a6f97", "#d1495b", "#6a4c93"), strict=True):
            for split, style in ((True, "-"), (False, ":")):
                some = [
                    row
                    for row in rows
                    if (row["model"], row["num_windows"], row["chunks_split"]) == (model, num_windows, split)
                ]
                label = model if split else None
                xs = [row["num_replicas"] for row in some]
                axes.plot(xs, [row["search"] for row in some], style, color=color, marker=".", label=label)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="replicas", title=f"{num_windows} windows of {SEQ_LEN}", ylim=(0, 1.03))
        axes.set_xticks(REPLICAS, [str(number) for number in REPLICAS])
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("efficiency of a search")
    all_axes[0].legend(title="solid: chunks split, dotted: whole", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=130)


def main(
    real: Annotated[bool, typer.Option(help="Run SmolLM2 on one and two replicas, and measure Ray's overhead.")] = True,
    seq_len: int = 256,
    num_windows: int = 4,
    num_remove: int = 2,
    picture: Annotated[Path, typer.Option(help="File for the picture.")] = Path("scaling.png"),
) -> None:
    figures: dict[str, Any] = {}
    factors, task_s = [1.0], 0.001
    if real:
        figures["real"] = real_runs(seq_len, num_windows, num_remove)
        factors, task_s = figures["real"]["unit_factors"], overhead_s()
        console.print(
            f"SmolLM2, {num_remove} steps, {num_windows} windows of {seq_len}: "
            f"1 replica {figures['real']['wall_s'][1]:.1f} s, 2 replicas {figures['real']['wall_s'][2]:.1f} s: "
            f"{figures['real']['speedup']:.2f}x, same bits: {figures['real']['same_bits']}"
        )
    figures["overhead_per_unit_s"] = task_s
    figures["dispatcher_per_unit_s"] = driver_s()
    console.print(
        f"per unit: driver and Ray {1000 * task_s:.2f} ms, of which the dispatcher's own code "
        f"{1000 * figures['dispatcher_per_unit_s']:.2f} ms; units' times spread from {min(factors):.2f} to "
        f"{max(factors):.2f} of what their FLOPs say"
    )
    rows = simulate(factors, task_s)
    figures["simulated"] = rows
    print_table(
        f"simulated efficiency, windows of {SEQ_LEN}, {FLOPS_PER_S / 1e12:g} TFLOP/s a replica",
        ["model", "windows", "replicas", "step (s)", "step", "search", f"{PARTIAL} masks", "whole chunks"],
        [
            [
                row["model"],
                row["num_windows"],
                row["num_replicas"],
                f"{row['step_s']:.1f}",
                row["step"],
                row["search"],
                row["partial"],
                whole["search"],
            ]
            for row, whole in zip(rows[0::2], rows[1::2], strict=True)
        ],
    )
    draw_scaling(rows, picture)
    console.print(f"picture: {picture}")
    print_json(figures)


if __name__ == "__main__":
    run_benchmark(main)
