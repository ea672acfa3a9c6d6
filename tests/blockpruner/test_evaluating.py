"""Tasks and perplexity: lm-eval's own numbers, whoever answers; a mask alone; resume; what users get wrong."""

import errno
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console

from blockpruner import cli
from blockpruner.engine.calibration import evaluation_windows
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.judge.evaluation import evaluate_perplexity
from blockpruner.engine.judge.judging import EvaluationUnit, JudgingReplica
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.evaluating.evaluating import evaluate_model
from blockpruner.reporting.repeat import evaluate_command
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from tests.calls import prune_to
from tests.conftest import OPTIONS, TEXT, load, tiny_llama, tiny_tokenizer, write_tiny
from tests.processes import REPOSITORY

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
"""
GROUP = """
group: {name}
task: [{tasks}]
"""
MEAN = """aggregate_metric_list:
  - metric: acc_norm
"""
FILTERS = """
filter_list:
  - name: one
    filter:
      - function: take_first
  - name: two
    filter:
      - function: take_first
"""
GENERATE = """
task: writing
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "fox"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two multiple-choice tasks, one of a text's likelihood, one of generation, and one whose data is on the hub."""
    folder = tmp_path_factory.mktemp("tasks")
    words = TEXT.split()
    for name, step in (("first", 3), ("second", 5)):
        rows = [
            {
                "question": " ".join(words[(index * step + offset) % len(words)] for offset in range(4)),
                "choices": [" fox", " dog and bird", " river bank while"],
                "answer": index % 3,
            }
            for index in range(30)
        ]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, file=file))
    shots = CHOICE.format(name="shots", file=folder / "first.jsonl")
    (folder / "shots.yaml").write_text(f"{shots}num_fewshot: 2\nfewshot_split: test\n")
    (folder / "rolling.yaml").write_text(ROLLING.format(file=folder / "first.jsonl"))
    (folder / "writing.yaml").write_text(GENERATE.format(file=folder / "first.jsonl"))
    (folder / "pair.yaml").write_text(GROUP.format(name="pair", tasks="first, second"))
    (folder / "upper.yaml").write_text(GROUP.format(name="upper", tasks="pair") + MEAN)
    (folder / "filtered.yaml").write_text(
        GENERATE.format(file=folder / "first.jsonl").replace("task: writing", "task: filtered") + FILTERS
    )
    (folder / "unsafe.yaml").write_text(
        GENERATE.format(file=folder / "first.jsonl").replace("task: writing", "task: unsafe\nunsafe_code: true")
    )
    (folder / "far.yaml").write_text(CHOICE.format(name="far", file="x").replace("path: json", "path: nobody/nothing"))
    return folder


@pytest.fixture
def options(tiny_folder: Path, task_folder: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_folder), "tasks": ("first", "second"), "include_path": task_folder, "dtype": "float32",
        "threads_per_replica": 1, "no_ray": True,
    }  # fmt: skip


@pytest.fixture
def evaluate(options: dict[str, Any], reporter: Reporter) -> Callable[..., dict[str, Any]]:
    def call(out: Path | None = None, **changes: Any) -> dict[str, Any]:
        return evaluate_model(EvaluationConfig(**{**options, **changes}), reporter, out=out)

    return call


def test_tasks_get_lm_evals_own_numbers(
    evaluate: Callable[..., dict[str, Any]], tiny_folder: Path, task_folder: Path
) -> None:
    names = ["first", "second", "shots", "rolling", "writing"]
    model = HFLM(pretrained=load(tiny_folder), tokenizer=tiny_tokenizer(), batch_size=1)
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    theirs = simple_evaluate(model=model, tasks=names, task_manager=manager)["results"]
    ours = evaluate(tasks=tuple(names))["tasks"]
    assert set(ours) == set(names)
    for name in names:
        for key, value in theirs[name].items():
            if isinstance(value, float):
                assert ours[name]["metrics"][key.partition(",")[0]] == value
    assert ours["first"]["score"] == theirs["first"]["acc_norm,none"]
    assert ours["first"]["stderr"] == theirs["first"]["acc_norm_stderr,none"]
    assert ours["rolling"]["score"] is None


def test_the_average_is_that_of_the_scores(evaluate: Callable[..., dict[str, Any]]) -> None:
    found = evaluate()
    assert found["average"] == sum(task["acc_norm"] for task in found["tasks"].values()) / 2


