"""One method, in a process of its own, to its removal order or its checkpoint on disk, with the time that it took."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from blockpruner.apart import run_apart
from blockpruner.comparing.methods import Rebuilt, Searched, method
from blockpruner.comparing.ranking import rank_blocks
from blockpruner.comparing.rebuilding import rebuild
from blockpruner.engine.blocks import Block
from blockpruner.files import write_json
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.run import official_sequence, read_events
from blockpruner.showing.console import Reporter

OUTCOME = "outcome.json"
OF_THE_START = ("startup_s", "load_s", "peak_memory_bytes")


def run_method(name: str, config: SearchConfig, folder: Path, *, ratio: float | None = None) -> dict[str, Any]:
    """Run a method in a new process. Leaves in `folder`: outcome.json (also returned), sequence.json with the removal
    order or checkpoint/ with the model, and what the method itself keeps.

    config: as `CompareConfig.search_by` gives it. ratio: for a method that rebuilds the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    apart = run_apart(_run_here, name, config, folder, ratio, time.time())
    outcome = {**apart.value, "peak_memory_bytes": apart.peak_memory_bytes}
    if outcome["was_resumed"]:  # this session did a part of the work: its times are not the method's
        outcome |= {**dict.fromkeys((*OF_THE_START, "total_s")), **_times_so_far(folder / OUTCOME, outcome)}
    write_json(folder / OUTCOME, outcome)
    return outcome


def _times_so_far(file: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    """Of a search that an earlier session brought to an end, and this one further: the times of the steps that were
    known, and what this session's steps took beyond them."""
    if not file.exists():
        return {}
    earlier = json.loads(file.read_text(encoding="utf-8"))
    known, steps = earlier["steps"], outcome["steps"]
    last = len(known) - 1
    further = [
        {**step, "search_s": known[last]["search_s"] + step["search_s"] - steps[last]["search_s"]}
        for step in steps[last + 1 :]
    ]
    num_threads = earlier["num_threads"] if earlier["num_threads"] == outcome["num_threads"] else None
    return {**{key: earlier[key] for key in OF_THE_START}, "num_threads": num_threads, "steps": [*known, *further]}


@dataclass
class _Clock:
    """Seconds since this process began."""

    began_s: float
    """Since the epoch."""
    startup_s: float
    """Until the method is called: Python and its imports."""
    load_s: float = 0.0
    """From then until the first pass over the text: Ray, the model, the calibration windows; of a search also the look
    at whether larger calls give the same bits."""

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
        return {**_header(name, clock), **found, "search_s": clock.search_s()}
    if isinstance(how, Searched):
        found = _search(config, folder / "run", reporter, clock)
    else:
        ranked = rank_blocks(how, config, reporter, clock.loaded)
        found = {"steps": [{**step, "search_s": clock.search_s()} for step in ranked]}
    order = [Block.from_json(step["block"]) for step in found["steps"]]
    write_json(folder / "sequence.json", official_sequence(order))
    return {**_header(name, clock), **found}


def _header(name: str, clock: _Clock) -> dict[str, Any]:
    return {
        "method": name,
        "blockpruner": version("blockpruner"),
        "num_threads": torch.get_num_threads(),
        "was_resumed": False,
        "startup_s": clock.startup_s,
        "load_s": clock.load_s,
        "total_s": clock.total_s,
    }


def _search(config: SearchConfig, run: Path, reporter: Reporter, clock: _Clock) -> dict[str, Any]:
    """The steps, each with the seconds of search until it was done; whether an earlier session did some of it; and the
    CPU threads of all replicas together."""
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
    num_threads = summary["num_replicas"] * summary["kernel"]["threads"]
    return {"steps": steps, "was_resumed": was_resumed, "num_threads": num_threads}
