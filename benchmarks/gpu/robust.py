"""Robust: a device that is too small, a replica that is killed, and a card that another process has nearly filled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import blockpruner as bp
from benchmarks.faults import Run, replicas_of
from benchmarks.gpu.part import Report, Setting
from blockpruner.cluster.session import PRIVATE, QUIET
from blockpruner.searching.reading import read_events

NUM_REMOVE = 3
HOG = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(max(0, free - int(sys.argv[1])), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


def too_little_memory(setting: Setting, report: Report) -> None:
    """The calls that fit into the free memory are too large for what the process may take."""
    what, promised = "out of memory on purpose", "halved, recorded, same order"
    if _needs_a_gpu(setting, report, what, promised):
        return
    model, tokenizer = bp.load(setting.dense, dtype=setting.dtype)
    model.to("cuda")
    weights = torch.cuda.memory_allocated()
    expected = _search(setting, model, tokenizer, setting.folder / "enough")
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((weights + 0.5 * (peak - weights)) / total)
    try:
        found = _search(setting, model, tokenizer, setting.folder / "little")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    notes = [event["text"] for event in read_events(setting.folder / "little") if event["type"] == "note"]
    told = [note for note in notes if "memory" in note]
    is_kept = found == expected and bool(told)
    report.add(
        what, promised, f"{told[-1] if told else 'nothing was told'}; order {_same(found, expected)}", is_kept=is_kept
    )


def killed(setting: Setting, report: Report) -> None:
    """One replica needs no Ray on its own machine, so it joins one as on a cluster. The search is long enough for a GPU
    to be at it still when its replica is killed."""
    os.environ.update({**QUIET, **PRIVATE})  # which Ray reads when it is imported
    from ray.cluster_utils import Cluster

    resources = {"num_cpus": 1, "num_gpus": 1 if setting.device == "cuda" else 0}
    cluster = Cluster(initialize_head=True, head_node_args={**resources, "include_dashboard": False})
    try:
        options = [
            "--address", cluster.address, "--device", setting.device, "--dtype", setting.dtype, "--num-samples", "200",
            "--seq-len", str(setting.seq_len // 4), "--num-windows", "16", "--num-remove", "4",
        ]  # fmt: skip
        expected = Run(setting.folder, "undisturbed", options, dict(os.environ), str(setting.dense)).result()
        run = Run(setting.folder, "killed", options, dict(os.environ), str(setting.dense))
        run.wait_for(lambda: run.units() >= 1)
        at_s = time.time()
        replicas_of(os.getpid())[0].kill()
        run.wait_for(lambda: run.said("is ready", at_s))
        recovered_s = time.time() - at_s
        found = run.result()
    finally:
        cluster.shutdown()
    report.figures["recovered_s"] = recovered_s
    report.add(
        "a replica killed", "replaced, same bits", f"replaced in {recovered_s:.0f} s, {_same(found, expected)}",
        is_kept=found == expected,
    )  # fmt: skip


def taken_card(setting: Setting, report: Report) -> None:
    what, promised = "most of the card taken by another process", "same order, or one line that says what to do"
    if _needs_a_gpu(setting, report, what, promised):
        return
    model, tokenizer = bp.load(setting.dense, dtype=setting.dtype)
    size = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    expected = _search(setting, model.to("cuda"), tokenizer, setting.folder / "alone")
    model.to("cpu")
    torch.cuda.empty_cache()
    left = str(size + 2 * 2**30)
    with subprocess.Popen(
        [sys.executable, "-c", HOG, left], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as hog:
        assert hog.stdout is not None
        hog.stdout.readline()
        try:
            found = _search(setting, model.to("cuda"), tokenizer, setting.folder / "crowded")
            seen, is_kept = f"order {_same(found, expected)}", found == expected
        except (bp.UserError, bp.SearchFailed) as error:
            seen, is_kept = f"refused: {error}", True
        hog.kill()
    report.add(what, promised, seen, is_kept=is_kept)


STEPS = (too_little_memory, killed, taken_card)


def _needs_a_gpu(setting: Setting, report: Report, what: str, promised: str) -> bool:
    """Report what cannot be tried on a CPU."""
    if setting.device == "cuda":
        return False
    report.add(what, promised, "needs a GPU", is_kept=None)
    return True


def _search(setting: Setting, model: Any, tokenizer: Any, out: Path) -> list[str]:
    text = bp.calibration(setting.text, tokenizer, num_samples=200, seq_len=setting.seq_len // 4, num_windows=4)
    return [str(block) for block in bp.search(model, text, num_remove=NUM_REMOVE, out=out).order]


def _same(found: object, expected: object) -> str:
    return "as without" if found == expected else "NOT as without"