def test_members_of_a_group_that_has_a_score_do_not_count_beside_it(evaluate: Callable[..., dict[str, Any]]) -> None:
    found = evaluate(tasks=("upper",))
    assert found["average"] == found["tasks"]["upper"]["score"]
    assert {"first", "second"} <= set(found["tasks"])
    assert evaluate(tasks=("pair",))["average"] == evaluate()["average"]


def test_each_filter_of_a_task_has_its_own_value(evaluate: Callable[..., dict[str, Any]]) -> None:
    metrics = evaluate(tasks=("filtered",))["tasks"]["filtered"]["metrics"]
    assert {"exact_match,one", "exact_match,two"} <= set(metrics)


def test_requests_that_were_cut_are_told(
    evaluate: Callable[..., dict[str, Any]], task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": TEXT * 9, "choices": [" fox", " dog"], "answer": 0}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "long.yaml").write_text(CHOICE.format(name="long", file=tmp_path / "long.jsonl"))
    evaluate(tasks=("long",), include_path=tmp_path)
    assert "inputs was truncated" in capsys.readouterr().out


def test_any_number_of_replicas_gives_the_same_numbers(
    options: dict[str, Any], evaluate: Callable[..., dict[str, Any]], text_file: Path, tmp_path: Path
) -> None:
    alone = evaluate(out=tmp_path / "alone", perplexity=(str(text_file),), seq_len=(16,))
    command = [
        sys.executable, "-m", "blockpruner", "evaluate", options["model"], "--tasks", "first,second", "--include-path",
        options["include_path"], "--perplexity", text_file, "--seq-len", "16", "--dtype", "float32", "--replicas", "2",
        "--out", tmp_path / "two", "--json",
    ]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 replicas" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == alone
    assert json.loads((tmp_path / "two" / "evaluation.json").read_text()) == alone


def test_masks_of_a_run_are_evaluated_as_their_checkpoints_are(
    evaluate: Callable[..., dict[str, Any]],
    a_run: Path,
    options: dict[str, Any],
    text_file: Path,
    tmp_path: Path,
    reporter: Reporter,
) -> None:
    texts = {"perplexity": (str(text_file),), "seq_len": (16,)}
    table = evaluate(run=a_run, num_remove=(0, 1, 2), **texts)
    assert [row["num_remove"] for row in table["rows"]] == [0, 1, 2]
    assert table["rows"][2]["tasks"] == table["tasks"]
    dense = evaluate(**texts)
    assert (table["rows"][0]["tasks"], table["rows"][0]["perplexity"]) == (dense["tasks"], dense["perplexity"])
    prune_to(tmp_path / "pruned", reporter, model=options["model"], run=a_run, num_remove=2)
    pruned = evaluate(model=str(tmp_path / "pruned"), **texts)
    assert (table["tasks"], table["perplexity"]) == (pruned["tasks"], pruned["perplexity"])
    assert table["rows"][2]["perplexity"] != table["rows"][0]["perplexity"]


@pytest.fixture(scope="session")
def a_run(tiny_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    config = SearchConfig(model=str(tiny_folder), calibration=str(text_file), num_remove=3, **OPTIONS)
    run_search(config, out, Reporter(Console(file=StringIO())))
    return out


def test_the_score_of_every_question_and_window_is_kept(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path, text_file: Path
) -> None:
    found = evaluate(out=tmp_path / "out", perplexity=(str(text_file),), seq_len=(16,))
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    mine = [row["value"] for row in rows if (row["task"], row["metric"]) == ("second", "acc")]
    assert len(mine) == 30
    assert sum(mine) / 30 == pytest.approx(found["tasks"]["second"]["acc"])
    nlls = [row["value"] for row in rows if row["metric"] == "nll"]
    assert math.exp(sum(nlls) / len(nlls)) == pytest.approx(found["perplexity"][str(text_file)]["value"])


def test_the_setting_is_recorded_and_makes_the_command_again(
    evaluate: Callable[..., dict[str, Any]], options: dict[str, Any], a_run: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked = {"limit": 3, "num_windows": 2, "seq_len": (8, 16), "run": a_run, "num_remove": (0, 2), "batch_size": 2}
    asked |= {"perplexity": (str(text_file),)}
    found = evaluate(out=tmp_path / "out", **asked)
    setting = found["setting"]
    assert (setting["limit"], setting["batch_size"], setting["num_windows"]) == (3, 2, 2)
    assert (setting["device"], setting["dtype"], setting["threads_per_replica"]) == ("cpu", "float32", 1)
    assert setting["seq_len"] == [8, 16]
    assert {"blockpruner", "lm_eval", "torch", "transformers"} <= setting["versions"].keys()
    seen: list[EvaluationConfig] = []
    monkeypatch.setattr(
        "blockpruner.evaluating.evaluating.evaluate_model", lambda config, reporter, out: seen.append(config) or {}
    )
    monkeypatch.setattr(sys, "argv", shlex.split(evaluate_command(tmp_path / "out" / "evaluation.json")))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, capsys.readouterr().err
    assert seen == [EvaluationConfig(**{**options, **asked, "device": "cpu", "no_ray": False, "bos": "first-window"})]
    assert sys.argv[-2:] == ["--out", str(tmp_path / "out")]


def test_the_lengths_of_windows_are_null_where_there_are_none(evaluate: Callable[..., dict[str, Any]]) -> None:
    setting = evaluate(limit=2)["setting"]
    assert setting["seq_len"] is setting["text_column"] is None


def test_errors_are_shown_wherever_there_are_some(
    evaluate: Callable[..., dict[str, Any]], a_run: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"perplexity": (str(text_file),), "seq_len": (16,), "num_windows": 3}
    found = evaluate(run=a_run, num_remove=(0, 2), tasks=("filtered", "rolling"), limit=4, **texts)
    said = capsys.readouterr().out
    for row in found["rows"]:
        perplexity = row["perplexity"][str(text_file)]
        assert f"{perplexity['value']:.2f} ± {perplexity['stderr']:.2f}" in said
    assert "exact_match,one 0 ± 0, exact_match,two 0 ± 0" in said
    assert "stderr," not in said
    assert re.search(r"word_perplexity [\d.e+]+[, ]", said)
    assert not re.search(r"word_perplexity [\d.e+]+ ±", said), "lm-eval has no error for it"


def test_several_window_lengths_are_told_apart(evaluate: Callable[..., dict[str, Any]], text_file: Path) -> None:
    name = str(text_file)
    found = evaluate(tasks=(), include_path=None, perplexity=(name,), seq_len=(8, 16), num_windows=3)["perplexity"]
    assert set(found) == {f"{name}@8", f"{name}@16"}
    assert found[f"{name}@8"]["num_windows"] == 3


def test_perplexity_is_that_of_the_plain_forward(
    evaluate: Callable[..., dict[str, Any]], text_file: Path, tiny_folder: Path
) -> None:
    windows = evaluation_windows(str(text_file), tiny_tokenizer(), seq_len=16).tokens
    plain = evaluate_perplexity(load(tiny_folder), windows)
    found = evaluate(tasks=(), include_path=None, perplexity=(str(text_file),), seq_len=(16,))["perplexity"]
    assert found[str(text_file)]["value"] == plain.value
    assert found[str(text_file)]["stderr"] == plain.stderr


class TestResume:
    def test_known_answers_are_not_asked_for_again(
        self, evaluate: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[EvaluationUnit] = []
        plain = JudgingReplica.score

        def watched(self: JudgingReplica, unit: EvaluationUnit) -> Any:
            asked.append(unit)
            return plain(self, unit)

        monkeypatch.setattr(JudgingReplica, "score", watched)
        whole = evaluate()
        num_units = len(asked)
        answers = tmp_path / "answers.jsonl"
        first = evaluate(out=tmp_path, tasks=("second",))
        assert first["tasks"]["second"] == whole["tasks"]["second"]
        lines = answers.read_text().splitlines()
        answers.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])  # killed while it wrote
        asked.clear()
        assert evaluate(out=tmp_path) == whole
        assert len(asked) == num_units - len(lines) + 2
        asked.clear()
        assert evaluate(out=tmp_path) == whole
        assert not asked

    def test_an_interrupted_evaluation_goes_on(
        self, evaluate: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C in the middle of the tasks."""
        plain, num_left = JudgingReplica.score, 2

        def interrupted(self: JudgingReplica, unit: EvaluationUnit) -> Any:
            nonlocal num_left
            if not num_left:
                raise KeyboardInterrupt
            num_left -= 1
            return plain(self, unit)

        with monkeypatch.context() as patched:
            patched.setattr(JudgingReplica, "score", interrupted)
            with pytest.raises(KeyboardInterrupt):
                evaluate(out=tmp_path)
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
        assert not (tmp_path / "evaluation.json").exists()
        assert evaluate(out=tmp_path) == evaluate()

    def test_answers_in_another_dtype_are_not_used(
        self, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        evaluate(out=tmp_path)
        with pytest.raises(UserError, match="answers of another evaluation: `dtype` was 'float32', now 'bfloat16'"):
            evaluate(out=tmp_path, dtype="bfloat16")

    def test_answers_of_a_model_of_the_same_shape_are_not_used(
        self, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        write_tiny(tmp_path / "other", seed=5)
        evaluate(out=tmp_path / "out")
        with pytest.raises(UserError, match="answers of another evaluation: `model` was"):
            evaluate(out=tmp_path / "out", model=str(tmp_path / "other"))

    def test_answers_for_other_windows_are_not_used(
        self, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        text = tmp_path / "text.txt"
        options: dict[str, Any] = {
            "tasks": (),
            "include_path": None,
            "perplexity": (str(text),),
            "out": tmp_path / "out",
        }
        text.write_text(TEXT * 5)
        evaluate(**options, seq_len=(16,))
        assert evaluate(**options, seq_len=(32,)) == evaluate(**{**options, "out": None}, seq_len=(32,))
        text.write_text(" ".join(reversed((TEXT * 5).split())))
        assert evaluate(**options, seq_len=(32,)) == evaluate(**{**options, "out": None}, seq_len=(32,))

    def test_a_full_disk_ends_an_evaluation_in_one_line(
        self, evaluate: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        evaluate(out=tmp_path, tasks=("second",))
        monkeypatch.setattr("blockpruner.searching.ledger.os.fsync", full)
        with pytest.raises(UserError, match="No space left on device; its content is safe"):
            evaluate(out=tmp_path)


def test_likelihoods_that_are_no_numbers_end_an_evaluation(
    evaluate: Callable[..., dict[str, Any]], tiny_folder: Path, tmp_path: Path, text_file: Path
) -> None:
    broken = load(tiny_folder)
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(SearchFailed, match="infinite likelihoods in 33 requests of task first"):
        evaluate(model=str(tmp_path / "broken"))
    options = {"model": str(tmp_path / "broken"), "tasks": (), "include_path": None, "seq_len": (16,), "num_windows": 2}
    for _ in range(2):  # the second time from the recorded answers
        found = evaluate(out=tmp_path / "out", perplexity=(str(text_file),), **options)["perplexity"][str(text_file)]
        assert math.isnan(found["value"])
        assert found["stderr"] is None
    recorded = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert recorded["perplexity"][str(text_file)]["value"] is None


BAD = {
    "nothing": ({"tasks": (), "include_path": None}, "nothing to evaluate"),
    "an unknown task": ({"tasks": ("firts",)}, "got 'firts'; did you mean first"),
    "a group beside its member": ({"tasks": ("pair", "first")}, "expected each task once in `tasks`: .*'first'"),
    "a task that runs what the model writes": ({"tasks": ("unsafe",)}, "neither is done here"),
    "a task on the hub, offline": ({"tasks": ("far",)}, "task 'far' takes its data from the Hugging Face hub"),
    "no folder of tasks": ({"include_path": Path("nowhere")}, "expected `include_path` to be a folder"),
    "removals without a run": ({"num_remove": (2,)}, "expected `num_remove` together with `run`"),
    "no run": ({"run": Path("nowhere")}, "expected a run directory"),
    "no questions": ({"limit": 0}, "expected `limit` of at least 1"),
    "a folder that is no checkpoint": ({"model": "tests"}, "without one"),
    "an unknown text": ({"perplexity": ("c4",), "seq_len": (16,)}, "'c4'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(
    changes: dict[str, Any], message: str, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        evaluate(out=tmp_path / "out", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_more_removals_than_the_run_has_are_refused(evaluate: Callable[..., dict[str, Any]], a_run: Path) -> None:
    with pytest.raises(UserError, match="expected `num_remove` from 0 to 3"):
        evaluate(run=a_run, num_remove=(4,))


def test_a_run_that_removed_nothing_is_refused_unless_the_dense_model_is_asked_for(
    evaluate: Callable[..., dict[str, Any]], a_run: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    shutil.copytree(a_run, empty)
    ledger = (a_run / "ledger.jsonl").read_text().splitlines(keepends=True)
    first = next(number for number, line in enumerate(ledger) if json.loads(line)["type"] == "step")
    (empty / "ledger.jsonl").write_text("".join(ledger[:first]))
    with pytest.raises(UserError, match=r"a run that removed blocks, got .* without steps"):
        evaluate(run=empty)


def test_a_run_of_another_model_is_refused(
    evaluate: Callable[..., dict[str, Any]], a_run: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    tiny_llama(torch.float32, seed=1).save_pretrained(other)
    with pytest.raises(UserError, match="expected the model that"):
        evaluate(run=a_run, model=str(other))
