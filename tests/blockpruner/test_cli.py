"""The command line: what users get wrong, and the path from a search to a checkpoint and its report."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from blockpruner import cli
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.remote_code import write_remote_code_model

Run = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process: exit code, lines on stdout, lines on stderr."""

    def call(*arguments: object) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["blockpruner", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        stdout, stderr = capsys.readouterr()
        return ended.value.code or 0, stdout.splitlines(), stderr.splitlines()  # type: ignore[return-value]

    return call


@pytest.fixture
def search(run: Run, tiny_folder: Path, text_file: Path) -> Run:
    def call(*options: object, model: object = tiny_folder) -> tuple[int, list[str], list[str]]:
        defaults = {
            "--calibration": text_file, "--seq-len": 16, "--num-samples": 20, "--num-remove": 3, "--dtype": "float32",
        }  # fmt: skip
        given = {"--num-remove" if option == "--ratio" else option for option in options}
        kept = [word for option, value in defaults.items() if option not in given for word in (option, value)]
        return run("search", model, *options, *kept, "--no-ray")

    return call


BAD_SEARCHES = {
    "K below one": (["--num-remove", 0], "expected --num-remove of at least 1, got 0"),
    "K of all blocks": (["--num-remove", 8], "expected --num-remove from 1 to 7"),
    "ratio of one": (["--ratio", "1.0"], "expected --ratio between 0 and 1"),
    "ratio below zero": (["--ratio", "-0.1"], "expected --ratio between 0 and 1"),
    "ratio out of reach": (["--ratio", "0.9"], "expected --ratio of at most"),
    "a word for a number": (["--seq-len", "many"], "Invalid value for '--seq-len'"),
    "an unknown option": (["--sequence-length", 5], "No such option"),
    "an unknown strategy": (
        ["--strategy", "clever"],
        "expected --strategy to be evolution, greedy, lazy, multipruner or one-shot, got 'clever'",
    ),
    "no calibration file": (["--calibration", "nowhere.jsonl"], "'nowhere.jsonl', which does not exist"),
    "an unknown calibration set": (["--calibration", "c4"], "expected alpaca, wikitext2, builtin or a file"),
    "too short for a window": (["--seq-len", 128, "--num-samples", 1], "at least one window of 128 tokens"),
    "a window of one token": (["--seq-len", 1], "expected --seq-len of at least 2"),
    "no samples": (["--num-samples", 0], "expected --num-samples of at least 1"),
    "more audits than steps": (["--strategy", "lazy", "--audit", 99], "expected --audit from 1 to"),
    "an audit of what is exhaustive": (["--audit", 1], "--audit with --strategy lazy, got --strategy greedy"),
    "generations without evolution": (["--generations", 2], "--generations with --strategy evolution, got"),
    "no generation": (["--strategy", "evolution", "--generations", 0], "--generations of at least 1"),
    "a tolerance that is no number": (["--strategy", "lazy", "--tolerance", "2se"], "--tolerance in nats"),
    "limits that contradict the target": (
        ["--max-mha", 1, "--max-mlp", 0],
        "from 1 to 1 (mix search over 8 blocks",
    ),
    "blocks to keep that are none": (["--keep", "mha.0,lm_head"], "expected a block such as mha.5"),
    "blocks to keep that the model has not": (["--keep", "mha.9"], "layers 0 to 3, got mha.9"),
    "a perplexity guard without perplexity": (["--metric", "kl", "--max-perplexity", 9], "with --metric ppl, got"),
    "per parameter in evolution": (["--strategy", "evolution", "--per", "params"], "--per with --strategy greedy"),
    "replicas that are no number": (["--replicas", "two"], "expected --replicas to be auto or N, got 'two'"),
    "replicas without Ray": (["--replicas", 2], "--no-ray cannot be combined with --replicas"),
    "GPUs for a replica on a CPU": (["--gpus-per-replica", 1], "this is a run on CPUs"),
    "more GPUs than there are": (["--gpus-per-replica", 8], "--gpus-per-replica"),
    "a GPU that is not there": (["--device", "cuda"], "torch finds none"),
}


@pytest.mark.parametrize("case", BAD_SEARCHES)
def test_a_wrong_search_is_refused_in_one_line_and_leaves_nothing(search: Run, tmp_path: Path, case: str) -> None:
    options, message = BAD_SEARCHES[case]
    out = tmp_path / "run"
    code, _, stderr = search(*options, "--out", out)
    assert code == 2
    assert len(stderr) == 1
    assert message in stderr[0]
    assert not out.exists()


def test_lists_may_be_given_with_commas_and_repeatedly(search: Run, tmp_path: Path) -> None:
    options = ["--keep", "mha.0,mha.1", "--keep", "mlp.0", "--keep", "mlp.3", "--num-remove", 1]
    assert search(*options, "--out", tmp_path / "run")[0] == 0
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["keep"] == ["mha.0", "mha.1", "mlp.0", "mlp.3"]


@pytest.mark.parametrize("model", ["no-such-org/no-such-model", "./nowhere", "missing.gguf", "EMPTY", "BERT"])
def test_a_model_that_cannot_be_searched_is_refused_by_name(search: Run, tmp_path: Path, model: str) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BERT").mkdir()
    (tmp_path / "BERT" / "config.json").write_text(json.dumps({"model_type": "bert", "num_hidden_layers": 2}))
    given = tmp_path / model if model.isupper() else model
    code, _, stderr = search("--out", tmp_path / "run", model=given)
    assert (code, len(stderr)) == (2, 1)
    assert str(given) in stderr[0]
    assert not (tmp_path / "run").exists()


def test_a_window_longer_than_the_models_positions_is_refused(search: Run, tmp_path: Path) -> None:
    code, _, stderr = search("--out", tmp_path / "run", "--seq-len", 129)
    assert (code, len(stderr)) == (2, 1)
    assert "--seq-len of at most 128 (the model's positions)" in stderr[0]


def test_a_model_with_its_own_code_is_searched_and_pruned_once_it_is_trusted(
    search: Run, run: Run, tmp_path: Path
) -> None:
    model = tmp_path / "tinychuan"
    write_remote_code_model(model)
    code, _, stderr = search("--out", tmp_path / "run", model=model)
    assert (code, len(stderr)) == (2, 1)
    assert "--trust-remote-code" in stderr[0]
    assert search("--out", tmp_path / "run", "--trust-remote-code", model=model)[0] == 0
    options = ("--run", tmp_path / "run", "--out", tmp_path / "model", "--trust-remote-code")
    assert run("prune", model, *options)[0] == 0
    options = ("--perplexity", "builtin", "--seq-len", 64, "--num-windows", 2, "--trust-remote-code", "--no-ray")
    assert run("evaluate", tmp_path / "model", *options)[0] == 0


def test_a_model_that_gives_nan_ends_with_exit_code_1_and_the_reason(search: Run, tmp_path: Path) -> None:
    model = tiny_llama(torch.float32)
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    code, _, stderr = search("--out", tmp_path / "run", model=tmp_path / "model")
    assert (code, len(stderr)) == (1, 1)
    assert "all 8 candidates have a NaN or infinite loss" in stderr[0]


@pytest.mark.parametrize(
    "replicas",
    [
        pytest.param(("--no-ray",), id="in process"),
        pytest.param(("--replicas", 2), id="on Ray", marks=pytest.mark.slow),
    ],
)
def test_weights_that_were_cut_short_end_a_search_in_one_line_and_leave_nothing(
    tiny_folder: Path, text_file: Path, tmp_path: Path, replicas: tuple[object, ...]
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    options = ("--calibration", text_file, "--seq-len", 16, "--num-remove", 1, "--out", tmp_path / "run", *replicas)
    done = subprocess.run(
        [sys.executable, "-m", "blockpruner", "search", folder, *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "cannot load the weights" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_damaged_ledger_is_refused_with_its_line(search: Run, tmp_path: Path) -> None:
    search("--out", tmp_path / "run")
    ledger = tmp_path / "run" / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join([*lines[:3], lines[3][:20] + "\n", *lines[4:]]))
    before = ledger.read_bytes()
    code, _, stderr = search("--out", tmp_path / "run")
    assert (code, len(stderr)) == (2, 1)
    assert "damaged in line 4" in stderr[0]
    assert ledger.read_bytes() == before


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for the beginning of a run."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_a_search_in_one_line_and_it_can_go_on_elsewhere(search: Run, full_disk: Path) -> None:
    code, _, stderr = search("--out", full_disk / "run")
    assert (code, len(stderr)) == (2, 1)
    assert "No space left on device" in stderr[0]
    copy = shutil.copytree(full_disk / "run", full_disk.parent / "copy")
    assert search("--out", copy)[0] == 0


def test_a_full_disk_leaves_no_half_written_checkpoint(
    search: Run, run: Run, tmp_path: Path, full_disk: Path, tiny_folder: Path
) -> None:
    search("--out", tmp_path / "run")
    code, _, stderr = run("prune", tiny_folder, "--run", tmp_path / "run", "--out", full_disk / "model")
    assert (code, len(stderr)) == (2, 1)
    assert "No space left on device" in stderr[0]
    assert list(full_disk.iterdir()) == []


def test_an_output_place_that_cannot_be_written_is_refused(search: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, stderr = search("--out", tmp_path / "file" / "run")
    assert (code, len(stderr)) == (2, 1)
    assert "cannot write to" in stderr[0]


def test_a_run_of_another_config_is_refused(search: Run, tmp_path: Path) -> None:
    assert search("--out", tmp_path / "run")[0] == 0
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    code, _, stderr = search("--out", tmp_path / "run", "--seed", 1)
    assert (code, len(stderr)) == (2, 1)
    assert "--seed was 42, now 1" in stderr[0]
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("extra", [["--json"], pytest.param([], marks=pytest.mark.slow)])
def test_from_search_to_a_checkpoint_that_loads(
    search: Run, run: Run, tmp_path: Path, tiny_folder: Path, extra: list[str]
) -> None:
    code, stdout, stderr = search("--out", tmp_path / "run", *extra)
    assert (code, stderr) == (0, [])
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    if extra:
        assert json.loads(stdout[-1]) == summary
    code, stdout, stderr = run(
        "prune", tiny_folder, "--run", tmp_path / "run", "--num-remove", 2, "--out", tmp_path / "model", "--json"
    )
    assert (code, stderr) == (0, [])
    pruned = json.loads(stdout[-1])
    assert pruned["removed"] == [step["block"] for step in summary["steps"][:2]]
    assert pruned["ratio"] == pytest.approx(summary["steps"][1]["ratio"])
    assert pruned["num_parameters"] == pytest.approx(pruned["num_parameters_dense"] * (1 - pruned["ratio"]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(weight.numel() for weight in model.parameters()) == pruned["num_parameters"]
    side_car = json.loads((tmp_path / "model" / "blockpruner.json").read_text())
    assert side_car["pruned"]["nll"] == summary["steps"][1]["nll"]


def test_pruning_by_the_official_format_gives_the_same_model(
    search: Run, run: Run, tmp_path: Path, tiny_folder: Path
) -> None:
    search("--out", tmp_path / "run")
    by_run = ("--run", tmp_path / "run", "--dtype", "float32")
    by_file = ("--sequence", tmp_path / "run" / "sequence.json", "--dtype", "float32")
    for name, options in (("one", by_run), ("two", by_file)):
        assert run("prune", tiny_folder, *options, "--num-remove", 2, "--out", tmp_path / name)[0] == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


BAD_PRUNES = {
    "more blocks than the run removed": (["--run", "RUN", "--num-remove", 4], "from 1 to 3"),
    "no blocks": (["--run", "RUN", "--num-remove", 0], "expected --num-remove of at least 1, got 0"),
    "neither run nor sequence": ([], "expected one of --run (a run directory) and --sequence"),
    "a run that is not there": (["--run", "nowhere"], "expected a run directory with a run.json"),
    "a sequence for a deeper model": (["--sequence", "DEEP"], "4 layers"),
    "a sequence that leaves no attention": (["--sequence", "ALL"], "at least one of the 4 attention blocks"),
}


@pytest.mark.parametrize("case", BAD_PRUNES)
def test_a_wrong_prune_is_refused_in_one_line_and_leaves_nothing(
    search: Run, run: Run, tmp_path: Path, tiny_folder: Path, case: str
) -> None:
    search("--out", tmp_path / "run")
    (tmp_path / "deep.json").write_text('{"1": [["mha", 25]]}')
    everything = [["mha", layer] for layer in range(4)]
    (tmp_path / "all.json").write_text(json.dumps({str(n): everything[:n] for n in range(1, 5)}))
    places = {"RUN": tmp_path / "run", "DEEP": tmp_path / "deep.json", "ALL": tmp_path / "all.json"}
    options, message = BAD_PRUNES[case]
    before = sorted(tmp_path.iterdir())
    code, _, stderr = run("prune", tiny_folder, *(places.get(o, o) for o in options), "--out", tmp_path / "model")
    assert (code, len(stderr)) == (2, 1)
    assert message in stderr[0]
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_folder_that_exists_is_not_overwritten(
    search: Run, run: Run, tmp_path: Path, tiny_folder: Path
) -> None:
    search("--out", tmp_path / "run")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("mine")
    code, _, stderr = run("prune", tiny_folder, "--run", tmp_path / "run", "--out", tmp_path / "model")
    assert (code, len(stderr)) == (2, 1)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["thesis.tex"]


def test_a_run_of_another_model_cannot_be_applied(search: Run, run: Run, tmp_path: Path, tiny_folder: Path) -> None:
    search("--out", tmp_path / "run")
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    tiny_llama(torch.float32, seed=1).save_pretrained(other)
    code, _, stderr = run("prune", other, "--run", tmp_path / "run", "--out", tmp_path / "model")
    assert (code, len(stderr)) == (2, 1)
    assert "expected the model that" in stderr[0]


def test_the_pruned_model_evaluates_to_the_searchs_perplexity(
    search: Run, run: Run, tmp_path: Path, tiny_folder: Path
) -> None:
    """On the same text, taken whole: the evaluation's windows are the search's."""
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 20}) + "\n")
    search("--out", tmp_path / "run", "--calibration", text)
    run("prune", tiny_folder, "--run", tmp_path / "run", "--out", tmp_path / "model")
    options = ("--perplexity", text, "--seq-len", 16, "--dtype", "float32", "--no-ray", "--json")
    found = json.loads(run("evaluate", tmp_path / "model", *options)[1][-1])
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["perplexity"][str(text)]["value"] == pytest.approx(summary["steps"][-1]["perplexity"], rel=1e-5)
    dense = json.loads(run("evaluate", tiny_folder, *options)[1][-1])
    assert dense["perplexity"][str(text)]["value"] == pytest.approx(summary["dense"]["perplexity"], rel=1e-5)


def test_a_pruned_model_is_not_searched_again(search: Run, run: Run, tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "order.json").write_text('{"1": [["mlp", 1]]}')
    run("prune", tiny_folder, "--sequence", tmp_path / "order.json", "--out", tmp_path / "model")
    code, _, stderr = search("--out", tmp_path / "run", model=tmp_path / "model")
    assert (code, len(stderr)) == (2, 1)
    assert "pruned already" in stderr[0]


def test_steps_that_only_the_ledger_holds_yet_can_be_pruned(
    search: Run, run: Run, tmp_path: Path, tiny_folder: Path
) -> None:
    """As after a crash between a step's line and the next run.json."""
    search("--out", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**summary, "steps": summary["steps"][:1]}))
    options = ("--run", tmp_path / "run", "--num-remove", 3, "--out", tmp_path / "model")
    assert run("prune", tiny_folder, *options)[0] == 0


def test_an_evaluation_beyond_the_models_positions_is_refused(run: Run, tiny_folder: Path) -> None:
    code, _, stderr = run("evaluate", tiny_folder, "--perplexity", "builtin", "--seq-len", 129)
    assert (code, len(stderr)) == (2, 1)
    assert "at most 128" in stderr[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["TINY", "--repeats", 0], "expected --repeats of at least 1, got 0"),
        (["TINY", "--num-tokens", 1], "expected --num-tokens of at least 2, got 1"),
        (["TINY"], "--prompt-len and --num-tokens together of at most 128"),
        (["EMPTY"], "a checkpoint folder with a config.json"),
        (["./nowhere"], "which does not exist"),
    ],
)
def test_a_wrong_latency_command_is_refused_in_one_line(
    run: Run, tmp_path: Path, tiny_folder: Path, options: list[object], message: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    places = {"TINY": tiny_folder, "EMPTY": tmp_path / "EMPTY"}
    code, _, stderr = run("latency", *(places.get(str(o), o) for o in options))
    assert (code, len(stderr)) == (2, 1)
    assert message in stderr[0]


def test_a_report_prints_where_its_pictures_and_its_page_are(search: Run, run: Run, tmp_path: Path) -> None:
    search("--out", tmp_path / "run")
    code, stdout, _ = run("report", tmp_path / "run", "--json")
    assert code == 0
    result = json.loads(stdout[-1])
    assert [*result["pictures"], result["page"]] == stdout[:-1]
    assert all(Path(path).stat().st_size > 0 for path in stdout[:-1])


@pytest.mark.parametrize("blocks", ["layer", "mlp"])
def test_a_report_can_be_drawn_of_every_granularity(search: Run, run: Run, tmp_path: Path, blocks: str) -> None:
    search("--out", tmp_path / "run", "--blocks", blocks)
    assert run("report", tmp_path / "run", "--out", tmp_path / "report", "--influence")[0] == 0
    assert len(list((tmp_path / "report").iterdir())) == 2 * 4 + 1


def test_a_report_of_nothing_is_refused(run: Run, tmp_path: Path) -> None:
    code, _, stderr = run("report", tmp_path)
    assert (code, len(stderr)) == (2, 1)


@pytest.mark.parametrize("command", ["demo", "search", "prune", "evaluate", "latency", "recover", "report"])
def test_every_command_has_help_with_an_example(run: Run, command: str) -> None:
    code, stdout, _ = run(command, "--help")
    assert code == 0
    assert f"Example: blockpruner {command}" in " ".join(" ".join(stdout).split())


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "blockpruner", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "search" in done.stdout


def test_a_bug_shows_its_traceback(search: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a bug in our code")

    monkeypatch.setattr("blockpruner.searching.driver.prepare", broken)
    with pytest.raises(ZeroDivisionError):
        search("--out", tmp_path / "run")


BAD_COMPARISONS = {
    "an unknown method": (["--methods", "shortgtp"], "got 'shortgtp'"),
    "a ratio that is no number": (["--ratio", "0.2,much"], "expected --ratio such as 0.2,0.3, got 'much'"),
    "a ratio out of reach": (["--ratio", "0.9"], "method shortgpt: expected --ratio of at most"),
    "an evolution": (["--strategy", "evolution"], "expected --strategy greedy or lazy, got 'evolution'"),
    "a tolerance without lazy": (["--tolerance", "1se"], "--tolerance with --strategy lazy"),
    "no calibration file": (["--calibration", "nowhere.jsonl"], "'nowhere.jsonl', which does not exist"),
}


@pytest.fixture
def compare(run: Run, tiny_folder: Path, text_file: Path) -> Run:
    def call(*options: object) -> tuple[int, list[str], list[str]]:
        defaults = {
            "--calibration": text_file, "--seq-len": 16, "--num-samples": 20, "--methods": "shortgpt", "--ratio": "0.2",
            "--dtype": "float32", "--repeats": 0,
        }  # fmt: skip
        kept = [word for option, value in defaults.items() if option not in options for word in (option, value)]
        return run("compare", tiny_folder, *options, *kept, "--no-ray")

    return call


@pytest.mark.parametrize("case", BAD_COMPARISONS)
def test_a_wrong_comparison_is_refused_in_one_line(compare: Run, tmp_path: Path, case: str) -> None:
    options, message = BAD_COMPARISONS[case]
    code, _, stderr = compare(*options, "--out", tmp_path / "out")
    assert (code, len(stderr)) == (2, 1)
    assert message in stderr[0]


def test_a_comparison_prints_its_rows_and_its_order_can_be_pruned(
    compare: Run, run: Run, tmp_path: Path, tiny_folder: Path
) -> None:
    code, stdout, _ = compare("--out", tmp_path / "out", "--json")
    assert code == 0
    rows = json.loads(stdout[-1])["rows"]
    assert [(row["method"], row["perplexity"], row["average"]) for row in rows] == [
        ("dense", None, None),
        ("shortgpt", None, None),
    ]
    order = tmp_path / "out" / "methods" / "shortgpt" / "sequence.json"
    code, stdout, _ = run(
        "prune", tiny_folder, "--sequence", order, "--num-remove", 2, "--out", tmp_path / "model", "--json"
    )
    assert code == 0
    assert json.loads(stdout[-1])["ratio"] == rows[1]["ratio"]
