"""The benchmark of GPUs, as far as a CPU can tell."""

import subprocess
import sys
from pathlib import Path

import psutil
import torch

from benchmarks.gpu.part import Setting, _end, run_part
from benchmarks.roofline import Setting as Sweep
from benchmarks.roofline import _timed_parts, sweeps_s
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.streaming import stream_layers
from blockpruner.engine.model.weights import Casting
from tests.conftest import tiny_llama

CPU = torch.device("cpu")
PARENT = """
import subprocess, sys
program = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(program, start_new_session=True, stdout=subprocess.DEVNULL).pid, flush=True)
sys.stdin.read()
"""


def test_a_timed_model_is_still_streamed_afterwards() -> None:
    model = tiny_llama(torch.float32)
    layers = list(model.model.layers)
    stream_layers(model, layers, CPU, Casting(torch.float32, torch.float32))
    decoder = Decoder(model, [CPU] * len(layers))
    before = [layer.__dict__["forward"] for layer in layers]
    with _timed_parts(decoder) as spent:
        seconds = sweeps_s(decoder, Sweep("float32", 16, 8), threads=1, repeats=1)
    assert spent["attention"] > 0
    assert seconds > 0
    assert [layer.__dict__["forward"] for layer in layers] == before
    assert "forward" not in layers[0].mlp.__dict__


def test_a_part_that_is_ended_leaves_no_process() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        _end(parent.pid)
        psutil.wait_procs([child], timeout=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_part_that_ends_early_has_broken_its_promise(tmp_path: Path) -> None:
    report, _ = run_part("nothing", Setting("random-tiny", "random-tiny", "float32", "cpu", 16, tmp_path), limit_s=100)
    assert [(one.what, one.seen, one.is_kept) for one in report.promises] == [("nothing", "ended with code 1", False)]
