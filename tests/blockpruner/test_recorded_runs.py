"""Runs that were made before a redesign go on as if nothing had happened (tests/recorded/README.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from blockpruner.engine.errors import UserError
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.reading import read_summary
from blockpruner.showing.console import Reporter
from tests import calls
from tests.processes import REPOSITORY

RECORDED = REPOSITORY / "tests" / "recorded"
RUNS = sorted(folder.name for folder in (RECORDED / "runs").iterdir())
DERIVED = ("run.json", "sequence.json")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A copy to work on, in the folder in which relative names mean what they meant."""
    shutil.copytree(RECORDED, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return lambda name: Path("runs") / name


def recorded_config(run: Path) -> dict[str, Any]:
    header: dict[str, Any] = json.loads((run / "ledger.jsonl").read_text().splitlines()[0])
    last: dict[str, Any] = json.loads((run / "run.json").read_text())["config"]
    return {**header["config"], **last}


def without_times(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in step.items() if key != "wall_s"} for step in steps]


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_read_without_scoring_anything(
    run: Any, reporter: Reporter, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = run(name)
    before = {file: (folder / file).read_bytes() for file in DERIVED}
    ledger, scores = (folder / "ledger.jsonl").read_bytes(), pq.read_table(folder / "scores.parquet").to_pylist()
    monkeypatch.setattr("blockpruner.searching.scores.open_replicas", None)
    found = run_search(SearchConfig.from_json(recorded_config(folder)), folder, reporter)
    assert (folder / "ledger.jsonl").read_bytes() == ledger
    assert (folder / "sequence.json").read_bytes() == before["sequence.json"]
    assert pq.read_table(folder / "scores.parquet").to_pylist() == scores
    old, new = json.loads(before["run.json"]), json.loads(json.dumps(found))
    for values in (old, new):  # the old config knew options that are gone, and not all of today's
        values["config"] = {key: value for key, value in values["config"].items() if value not in (None, False)}
    assert new == old


def test_a_run_goes_further_bit_for_bit(run: Any, reporter: Reporter) -> None:
    """On another processor the dense model may have other last bits: then the run must say so, and go on nowhere."""
    config = SearchConfig.from_json(recorded_config(run("greedy"))).replace(num_remove=5)
    try:
        found = run_search(config, run("greedy"), reporter)
    except UserError as error:
        if "the dense model scores" not in str(error):
            raise
        pytest.skip("this processor gives other bits than the one that began the run")
    assert without_times(found["steps"]) == without_times(read_summary(run("greedy-further"))["steps"])


def test_a_run_with_an_option_that_is_gone_is_refused_by_its_name(run: Any, reporter: Reporter) -> None:
    folder = run("greedy")
    ledger = folder / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"refine": false', '"refine": true'))
    config = SearchConfig.from_json({**recorded_config(folder), "refine": False})
    with pytest.raises(UserError, match="was made with refine, which this version of blockpruner does not have"):
        run_search(config, folder, reporter)


def test_it_is_pruned_and_reported(run: Any, reporter: Reporter, tmp_path: Path) -> None:
    pruned = calls.prune_to(tmp_path / "pruned", reporter, model="model", run=run("greedy"))
    assert pruned["removed"] == [["mha", 1], ["mlp", 3], ["mha", 2]]
    calls.report([run("greedy"), run("lazy")], tmp_path / "both", reporter)
    assert (tmp_path / "both" / "report.html").is_file()
