"""Studies end with figures, whatever their tasks are scored by, and find what is wrong before they search."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from benchmarks import calibration_draws, sample_sensitivity, studies
from benchmarks.common import print_json, stdev
from benchmarks.studies import Judge, Judged, Variant, all_pairs, cells, score_columns
from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import UserError
from blockpruner.evaluating.config import EvaluationConfig

TASKS = {
    "choice": {"score": 0.5, "stderr": 0.1},
    "rolling": {"score": None, "stderr": None},  # scored by its perplexity
    "group": {"score": 0.5, "stderr": 0.1},
    "no-error": {"score": 0.5, "stderr": None},
    "one-question": {"score": 1.0, "stderr": math.nan},
}
SAMPLES = [("choice", "acc", 1.0), ("choice", "acc", 0.0), ("rolling", "word_perplexity", 9.0), ("text", "nll", 2.0)]


def judged(name: str, perplexity: float = 7.0) -> Judged:
    row = {"ratio": 0.1, "tasks": TASKS, "perplexity": {"text": {"value": perplexity, "stderr": None}}}
    samples = [{"task": task, "metric": metric, "value": value} for task, metric, value in SAMPLES]
    search = {"steps": [{"block": ["mha", 1]}], "calibration": {"num_tokens": 64}, "totals": {"wall_s": 1.0}}
    return Judged(Variant(name), search, [row], samples)


def test_tasks_without_a_score_and_its_error_are_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = judged("one")
    texts, tasks = score_columns([found, judged("other")])
    assert (texts, tasks) == (["text"], ["choice", "group"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("rolling", "no-error", "one-question"))
    assert cells(found.rows[0], texts, tasks) == ["10.0", "7.00 ± 0.00", "50.0 ± 10.0", "50.0 ± 10.0"]


def test_groups_and_unscored_tasks_are_not_compared_by_question(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = all_pairs([judged("one"), judged("other")], ["text", "choice", "rolling", "group"])
    assert [(pair["on"], pair["difference"], pair["p_value"]) for pair in pairs] == [
        ("text", 0.0, 1.0), ("choice", 0.0, 1.0),
    ]  # fmt: skip
    assert "rolling, group" in capsys.readouterr().out


@pytest.mark.parametrize("perplexity", [7.0, math.nan])
def test_draws_of_tasks_of_all_kinds_end_with_figures(
    perplexity: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        calibration_draws,
        "judge_searches",
        lambda variants, *_, **__: [judged(variant.name, perplexity) for variant in variants],
    )
    calibration_draws.main("rows.txt", ["text"], tmp_path, seeds="1,2")
    figures = json.loads((tmp_path / "calibration_draws.json").read_text())
    spreads = {row["on"]: row["stdev"] for row in figures["spreads"]}
    assert spreads == {"text": 0.0 if perplexity == 7.0 else None, "choice": 0.0, "group": 0.0}
    assert {pair["on"] for pair in figures["pairs"]} == {"text", "choice"}


def test_numbers_of_samples_end_with_figures_for_tasks_of_all_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sample_sensitivity, "judge_searches", lambda variants, *_, **__: [judged(variant.name) for variant in variants]
    )
    sample_sensitivity.main("rows.txt", ["text"], tmp_path, samples="8,16")
    figures = json.loads((tmp_path / "sample_sensitivity.json").read_text())
    assert [row["samples"] for row in figures["rows"]] == [8, 16]


def test_a_single_draw_is_refused_before_any_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_draws, "judge_searches", lambda *_, **__: pytest.fail("it has searched"))
    with pytest.raises(UserError, match="at least two --seeds"):
        calibration_draws.main("rows.txt", ["text"], tmp_path, seeds="1")


def test_a_wrong_text_is_found_before_any_search(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "run_search", lambda *_: pytest.fail("it has searched"))
    common = {"model": str(tiny_folder), "calibration": str(text_file), "num_remove": 1}
    with pytest.raises(UserError, match=r"missing\.raw"):
        studies.judge_searches(
            [Variant("a")], common, Judge(held_out=["missing.raw"], seq_len=16), [], tmp_path, replicas=1
        )


def test_the_dense_models_answers_are_there_for_the_first_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, object]] = []

    def evaluate(config: EvaluationConfig, reporter: object, *, out: Path) -> dict[str, Any]:
        asked.append((out.name, config.num_remove or (Mask(),)))
        out.mkdir(parents=True, exist_ok=True)
        rows = [{"num_remove": number} for number in config.num_remove]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"num_remove": 2}]), out / "samples.parquet")
        return {"rows": rows}

    def search(*_: object) -> dict[str, Any]:
        asked.append(("search", ()))
        return {"steps": [1, 2], "dtype": "float32"}

    monkeypatch.setattr(studies, "evaluate_model", evaluate)
    monkeypatch.setattr(studies, "run_search", search)
    judge = Judge(held_out=["text"])
    common = {"model": "tiny", "calibration": "rows.txt", "num_remove": 2}
    found = studies.judge_searches([Variant("a"), Variant("b")], common, judge, [1], tmp_path, replicas=1)
    assert asked == [
        ("a", (Mask(),)), ("search", ()), ("a", (0, 1, 2)), ("search", ()), ("b", (1, 2)),
    ]  # fmt: skip
    assert [[row["num_remove"] for row in one.rows] for one in found] == [[0, 1, 2], [0, 1, 2]]


def test_the_last_line_of_a_study_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"rows": [1]}, tmp_path / "study.json")
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "study.json").read_text()) == printed
    assert printed["rows"] == [1]


def test_a_deviation_needs_finite_values() -> None:
    assert stdev([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert math.isnan(stdev([1.0, math.nan]))
    assert math.isnan(stdev([1.0, math.inf]))
