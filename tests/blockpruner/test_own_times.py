"""A search with a budget in time and without a table: it measures one first, once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import blockpruner as bp
from blockpruner import cli
from blockpruner.apart import Apart
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.latency import Generation
from blockpruner.engine.work.times_file import read_times
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.ledger import Ledger
from blockpruner.searching.reading import Removals, read_summary
from blockpruner.showing.console import Reporter
from blockpruner.timing.block_times import measure_times
from blockpruner.timing.times_config import TimesConfig
from tests import calls
from tests.conftest import load, tiny_tokenizer, write_tiny

MHA, MLP, REST = 2.0, 4.0, 8.0
"""Milliseconds of the made-up machine for one prompt. The tiny model has four layers, so it takes 32."""
SETTING = {"context": 8, "batch": 1}


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The workloads that the made-up machine was given. What is measured in a process of its own is measured here."""
    done: list[Any] = []

    def generate(generation: Generation) -> dict[str, float]:
        names = [name for name, _ in generation.model.named_parameters()]
        workload = generation.workload
        ms = REST + sum(MHA for name in names if "o_proj" in name) + sum(MLP for name in names if "down_proj" in name)
        ms *= workload.batch_size
        done.append(workload)
        return {
            "prefill_tokens_per_s": 1000 * workload.batch_size * workload.prompt_len / (10 * ms),
            "decode_tokens_per_s": 1000 * workload.batch_size / ms,
            workload.generate_s: ms / 1000,
        }

    def here(function: Callable[..., Any], *args: Any) -> Apart[Any]:
        return Apart(function(*args), 0)

    monkeypatch.setattr(Generation, "__call__", generate)
    monkeypatch.setattr("blockpruner.searching.measuring.run_apart", here)
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for a prompt and the new tokens."""
    return write_tiny(tmp_path_factory.mktemp("models") / "long", max_position_embeddings=1024)


@pytest.fixture
def search(
    generations: list[Any], folder: Path, text_file: Path, tmp_path: Path, reporter: Reporter
) -> Callable[..., Path]:
    def call(out: str = "run", **options: Any) -> Path:
        given = {
            "model": str(folder), "calibration": str(text_file), "seq_len": 16, "num_windows": 2, "dtype": "float32",
            "no_ray": True, "threads_per_replica": 1, "per": "ms",
        }  # fmt: skip
        run_search(SearchConfig.of(**{**given, **options}), tmp_path / out, reporter)
        return tmp_path / out

    return call


def times(out: Path, reporter: Reporter, **options: Any) -> dict[str, Any]:
    return measure_times(TimesConfig.of(**options), out, reporter)


def test_a_search_measures_what_times_would_and_keeps_the_table(
    search: Callable[..., Path], folder: Path, tmp_path: Path, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    run = search(budget_ms=42.0, batch=2, context=8)  # twice 32 for the dense model
    told = capsys.readouterr().out
    lengths = {"batch_size": 2, "prompt_len": 8, "num_tokens": 32}
    options = {"model": str(folder), "dtype": "float32", "threads": 1, **lengths}
    assert read_times(run / "times.json") == times(tmp_path / "times.json", reporter, **options)
    assert (run / "times.json").read_text() == (tmp_path / "times.json").read_text()
    assert bp.times(folder, tmp_path / "again.json", dtype="float32", threads=1, **lengths) == read_times(
        tmp_path / "again.json"
    )
    assert "what blocks cost is measured first" in told
    assert "timing 32 tokens after a prompt of 8, batch size 2, on cpu in float32, 1 CPU thread:" in told
    elsewhere = search("elsewhere", budget_ms=42.0, times=run / "times.json")
    assert Removals.read(elsewhere).order == Removals.read(run).order


def test_a_run_is_measured_once(search: Callable[..., Path], generations: list[Any]) -> None:
    run = search(budget_ms=26.0, context=8)
    found, number = Removals.read(run).order, len(generations)
    (run / "times.json").unlink()
    search(budget_ms=20.0, context=8)
    search(budget_ms=18.0)  # what is left open stays as it was
    assert len(generations) == number
    assert Removals.read(run).order[: len(found)] == found
    assert read_summary(run)["config"]["context"] == 8
    with pytest.raises(UserError, match="another config: `context` was 8, now 9"):
        search(budget_ms=18.0, context=9)
    with pytest.raises(UserError, match="another config: `time_for` was 'decode', now 'both'"):
        search(budget_ms=18.0, time_for="both")


def test_a_run_with_a_given_table_goes_on_with_it_when_it_is_not_given_again(
    search: Callable[..., Path], generations: list[Any], tmp_path: Path
) -> None:
    table = search(budget_ms=26.0, context=8) / "times.json"
    run, number = search("given", budget_ms=26.0, times=table), len(generations)
    table.unlink()
    search("given", budget_ms=22.0)
    assert len(generations) == number
    assert read_summary(run)["status"] == "finished"


def test_a_table_outlives_a_budget_that_cannot_be_met(
    search: Callable[..., Path], generations: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"expected `budget_ms` from .* to below 32, which the dense model takes"):
        search(budget_ms=99.0, context=8)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["times.json"]
    number = len(generations)
    search(budget_ms=26.0, context=8)
    assert len(generations) == number


def test_a_table_that_is_in_the_way_is_neither_used_nor_lost(
    search: Callable[..., Path], generations: list[Any], tmp_path: Path, trained_folder: Path
) -> None:
    table = search(budget_ms=26.0, context=8) / "times.json"
    number = len(generations)
    other = tmp_path / "other" / "times.json"
    other.parent.mkdir()
    shutil.copy(table, other)
    with pytest.raises(
        UserError, match=r"another table .*: `prompt_len` was 8, now 9. Give it with `times`, or delete"
    ):
        search("other", budget_ms=26.0, context=9)
    with pytest.raises(UserError, match=r"another table .*: it is of '.*long' .* Give it with `times`, or delete it"):
        search("other", budget_ms=26.0, context=8, model=str(trained_folder))
    assert (other.read_text(), len(generations)) == (table.read_text(), number)
    other.write_text(table.read_text()[:-9])
    with pytest.raises(UserError, match=r"cannot be read as a table of times; delete it to measure again"):
        search("other", budget_ms=26.0, context=8)


def test_a_run_that_measured_goes_on_with_its_own_table_but_not_without_times(
    search: Callable[..., Path], generations: list[Any]
) -> None:
    run = search(budget_ms=30.0, context=8, per="block")
    number = len(generations)
    search(budget_ms=24.0, times=run / "times.json", per="block")
    assert (len(Removals.read(run).order) > 1, len(generations)) == (True, number)
    with pytest.raises(UserError, match="began as a search in milliseconds; go on with `budget_ms` or `per=ms`"):
        search(num_remove=6, per="block")


def test_a_run_that_began_without_times_is_not_measured(search: Callable[..., Path], generations: list[Any]) -> None:
    search(num_remove=1, per="block")
    with pytest.raises(UserError, match="began without times of blocks"):
        search(budget_ms=26.0, per="block")
    assert not generations


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"address": "127.0.0.1:1", "no_ray": False}, "expected `times` with `address`"),
        ({"placement": "streamed"}, "expected `times` with `placement=streamed`"),
        ({"gpus_per_replica": 2}, "expected `times` with `gpus_per_replica`"),
        ({"context": 1000}, "expected `context` and 32 new tokens together of at most 1024 .*, got 1032"),
        ({"keep": "mha.9"}, "expected `keep` of blocks in layers 0 to 3"),
    ],
)
def test_what_cannot_be_measured_here_is_said_before_anything_is_measured(
    search: Callable[..., Path], generations: list[Any], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        search(budget_ms=20.0, **options)
    assert not generations


def test_older_runs_are_read_and_resumed(search: Callable[..., Path], reporter: Reporter) -> None:
    table = search(num_remove=1, context=8, time_for="prefill") / "times.json"
    run = search("older", budget_ms=300.0, times=table, time_for="prefill")
    found = Removals.read(run).order
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    header = lines[0]
    del header["times_setting"], header["config"]["batch"], header["config"]["context"]
    header["config"]["time_of"] = header["config"].pop("time_for")
    (run / "ledger.jsonl").unlink()
    ledger = Ledger(run / "ledger.jsonl")
    for line in lines:
        ledger.append({key: value for key, value in line.items() if key != "chain"})
    ledger.close()
    summary = json.loads((run / "run.json").read_text())
    summary["config"]["time_of"] = summary["config"].pop("time_for")
    for step in summary["steps"]:
        del step["ms"]
    (run / "run.json").write_text(json.dumps(summary))
    assert Removals.read(run).expected_ms(1)["for"] == "prefill"
    calls.report([run], None, reporter)
    search("older", budget_ms=260.0, times=table, time_for="prefill")
    assert Removals.read(run).order[: len(found)] == found
    with pytest.raises(UserError, match="`time_for` was 'prefill', now 'decode'"):
        search("older", budget_ms=21.0, times=table)


def test_a_model_in_memory_is_measured_where_it_is(
    generations: list[Any], folder: Path, text_file: Path, tmp_path: Path
) -> None:
    model, tokenizer = load(folder), tiny_tokenizer()
    text = bp.calibration(text_file, tokenizer, num_samples=20, seq_len=16, num_windows=2)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    model.train()
    found = bp.search(model, text, budget_ms=26.0, per="ms", context=8, out=tmp_path / "run")
    assert generations
    assert {workload.prompt_len for workload in generations} == {8}
    assert model.training
    assert all((weight == before[name]).all() for name, weight in model.named_parameters())
    costs = [MLP if block.kind == "mlp" else MHA for block in found.order]
    assert found.frame()["ms"].tolist() == pytest.approx([32 - sum(costs[: n + 1]) for n in range(len(costs))])
    assert read_times(tmp_path / "run" / "times.json")["setting"]["dtype"] == "float32"
    bp.save(bp.prune(model, found, num_remove=2), tokenizer, tmp_path / "pruned")
    written = json.loads((tmp_path / "pruned" / "blockpruner.json").read_text())
    assert written["expected_ms"]["pruned"] == found.steps[1]["ms"]
    assert written["pruned"]["perplexity"] == found.steps[1]["perplexity"]
    assert written["dense"] == found.summary["dense"]
    calls.export(tmp_path / "pruned", tmp_path / "deci", Reporter(Console(quiet=True)), format="deci")
    assert "comes from a list" not in _card(tmp_path / "deci")
    assert "ms a generated token" in _card(tmp_path / "deci")


def test_the_expected_time_goes_with_the_run_and_the_model(
    search: Callable[..., Path], folder: Path, tmp_path: Path, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    run = search(budget_ms=24.0, context=8)
    summary = read_summary(run)
    costs = [MLP if block.kind == "mlp" else MHA for block in Removals.read(run).order]
    left = [32 - sum(costs[: n + 1]) for n in range(len(costs))]
    assert [step["ms"] for step in summary["steps"]] == pytest.approx(left)
    assert summary["times_setting"]["prompt_len"] == 8
    assert f"removed, {left[0]:.4g} ms expected, perplexity" in capsys.readouterr().out
    pruned = calls.prune_to(tmp_path / "pruned", reporter, model=str(folder), run=run, num_remove=1)
    assert pruned["expected_ms"]["pruned"] == pytest.approx(left[0])
    assert json.loads((tmp_path / "pruned" / "blockpruner.json").read_text())["expected_ms"] == pruned["expected_ms"]
    calls.export(tmp_path / "pruned", tmp_path / "deci", reporter, format="deci")
    assert f"| expected time | {left[0]:.4g} ms a generated token, 32 for the base" in _card(tmp_path / "deci")
    calls.report([run], None, reporter)
    page = (run / "report.html").read_text()
    assert "expected ms" in page
    assert f"{left[-1]:.4g} ms a generated token, 32 for the dense model" in page
    assert "--budget-ms 24.0" in page
    assert "--context 8" in page


def _card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_times_measures_a_run_as_its_own_table_was(
    search: Callable[..., Path], generations: list[Any], folder: Path, tmp_path: Path, reporter: Reporter
) -> None:
    run = search(budget_ms=52.0, batch=2, context=8)
    generations.clear()
    found = times(tmp_path / "times.json", reporter, model=str(folder), run=run, repeats=1)
    assert {(one.batch_size, one.prompt_len, one.num_tokens) for one in generations} == {(2, 8, 32)}
    assert {found["setting"][name] for name in ("threads", "dtype")} == {1, "float32"}
    assert found["run"]["search"]["expected"] == pytest.approx(read_summary(run)["steps"][-1]["ms"])
    assert found["run"]["search"]["measured"] == pytest.approx(found["run"]["search"]["expected"])
    generations.clear()
    times(tmp_path / "times.json", reporter, model=str(folder), run=run, repeats=1, prompt_len=9)
    assert {(one.batch_size, one.prompt_len) for one in generations} == {(2, 9)}


def test_one_command_goes_from_a_model_to_a_time(
    generations: list[Any], folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options = ["--calibration", str(text_file), "--seq-len", "16", "--num-windows", "2", "--no-ray", "--json"]
    options += ["--budget-ms", "240", "--for", "prefill", "--batch", "1", "--context", "8", "--per", "ms"]
    done = CliRunner().invoke(cli.app, ["search", str(folder), *options, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output.splitlines()[-1])["steps"][-1]["ms"] <= 240
    refused = CliRunner().invoke(cli.app, ["search", str(folder), "--num-remove", "1", "--for", "both", "--out", "o"])
    assert "error: expected --for with --budget-ms or --per ms." in refused.output
