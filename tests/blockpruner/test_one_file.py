"""A strategy, a metric, an export format, a compared method, a method of compensation: each is one new file.

The package is copied, one file is added to the copy, and the command line is run from there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import calls
from tests.conftest import Reporter
from tests.processes import REPOSITORY

STRATEGY = '''
from pydantic import Field

from blockpruner.engine.search.oracle import Found, Step
from blockpruner.engine.search.strategy import Strategy


class Topmost(Strategy):
    name = "topmost"
    about = "removes the last blocks that it finds"

    skip: int = Field(default=0, ge=0)
    """Leave the last N candidates alone."""

    def check(self, space):
        if self.skip > 3:
            from blockpruner.engine.errors import UserError

            raise UserError(f"expected `skip` of at most 3, got {self.skip}.")

    def run(self, space, oracle, *, seed=0):
        base, steps = oracle.dense, []
        while candidates := space.candidates(base.mask):
            chosen = candidates[-1 - self.skip]
            base = oracle.score([chosen.mask])[0]
            steps.append(Step(block=chosen.block, score=base, candidates=candidates, scores=[base]))
            oracle.removed(steps[-1])
        return Found.by(steps)

    def flops_left(self, space, mask, num_tokens, rounds_left=None):
        return 0.0
'''
METRIC = """
from blockpruner.engine.metrics.metric import Metric


class Distance(Metric):
    name = key = "l2"
    about = "squared distance of the logits from the dense model's"
    label = "squared distance"

    def token_losses(self, logits, targets, dense):
        return (logits.float() - dense.float()).square().mean(dim=-1)
"""
FORMAT = '''
from typing import ClassVar

from pydantic import Field

from blockpruner.engine.checkpoint.format import TRANSFORMERS, Format


class Listing(Format):
    name = "listing"
    about = "names of the tensors, for people"
    loading = ("Read {folder}/tensors.txt.",)
    runtimes = (TRANSFORMERS,)

    ending: str = "txt"
    """Ending of the file."""

    def write(self, pruned, folder):
        (folder / f"tensors.{self.ending}").write_text("\\n".join(pruned.model.state_dict()))
        return ["nothing runs it"]
'''
METHOD = """
from blockpruner.comparing.ranked import Ranked
from blockpruner.engine.blocks import Block, Granularity, Kind


class Deepest(Ranked):
    name = "deepest"
    about = "whole layers from the last one on"
    statistic = "depth"
    blocks = Granularity.LAYER

    def measure(self, decoder, windows, mask, on_window):
        from blockpruner.engine.methods.ranking import Measured

        layers = range(decoder.shape.num_layers)
        return Measured({Block(Kind.LAYER, layer): -float(layer) for layer in layers}, work_flops=0)
