"""Whole: from a model to one that is served, each command timed, and the speed of generation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import blockpruner as bp
from benchmarks.gpu.part import Report, Setting

RATIO = 0.2


def pipeline(setting: Setting, report: Report) -> None:
    folder, dense = setting.folder / "whole", str(setting.dense)
    folder.mkdir()
    how: dict[str, Any] = {
        "dtype": setting.dtype, "device": setting.device, "no_ray": True, "num_samples": 500,
        "seq_len": setting.seq_len, "num_windows": 4,
    }  # fmt: skip

    def search() -> object:
        return bp.search(dense, setting.text, ratio=RATIO, strategy="lazy", out=folder / "run", tolerance="1se", **how)

    def compensate() -> object:
        fit: dict[str, Any] = {"calibration": (str(setting.text),), "method": "both", "ridge": 0.1}
        return bp.compensate_folder(folder / "pruned", folder / "fitted", **fit, **how)

    def prune() -> object:
        _, tokenizer = bp.load(dense)
        return bp.save(bp.prune(dense, folder / "run"), tokenizer, folder / "pruned")

    steps: dict[str, Callable[[], object]] = {
        "search": search,
        "prune": prune,
        "compensate": compensate,
        "export": lambda: bp.export(folder / "fitted", folder / "deci", format="deci"),
    }
    times: dict[str, float] = {}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        times[name] = time.perf_counter() - start
    report.figures["seconds"] = times
    told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items())
    report.add(f"search to export, {setting.model}, {RATIO:.0%}", "ends", told, is_kept=True)


def generation(setting: Setting, report: Report) -> None:
    found: dict[str, Any] = {}
    for name, is_static in (("dynamic", False), ("static", True)):
        found[name] = bp.latency(
            setting.folder / "whole" / "fitted", dense=str(setting.dense), repeats=3, static_cache=is_static,
            prompt_len=min(512, setting.seq_len // 2), num_tokens=32, dtype=setting.dtype, device=setting.device,
        )  # fmt: skip
        report.figures[f"latency_{name}"] = found[name]
        gain = found[name]["ratio"]["decode_tokens_per_s"]
        report.add(
            f"generation with a {name} cache, pruned against dense", "faster", f"{gain:.2f} times", is_kept=gain > 1
        )


STEPS = (pipeline, generation)
