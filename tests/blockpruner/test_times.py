"""`times` and `search --budget-ms`: from a table of times to a model that takes as long as asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from blockpruner import cli
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.latency import Generation
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.reading import Removals, read_summary
from blockpruner.showing.console import Reporter
from blockpruner.timing.block_times import measure_times
from blockpruner.timing.times_config import TimesConfig

MHA, MLP, REST = 2.0, 4.0, 8.0
"""Milliseconds of the made-up machine. The tiny model has four layers, so it takes 32."""


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(generation: Generation) -> dict[str, float]:
        names = [name for name, _ in generation.model.named_parameters()]
        ms = REST + sum(MHA for name in names if "o_proj" in name) + sum(MLP for name in names if "down_proj" in name)
        workload = generation.workload
        return {
            "prefill_tokens_per_s": 1000 * workload.prompt_len / ms,
            "decode_tokens_per_s": 1000 / ms,
            workload.generate_s: ms / 1000,
        }

    monkeypatch.setattr(Generation, "__call__", generate)


@pytest.fixture
def table(tiny_folder: Path, tmp_path: Path, reporter: Reporter) -> Path:
    config = TimesConfig(model=str(tiny_folder), prompt_len=8, num_tokens=4, repeats=1, dtype="float32")
    measure_times(config, tmp_path / "times.json", reporter)
    return tmp_path / "times.json"


@pytest.fixture
def search(tiny_folder: Path, text_file: Path, tmp_path: Path, reporter: Reporter) -> Callable[..., Path]:
    def call(**options: Any) -> Path:
        given = {
            "model": str(tiny_folder), "calibration": str(text_file), "seq_len": 16, "num_windows": 2,
            "dtype": "float32", "no_ray": True, "threads_per_replica": 1,
        }  # fmt: skip
        run_search(SearchConfig.of(**{**given, **options}), tmp_path / "run", reporter)
        return tmp_path / "run"

    return call


def test_a_search_goes_on_until_the_model_is_as_fast_as_asked(
    search: Callable[..., Path], table: Path, tiny_folder: Path, tmp_path: Path, reporter: Reporter
) -> None:
    run = search(times=table, budget_ms=21.0, per="ms")
    order = Removals.read(run).order
    costs = [MLP if block.kind == "mlp" else MHA for block in order]
    assert 32 - sum(costs) <= 21.0 < 32 - sum(costs[:-1])
    assert read_summary(run)["times"]["dense"] == pytest.approx(32.0)
    check = TimesConfig(model=str(tiny_folder), prompt_len=8, num_tokens=4, repeats=1, dtype="float32", run=run)
    told = measure_times(check, tmp_path / "again.json", reporter)["run"]["decode"]
    assert told["measured"] == pytest.approx(told["expected"]) == pytest.approx(32 - sum(costs))


def test_a_run_is_resumed_only_with_the_times_that_it_began_with(search: Callable[..., Path], table: Path) -> None:
    run = search(times=table, budget_ms=28.0)
    found = Removals.read(run).order
    assert Removals.read(search(times=table, budget_ms=24.0)).order[: len(found)] == found
    moved = table.rename(table.with_name("moved.json"))
    search(times=moved, budget_ms=22.0)
    values = json.loads(moved.read_text())
    values["decode"]["dense"] += 1
    moved.write_text(json.dumps(values))
    with pytest.raises(UserError, match="began with other times of blocks"):
        search(times=moved, budget_ms=22.0)


def test_the_times_of_another_model_are_refused(search: Callable[..., Path], table: Path, trained_folder: Path) -> None:
    with pytest.raises(UserError, match=r"expected the times of .*trained.*, got those of .*tiny"):
        search(times=table, budget_ms=20.0, model=str(trained_folder))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_remove": 2, "times": "table"}, "expected `times` with `budget_ms` or `per=ms`"),
        ({"num_remove": 2, "time_for": "prefill"}, "expected `time_for` with `budget_ms` or `per=ms`"),
        ({"num_remove": 2, "context": 8}, "expected `context` with `budget_ms` or `per=ms`"),
        ({"budget_ms": 9.0, "times": "table", "batch": 2}, "expected `batch` without `times`"),
        ({"budget_ms": 9.0, "ratio": 0.1}, "expected one of `num_remove`, `ratio` and `budget_ms`"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        SearchConfig.of(model="m", **options)


def test_a_plan_knows_the_budget_in_time_from_a_table(table: Path, tiny_folder: Path) -> None:
    def plan(*options: str) -> Any:
        return CliRunner().invoke(cli.app, ["plan", str(tiny_folder), "--tflops", "1", "--seq-len", "16", *options])

    done = plan("--times", str(table), "--budget-ms", "20", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output.splitlines()[-1])["num_steps"] >= 3
    refused = plan("--budget-ms", "20", "--for", "prefill", "--batch", "4")
    assert refused.exit_code == 2
    assert "error: expected --times with --budget-ms, since a plan loads no weights" in refused.output
    assert plan("--num-remove", "2", "--per", "ms").exit_code == 0  # whose number of steps depends on no table


def test_the_command_writes_the_table(tiny_folder: Path, tmp_path: Path) -> None:
    options = ["--prompt-len", "8", "--num-tokens", "4", "--repeats", "1", "--out", str(tmp_path / "new" / "t.json")]
    done = CliRunner().invoke(cli.app, ["times", str(tiny_folder), *options])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "new" / "t.json").read_text())["decode"]["mlp"][0][-1] == pytest.approx(MLP)


def test_a_file_that_cannot_be_written_is_said_before_a_model_is_looked_for(tmp_path: Path, reporter: Reporter) -> None:
    for out, why in ((tmp_path, "which is a folder"), (Path("/proc/times.json"), "cannot write '/proc/times.json'")):
        with pytest.raises(UserError, match=why):
            measure_times(TimesConfig(model="nowhere"), out, reporter)