"""
COMPENSATION = '''
from pydantic import Field

from blockpruner.engine.compensation.method import Method


class Part(Method):
    name = "part"
    about = "a part of the fold"
    needs_dense = True
    needs_own = False

    portion: float = Field(default=0.5, gt=0, le=1)
    """How much of the change to make."""

    def fits(self, stage):
        return stage.is_before_gap

    def change(self, dense, own, *, ridge, num_free):
        from blockpruner.engine.compensation.least_squares import solve

        return self.portion * solve(dense, ridge, num_free)
'''
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def house(tmp_path: Path) -> Callable[[str, str], Run]:
    """A copy of the package with one more file; what it gives runs `python -m blockpruner` from there."""

    def add(place: str, text: str) -> Run:
        shutil.copytree(REPOSITORY / "blockpruner", tmp_path / "site" / "blockpruner", symlinks=False)
        (tmp_path / "site" / "blockpruner" / place).write_text(text)

        def run(*words: object) -> subprocess.CompletedProcess[str]:
            environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "200"}
            arguments = [sys.executable, "-m", "blockpruner", *map(str, words)]
            return subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

        return run

    return add


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def search_words(model: Path, text: Path, out: Path) -> list[object]:
    return [
        "search", model, "--calibration", text, "--seq-len", 16, "--num-samples", 20, "--dtype", "float32",
        "--num-remove", 2, "--out", out, "--json",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_strategy(house: Callable[..., Run], tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run = house("engine/strategies/topmost.py", STRATEGY)
    help_text = " ".join(run("search", "--help").stdout.replace("│", " ").split())
    assert "topmost: removes the last blocks that it finds" in help_text
    assert "With topmost: Leave the last N candidates alone." in help_text
    words = search_words(tiny_folder, text_file, tmp_path / "run")
    # On Ray, where actors must find it, too.
    found = told(run(*words, "--strategy", "topmost", "--skip", 1, "--replicas", 2))
    assert [step["block"] for step in found["steps"]] == [["mlp", 2], ["mlp", 1]]
    assert found["config"]["skip"] == 1
    wrong = run(*search_words(tiny_folder, text_file, tmp_path / "other"), "--skip", 1)
    assert (wrong.returncode, wrong.stderr) == (
        2, "error: expected --skip with --strategy topmost, got --strategy greedy.\n",
    )  # fmt: skip
    wrong = run(*search_words(tiny_folder, text_file, tmp_path / "other"), "--strategy", "topmost", "--skip", 4)
    assert (wrong.returncode, wrong.stderr) == (2, "error: expected --skip of at most 3, got 4.\n")


@pytest.mark.slow  # as a strategy
def test_a_metric(house: Callable[..., Run], tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    run = house("engine/metrics/distance.py", METRIC)
    found = told(run(*search_words(tiny_folder, text_file, tmp_path / "run"), "--metric", "l2", "--replicas", 2))
    assert all(step["l2"] > 0 and step["nll"] is None for step in found["steps"])
    assert pq.read_table(tmp_path / "run" / "scores.parquet").column("l2")[1].as_py() > 0
    assert run("report", tmp_path / "run").returncode == 0
    assert "squared distance" in (tmp_path / "run" / "report.html").read_text()


def test_an_export_format(house: Callable[..., Run], tiny_folder: Path, tmp_path: Path, reporter: Reporter) -> None:
    (tmp_path / "order.json").write_text('{"1": [["mha", 1]]}')
    calls.prune_to(
        tmp_path / "pruned", reporter, model=str(tiny_folder), sequence=tmp_path / "order.json", dtype="float32"
    )
    run = house("engine/checkpoint/formats/listing.py", FORMAT)
    words = [
        "export",
        tmp_path / "pruned",
        "--format",
        "listing",
        "--ending",
        "md",
        "--out",
        tmp_path / "out",
        "--json",
    ]
    assert told(run(*words, "--json"))["notes"] == ["nothing runs it"]
    assert "lm_head.weight" in (tmp_path / "out" / "tensors.md").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Read out/tensors.txt." in card
    assert "--format listing --ending md" in card
    assert "names of the tensors, for people" in " ".join(run("export", "--help").stdout.replace("│", " ").split())


@pytest.mark.slow  # as a strategy
def test_a_compared_method(house: Callable[..., Run], tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run = house("comparing/methods/deepest.py", METHOD)
    words = [
        "compare", tiny_folder, "--calibration", text_file, "--seq-len", 16, "--num-samples", 20, "--dtype", "float32",
        "--methods", "deepest", "--ratio", 0.3, "--repeats", 0, "--no-ray", "--out", tmp_path / "out", "--json",
    ]  # fmt: skip
    rows = told(run(*words))["rows"]
    assert rows[1]["mask"] == "mha.2+mlp.2+mha.3+mlp.3"
    assert "deepest: whole layers from the last one on" in run("compare", "--help").stdout


@pytest.mark.slow  # as a strategy
def test_a_method_of_compensation(
    house: Callable[..., Run], tiny_folder: Path, text_file: Path, tmp_path: Path, reporter: Reporter
) -> None:
    (tmp_path / "order.json").write_text('{"1": [["mha", 1]]}')
    calls.prune_to(
        tmp_path / "pruned", reporter, model=str(tiny_folder), sequence=tmp_path / "order.json", dtype="float32"
    )
    run = house("engine/compensation/methods/part.py", COMPENSATION)
    words = [
        "compensate", tmp_path / "pruned", "--calibration", text_file, "--seq-len", 16, "--num-samples", 20,
        "--no-ray", "--dtype", "float32", "--method", "part", "--portion", 0.25, "--ridge", 0.1, "--out",
        tmp_path / "out", "--json",
    ]  # fmt: skip
    assert told(run(*words))["method"] in ("part", None)
    recorded = json.loads((tmp_path / "out" / "blockpruner.json").read_text())["compensation"]
    assert set(recorded["nll"]) == {"pruned", "part with ridge 0.1"}
    assert "With part: How much of the change to make." in " ".join(
        run("compensate", "--help").stdout.replace("│", " ").split()
    )
