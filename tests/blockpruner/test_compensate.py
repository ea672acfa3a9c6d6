"""`compensate`: from a pruned checkpoint to a compensated one, over stops, in every format, and refusals."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import blockpruner as bp
from blockpruner import cli
from blockpruner.compensating import compensating
from blockpruner.compensating.choosing import Split, Store
from blockpruner.engine.calibration import Windows
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.model.from_gguf.files import read_whole
from blockpruner.showing.console import Reporter
from tests import calls
from tests.conftest import TEXT, generate, load, tiny_tokenizer
from tests.engine.ggufs import write_gguf
from tests.processes import finish

ORDER = [["mlp", 1], ["mha", 2]]
Compensate = Callable[..., dict[str, Any]]


@pytest.fixture
def pruned(tmp_path: Path, trained_folder: Path, reporter: Reporter) -> Path:
    return prune(trained_folder, tmp_path, reporter)


def prune(model: Path, tmp_path: Path, reporter: Reporter, out: str = "pruned") -> Path:
    (tmp_path / "order.json").write_text(json.dumps({"1": ORDER[:1], "2": ORDER}))
    options = {"sequence": tmp_path / "order.json", "dtype": "float32"}
    calls.prune_to(tmp_path / out, reporter, model=str(model), **options)
    return tmp_path / out


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT * 5)
    return tmp_path / "text.txt"


@pytest.fixture
def compensate(pruned: Path, text: Path, tmp_path: Path, reporter: Reporter) -> Compensate:
    def call(out: str = "out", **options: Any) -> dict[str, Any]:
        given = {"folder": pruned, "calibration": str(text), "seq_len": 16, "dtype": "float32", "no_ray": True}
        return calls.compensate(tmp_path / out, reporter, **{**given, "threads_per_replica": 1, **options})

    return call


def test_a_compensated_checkpoint_has_the_same_form_and_a_lower_perplexity(
    compensate: Compensate, pruned: Path, text: Path, tmp_path: Path
) -> None:
    result = compensate(perplexity=(str(text),), perplexity_windows=20)
    found = result["perplexity"][str(text)]
    assert found["dense"] < found["compensated"] < found["pruned"]
    assert result["method"] in ("fold", "both")
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "out"))
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in differing)
    was, now = (json.loads((folder / "blockpruner.json").read_text()) for folder in (pruned, tmp_path / "out"))
    compensation = now.pop("compensation")
    assert now == was
    assert len(compensation["changed"]) == len(differing)
    assert compensation["nll"]["pruned"] > min(compensation["nll"].values())
    assert not (tmp_path / "out.work").exists()
    assert len(generate(load(tmp_path / "out"))[0]) > 10


@pytest.mark.parametrize(("stored", "computed"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_weights_may_be_stored_in_another_dtype_than_is_computed_in(
    trained_folder: Path, text: Path, tmp_path: Path, reporter: Reporter, stored: str, computed: str
) -> None:
    (tmp_path / "order.json").write_text(json.dumps({"1": ORDER[:1], "2": ORDER}))
    options = {"sequence": tmp_path / "order.json", "dtype": stored}
    calls.prune_to(tmp_path / "pruned", reporter, model=str(trained_folder), **options)
    given = {"calibration": str(text), "seq_len": 16, "dtype": computed, "no_ray": True}
    result = calls.compensate(tmp_path / "out", reporter, folder=tmp_path / "pruned", **given)
    assert result["method"] in ("fold", "both")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in written.values()} == {f"torch.{stored}"}


def test_two_replicas_write_the_same_bytes(compensate: Compensate, pruned: Path, text: Path, tmp_path: Path) -> None:
    compensate("one")
    finish(
        [
            sys.executable, "-m", "blockpruner", "compensate", str(pruned), "--calibration", str(text), "--seq-len",
            "16", "--dtype", "float32", "--threads-per-replica", "1", "--replicas", "2", "--out", str(tmp_path / "two"),
        ]
    )  # fmt: skip
    one, two = (folder / "model.safetensors" for folder in (tmp_path / "one", tmp_path / "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_a_stopped_compensation_resumes_to_the_same_bytes(
    compensate: Compensate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_stages: int
) -> None:
    compensate("undisturbed")
    real = compensating.fit_and_choose
    saved = []

    def stopping(*arguments: Any) -> Any:
        *others, store = arguments

        def save(run: int, stage: int, changes: Any) -> None:
            store.save(run, stage, changes)
            saved.append(stage)
            if len(saved) == num_stages:
                raise KeyboardInterrupt

        return real(*others, Store(store.known, save))

    monkeypatch.setattr(compensating, "fit_and_choose", stopping)
    with pytest.raises(KeyboardInterrupt):
        compensate()
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"another config: `ridge` was None, now 0\.5"):
        compensate(ridge=0.5)
    compensate()
    one, two = (tmp_path / name / "model.safetensors" for name in ("undisturbed", "out"))
    assert one.read_bytes() == two.read_bytes()


def test_a_damaged_work_folder_is_refused_in_one_line(
    compensate: Compensate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise SearchFailed("stopped")

    monkeypatch.setattr(compensating, "write_grouped", fail)
    with pytest.raises(SearchFailed):
        compensate()
    file = next((tmp_path / "out.work").glob("stage-*"))
    whole = file.read_bytes()
    for damaged in (whole[:100], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{file.name}.* is damaged; delete"):
            compensate()
    (tmp_path / "out.work" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"holds 'mine\.txt'"):
        compensate()
    assert (tmp_path / "out.work" / "mine.txt").exists()


def test_if_nothing_helps_nothing_is_changed_and_it_is_said(
    trained_folder: Path, text: Path, tmp_path: Path, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    """The absent blocks had no output, so nothing is lost."""
    dense = load(trained_folder)
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight.zero_()
        dense.model.layers[2].self_attn.o_proj.weight.zero_()
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    pruned = prune(tmp_path / "dense", tmp_path, reporter)
    options = {"calibration": str(text), "seq_len": 16, "dtype": "float32", "no_ray": True, "method": "fold"}
    result = calls.compensate(tmp_path / "out", reporter, folder=pruned, **options)
    assert (result["method"], result["ridge"]) == (None, None)
    assert "nothing is changed, since no fit lowers the held-out loss" in capsys.readouterr().out
    one, two = (folder / "model.safetensors" for folder in (pruned, tmp_path / "out"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("method", ["fold", "refit", "both"])
def test_the_method_and_the_ridge_can_be_given(compensate: Compensate, tmp_path: Path, method: str) -> None:
    result = compensate(method=method, ridge=0.02)
    assert (result["method"], result["ridge"]) == (method, 0.02)


def test_several_texts_take_turns_and_give_equal_numbers_of_windows(
    compensate: Compensate, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text(TEXT * 3)
    compensate(calibration=(str(text), str(tmp_path / "short.txt")))
    assert "windows of each text are used, as many as the shortest one gives" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "out" / "blockpruner.json").read_text())["compensation"]
    assert recorded["calibration"] == [str(text), str(tmp_path / "short.txt")]


def test_windows_are_held_out_of_each_text() -> None:
    tokens = torch.arange(32).view(32, 1).expand(32, 4)
    made_of = bp.calibration.__globals__["Calibration"](calibration=("a", "b"), seq_len=4)
    split = Split.of(Windows(tokens, 2, made_of=made_of))
    assert sorted(split.held_out[:, 0].tolist()) == [8, 9, 24, 25]
    assert len(split.fitted_on) == 28


def test_python_gives_what_the_command_writes(
    compensate: Compensate, trained_folder: Path, text: Path, tmp_path: Path
) -> None:
    compensate()
    model, tokenizer = bp.load(trained_folder, dtype="float32")
    torch.set_num_threads(1)
    small = bp.prune(model, [f"{kind}.{layer}" for kind, layer in ORDER])
    windows = bp.calibration(text, tokenizer, seq_len=16)
    before = bp.perplexity(small, windows)
    made = bp.compensate(small, model, windows)
    assert bp.perplexity(made, windows) < before == bp.perplexity(small, windows)
    bp.save(made, tokenizer, tmp_path / "saved")
    saved, written = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "out"))
    assert all(torch.equal(saved[name], written[name]) for name in written)
    recorded = json.loads((tmp_path / "saved" / "blockpruner.json").read_text())["compensation"]
    assert recorded["method"] in ("fold", "both")
    with pytest.raises(UserError, match="got one with another"):
        bp.compensate(made, model, windows)
    with pytest.raises(UserError, match="with all of its blocks"):
        bp.compensate(model, model, windows)


def test_prune_compensates_on_the_text_of_the_run(
    trained_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("blockpruner.cluster.nodes.local_cpus", lambda: 1)  # for one replica, without Ray
    run = [
        "search",
        str(trained_folder),
        "--calibration",
        str(text),
        "--seq-len",
        "16",
        "--num-remove",
        "2",
        "--no-ray",
    ]
    assert CliRunner().invoke(cli.app, [*run, "--out", "run"]).exit_code == 0
    found = CliRunner().invoke(
        cli.app, ["prune", str(trained_folder), "--run", "run", "--compensate", "--out", "small", "--json"]
    )
    assert found.exit_code == 0, found.output
    result = json.loads(found.output.splitlines()[-1])
    assert {"method", "ridge", "perplexity"} <= result.keys()
    assert result["num_parameters"] < result["num_parameters_dense"]
    recorded = json.loads((tmp_path / "small" / "blockpruner.json").read_text())
    assert recorded["compensation"]["calibration"] == str(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "small", "text.txt"]


@pytest.mark.parametrize("style", ["grouped", "deci", "vanilla"])
def test_every_format_of_transformers_carries_it(
    compensate: Compensate, tmp_path: Path, reporter: Reporter, style: str
) -> None:
    compensate()
    calls.export(tmp_path / "out", tmp_path / style, reporter, format=style)
    assert generate(load(tmp_path / style)) == generate(load(tmp_path / "out"))
    assert generate(load(tmp_path / style)) != generate(load(tmp_path / "pruned"))
    card = (tmp_path / style / "README.md").read_text()
    assert "Compensated: the output projections of" in card


@pytest.mark.parametrize("options", [{"gguf_type": "f32"}, {}])
def test_a_gguf_takes_changed_tensors_from_the_checkpoint(
    compensate: Compensate, trained_folder: Path, tmp_path: Path, reporter: Reporter, options: dict[str, Any]
) -> None:
    base = write_gguf(load(trained_folder), tmp_path / "dense.gguf")
    compensate()
    given = {"base": str(base), **options}
    notes = calls.export(tmp_path / "out", tmp_path / "gguf", reporter, format="gguf", **given)["notes"]
    calls.export(tmp_path / "pruned", tmp_path / "plain", reporter, format="gguf", **given)
    changed, plain = (read_whole(tmp_path / name / "model.gguf").tensors for name in ("gguf", "plain"))
    differing = {name for name in plain if not (changed[name].values == plain[name].values).all()}
    blocks = json.loads((tmp_path / "out" / "blockpruner.json").read_text())["compensation"]["changed"]
    assert len(differing) == len(blocks)
    assert all("attn_output" in name or "ffn_down" in name for name in differing)
    assert any("are those of the checkpoint" in note for note in notes) == (not options)


def test_what_cannot_be_compensated_is_refused_in_one_line(
    compensate: Compensate, pruned: Path, tiny_folder: Path, trained_folder: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="expected the dense model of the checkpoint"):
        compensate(dense=str(tiny_folder))
    with pytest.raises(UserError, match="at least 2 windows of each calibration text"):
        compensate(num_windows=1)
    with pytest.raises(UserError, match="holds a dense model; prune it first"):
        compensate(folder=trained_folder)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()
    compensate()
    with pytest.raises(UserError, match="already compensated"):
        compensate("again", folder=tmp_path / "out")
    order = ["--sequence", str(tmp_path / "order.json"), "--compensate", "--out", str(tmp_path / "new")]
    found = CliRunner().invoke(cli.app, ["prune", str(trained_folder), *order])
    assert found.exit_code == 2
    assert "expected --run with --compensate, whose calibration text is used" in found.stderr
