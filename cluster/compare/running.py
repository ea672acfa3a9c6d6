"""One method, in a process of its own, to its removal order or its checkpoint on disk, with the time that it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from cluster.apart import run_apart
from cluster.compare.methods import Ranked, Rebuilt, Searched, method
from cluster.compare.rebuilding import rebuild
from cluster.config import SearchConfig
from cluster.driver import run_search
from cluster.files import write_json
from cluster.job import Job, prepare
from cluster.placement import local_cpus
from cluster.preflight import device_bytes
from cluster.progress import Reporter
from cluster.run import official_sequence, read_events
from engine.blocks import Block, Mask
from engine.holding import devices_of, load_decoder
from engine.host_memory import keep_freed_memory
from engine.memory import Placement, resolve_placement, smallest_sweep_bytes
from engine.methods.ranking import rank
from engine.scoring import full_memory_ends

OUTCOME = "outcome.json"


def run_method(name: str, config: SearchConfig, folder: Path, *, ratio: float | None = None) -> dict[str, Any]:
    """Run a method in a new process. Leaves in `folder`: outcome.json (also returned), sequence.json with the removal
    order or checkpoint/ with the model, and what the method itself keeps.

    config: as `CompareConfig.search_by` gives it. ratio: for a method that rebuilds the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    apart = run_apart(_run_here, name, config, folder, ratio, time.time())
    outcome = {**apart.value, "peak_memory_bytes": apart.peak_memory_bytes}
    if outcome["was_resumed"]:  # this session did a part of the work: its times are not the method's
        outcome |= dict.fromkeys(("startup_s", "load_s", "total_s", "peak_memory_bytes"))
    write_json(folder / OUTCOME, outcome)
    return outcome


@dataclass
class _Clock:
    """Seconds since this process began."""

    began_s: float
    """Since the epoch."""
    startup_s: float
    """Until the method is called: Python and its imports."""
    load_s: float = 0.0
    """From then until the first pass over the text: Ray, the model, the calibration windows."""

    @classmethod
    def since(cls, began_s: float) -> _Clock:
        return cls(began_s, time.time() - began_s)

    def loaded(self, at_s: float | None = None) -> None:
        self.load_s = (at_s or time.time()) - self.began_s - self.startup_s

    def search_s(self, at_s: float | None = None) -> float:
        """From then on."""
        return (at_s or time.time()) - self.began_s - self.startup_s - self.load_s

    @property
    def total_s(self) -> float:
        return time.time() - self.began_s


def _run_here(name: str, config: SearchConfig, folder: Path, ratio: float | None, began_s: float) -> dict[str, Any]:
    clock, reporter = _Clock.since(began_s), Reporter(Console())
    how = method(name).how
    if isinstance(how, Rebuilt):
        assert ratio is not None
        found = rebuild(name, config, folder / "checkpoint", ratio, reporter, clock.loaded)
        return {**_header(name, clock), **found, "search_s": clock.search_s(), "was_resumed": False}
    if isinstance(how, Searched):
        steps, was_resumed = _search(config, folder / "run", reporter, clock)
    else:
        steps, was_resumed = list(_rank(how, config, reporter, clock)), False
    write_json(folder / "sequence.json", official_sequence([Block.from_json(step["block"]) for step in steps]))
    return {**_header(name, clock), "steps": steps, "was_resumed": was_resumed}


def _header(name: str, clock: _Clock) -> dict[str, Any]:
    return {
        "method": name,
        "blockpruner": version("blockpruner"),
        "startup_s": clock.startup_s,
        "load_s": clock.load_s,
        "total_s": clock.total_s,
    }


def _search(config: SearchConfig, run: Path, reporter: Reporter, clock: _Clock) -> tuple[list[dict[str, Any]], bool]:
    """The steps, each with the seconds of search until it was done; and whether an earlier session did some of it."""
    was_resumed = (run / "ledger.jsonl").exists()
    summary = run_search(config, run, reporter)
    units = [event for event in read_events(run) if event["type"] == "unit"]
    if not was_resumed:
        clock.loaded(min(unit["start_s"] for unit in units))
    last_s = max(unit["stop_s"] for unit in units)
    spent_s, work_flops, steps = 0.0, 0, []
    for number, step in enumerate(summary["steps"], start=1):
        spent_s += step["wall_s"]
        work_flops += step["work_flops"]
        if "rounds" in summary:  # masks were judged as wholes: no part of the order is known before the end
            done_s, work_flops = last_s, summary["totals"]["work_flops"]
        else:
            done_s = max((unit["stop_s"] for unit in units if unit["step"] == number), default=last_s)
        search_s = spent_s if was_resumed else clock.search_s(done_s)
        steps.append({"block": step["block"], "ratio": step["ratio"], "search_s": search_s, "work_flops": work_flops})
    return steps, was_resumed


def _rank(how: Ranked, config: SearchConfig, reporter: Reporter, clock: _Clock) -> Iterator[dict[str, Any]]:
    job = prepare(config, reporter)
    torch.set_num_threads(config.threads_per_replica or local_cpus())
    keep_freed_memory()
    with full_memory_ends("before the model is loaded", "free it, or use a smaller --dtype."):
        decoder = load_decoder(job.model, job.dtype, _placement(config, job), devices_of(job.device, 1))
        decoder.check()
    space, mask = config.space(job.shape), Mask()
    clock.loaded()
    num_windows = job.windows.num_windows
    with reporter.bar(str(how.statistic), num_windows * (space.num_steps_left(mask) if how.again else 1)):
        order = rank(
            decoder, job.windows.tokens, space, how.statistic, again=how.again, on_window=lambda: reporter.advance(1)
        )
        for removal in order:
            mask = mask.without(removal.block)
            if how.again:  # how many it takes to a ratio is known at the end only
                reporter.expect(reporter.done + num_windows * space.num_steps_left(mask))
            yield {
                "block": removal.block.to_json(),
                "ratio": job.shape.ratio(mask),
                "search_s": clock.search_s(),
                "work_flops": removal.work_flops,
            }


def _placement(config: SearchConfig, job: Job) -> Placement:
    """One pass needs one device: what does not fit it is streamed."""
    working_bytes = smallest_sweep_bytes(job.shape, seq_len=job.windows.seq_len, bytes_per_value=job.bytes_per_value)
    placement, _ = resolve_placement(
        config.placement,
        job.sizes,
        device_bytes(job.device) or psutil.virtual_memory().available,
        on_gpu=job.device == "cuda",
        gpus_per_replica=1 if job.device == "cuda" else None,
        gpus_per_node=1,
        working_bytes=working_bytes,
    )
    return placement
