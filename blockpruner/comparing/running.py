"""Runs one method in its own process, and records its removal order or checkpoint and the time that it took."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from rich.console import Console
from typing_extensions import TypedDict

from blockpruner.apart import run_apart
from blockpruner.comparing.method import Clock, Method
from blockpruner.engine.blocks import Block
from blockpruner.engine.channels import CHANNELS_FILE
from blockpruner.engine.json_files import BlockPair, Count, check_shape, read_json
from blockpruner.files import write_json
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.sequence import official_sequence
from blockpruner.showing.console import Reporter

OUTCOME = "outcome.json"
OF_THE_START = ("startup_s", "load_s", "peak_memory_bytes")


class _Step(TypedDict):
    block: BlockPair
    ratio: float
    search_s: float | None
    work_flops: Count


class _Times(TypedDict):
    num_threads: Count | None
    startup_s: float | None
    load_s: float | None
    peak_memory_bytes: Count | None


class _Ordered(_Times):
    """The outcome of a method that removes blocks in an order."""

    steps: Annotated[list[_Step], Field(min_length=1)]


class _Rebuilt(_Times):
    """The outcome of a method that writes a checkpoint."""

    ratio: float
    search_s: float | None
    work_flops: Count | None


def read_outcome(file: Path) -> dict[str, Any]:
    """Return the content of outcome.json. Raises UserError if it is damaged."""
    then = "delete the folder that it lies in to run the method again"
    found: dict[str, Any] = read_json(file, dict[str, Any], then)
    check_shape(found, _Ordered if "steps" in found else _Rebuilt, repr(str(file)), then)
    return found


def run_method(name: str, told: SearchConfig, folder: Path, translate: Callable[[str], str] = str) -> dict[str, Any]:
    """Run a method in a new process and return the content of outcome.json.

    Writes outcome.json, and sequence.json with the removal order (and channels.npz, if groups are removed) or
    checkpoint/ with the model, to `folder`. The method can write more files.

    told: from `CompareConfig.told`. translate: see `Reporter`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    apart = run_apart(_run_here, name, told, folder, time.time(), translate)
    outcome = {**apart.value, "peak_memory_bytes": apart.peak_memory_bytes}
    if outcome["was_resumed"]:  # this session did only part of the work, so its times are not those of the method
        outcome |= {**dict.fromkeys((*OF_THE_START, "total_s")), **_times_so_far(folder / OUTCOME, outcome)}
    write_json(folder / OUTCOME, outcome)
    return outcome


def _times_so_far(file: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    """Return the times of a search that an earlier session finished and this session continued.

    The known steps keep their times, and this session's further steps add theirs.
    """
    if not file.exists():
        return {}
    earlier = read_outcome(file)
    known, steps = earlier["steps"], outcome["steps"]
    last = len(known) - 1
    further = [
        {**step, "search_s": known[last]["search_s"] + step["search_s"] - steps[last]["search_s"]}
        for step in steps[last + 1 :]
    ]
    num_threads = earlier["num_threads"] if earlier["num_threads"] == outcome["num_threads"] else None
    return {**{key: earlier[key] for key in OF_THE_START}, "num_threads": num_threads, "steps": [*known, *further]}


def _run_here(
    name: str, told: SearchConfig, folder: Path, began_s: float, translate: Callable[[str], str]
) -> dict[str, Any]:
    clock = Clock.since(began_s)
    found = Method.named("methods", name).run(told, folder, Reporter(Console(), translate), clock)
    if "steps" in found:
        order = [Block.from_json(step["block"]) for step in found["steps"]]
        write_json(folder / "sequence.json", official_sequence(order))
        if any(block.part for block in order):
            shutil.copyfile(folder / "run" / CHANNELS_FILE, folder / CHANNELS_FILE)
    header = {
        "method": name,
        "blockpruner": version("blockpruner"),
        "num_threads": torch.get_num_threads(),
        "was_resumed": False,
        "startup_s": clock.startup_s,
        "load_s": clock.load_s,
        "total_s": clock.total_s,
    }
    return {**header, **found}
