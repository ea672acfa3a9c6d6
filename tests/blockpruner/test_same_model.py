"""A run, a checkpoint and a comparison know their model by its weights and by its full name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockpruner as bp
from blockpruner.engine.checkpoint.grouped import read_pruned_provenance
from blockpruner.engine.checkpoint.provenance import check_base
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.identity import Identity, fingerprint, identity, identity_in_memory
from blockpruner.engine.sections import ModelSource
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.evaluating.evaluating import evaluate_model
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.reading import read_summary
from blockpruner.showing.console import Reporter
from tests import calls
from tests.conftest import OPTIONS, load, tiny_llama, tiny_tokenizer, write_tiny
from tests.engine.ggufs import write_gguf
from tests.hub import HubCache


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "here" / "models" / "tiny")


@pytest.fixture
def run(model: Path, config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter) -> Path:
    run_search(config(model=str(model), num_remove=1), tmp_path / "run", reporter)
    return tmp_path / "run"


def other_weights(model: Path) -> None:
    tiny_llama(torch.float32, seed=2).save_pretrained(model)


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Check that a refusal leaves a folder as it was, to the byte."""

    def content() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}

    before = content()
    yield
    assert content() == before


def test_a_folder_is_recorded_by_its_absolute_path_and_fingerprint(
    model: Path, text_file: Path, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "here")
    shutil.copy(text_file, "rows.txt")
    config = SearchConfig.of(model="models/tiny", calibration="rows.txt", **OPTIONS, num_remove=1)
    summary = run_search(config, Path("run"), reporter)
    assert summary["model"] == str(model)
    assert summary["fingerprint"] == fingerprint(ModelSource(str(model)))
    monkeypatch.chdir(tmp_path)
    again = config.replace(model=str(model), calibration="here/rows.txt")
    assert run_search(again, Path("here/run"), reporter) == summary
    calls.prune_to(tmp_path / "pruned", reporter, model="here/models/../models/tiny", run="here/run")
    provenance = read_pruned_provenance(tmp_path / "pruned")
    assert (provenance["base_model"], provenance["base_fingerprint"]) == (str(model), summary["fingerprint"])


def test_another_model_of_the_same_relative_name_is_refused(
    run: Path, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    there = tmp_path / "there" / "models" / "tiny"
    shutil.copytree(model, there)
    values = json.loads((there / "config.json").read_text())
    values["rope_parameters"]["rope_theta"] = 500000.0
    (there / "config.json").write_text(json.dumps(values))
    monkeypatch.chdir(tmp_path / "there")
    expected = rf"expected the model that '.*run' searched, '{model}' \(2:\w+\), got '{there}' \(2:\w+\)"
    with pytest.raises(UserError, match=expected):
        calls.prune_to(tmp_path / "pruned", reporter, model="models/tiny", run=run)
    assert not (tmp_path / "pruned").exists()


def test_a_model_that_was_moved_is_the_same_and_that_is_said(
    run: Path, model: Path, config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter, capsys: Any
) -> None:
    moved = shutil.move(model, tmp_path / "moved")
    run_search(config(model=str(moved), num_remove=2), run, reporter)
    assert f"note: the run began with this model as '{model}'" in " ".join(capsys.readouterr().out.split())
    calls.prune_to(tmp_path / "pruned", reporter, model=str(moved), run=run)
    assert "has the weights that the run searched as" in " ".join(capsys.readouterr().out.split())
    assert read_pruned_provenance(tmp_path / "pruned")["base_model"] == str(moved)


USES: dict[str, Callable[[Path, Path, Path, Callable[..., SearchConfig], Reporter], Any]] = {
    "resume of a finished run": lambda run, model, out, config, reporter: run_search(
        config(model=str(model), num_remove=1), run, reporter
    ),
    "longer resume": lambda run, model, out, config, reporter: run_search(
        config(model=str(model), num_remove=2), run, reporter
    ),
    "prune": lambda run, model, out, config, reporter: calls.prune_to(out, reporter, model=str(model), run=run),
    "prune in Python": lambda run, model, out, config, reporter: bp.prune(str(model), run),
    "evaluate": lambda run, model, out, config, reporter: evaluate_model(
        EvaluationConfig(model=str(model), run=run, perplexity=("builtin",), seq_len=(16,), num_windows=1, no_ray=True),
        reporter,
    ),
    "report": lambda run, model, out, config, reporter: calls.report([run], out, reporter, influence=True),
}


@pytest.mark.parametrize("use", USES)
def test_other_weights_in_the_same_folder_are_refused_and_nothing_changes(
    use: str, run: Path, model: Path, config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    other_weights(model)
    with unchanged(run), pytest.raises(UserError, match=rf"'{model}' \(2:\w+\).* '{model}' \(2:\w+\)") as refusal:
        USES[use](run, model, tmp_path / "out", config, reporter)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_the_dense_model_of_a_checkpoint_is_compared_too(
    run: Path, model: Path, text_file: Path, tmp_path: Path, reporter: Reporter
) -> None:
    calls.prune_to(tmp_path / "pruned", reporter, model=str(model), run=run)
    check_base(read_pruned_provenance(tmp_path / "pruned"), ModelSource(str(model)))
    other_weights(model)
    options = {"folder": tmp_path / "pruned", "data": str(text_file), "num_rows": 4, "seq_len": 16, "device": "cpu"}
    for use in ({"perplexity": (str(text_file),), "num_windows": 1}, {"loss": "distill"}, {"train": "projections"}):
        with pytest.raises(UserError, match=r"expected the dense model of the checkpoint, .* got"):
            calls.recover(tmp_path / "recovered", reporter, **options, **use)
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"here", "pruned", "run"}


def test_what_was_recorded_without_a_fingerprint_is_known_by_its_name(
    run: Path, model: Path, config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    ledger = run / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    old = [{key: value for key, value in line.items() if key not in ("chain", "fingerprint")} for line in lines]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in old))
    run_search(config(model=str(model), num_remove=1), run, reporter)
    assert "fingerprint" not in read_summary(run)
    copy = shutil.copytree(model, tmp_path / "copy")
    with pytest.raises(UserError, match=r"of another model: it began with .* \(of unknown fingerprint\)"):
        run_search(config(model=str(copy), num_remove=1), run, reporter)
    other_weights(model)
    with unchanged(run):
        for _ in range(2):  # the first refusal must not make the second a success
            with pytest.raises(UserError, match="the dense model scores"):
                run_search(config(model=str(model), num_remove=2), run, reporter)
    check_base({"base_model": str(model)}, ModelSource(str(model)))


REFUSED: dict[str, dict[str, Any]] = {
    "another config": {"seed": 7},
    "fewer blocks": {"num_remove": 1},
    "a model that is not there": {"model": "/nowhere"},
    "a text that is not there": {"calibration": "/nowhere.txt"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_resume_changes_no_file(
    name: str, config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    run_search(config(num_remove=2), tmp_path, reporter)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes() + b'{"type": "unit", "st')  # as a crash leaves it
    with unchanged(tmp_path), pytest.raises(UserError):
        run_search(config(**{"num_remove": 2, **REFUSED[name]}), tmp_path, reporter)


def test_run_json_follows_the_ledger(
    run: Path, model: Path, config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    file = run / "run.json"
    before = json.loads(file.read_text())
    wrong = {
        **before, "steps": [{**before["steps"][0], "block": ["mlp", 0]}], "dtype": "float64", "dense": None,
        "model": "other", "fingerprint": None,
    }  # fmt: skip
    file.write_text(json.dumps(wrong))
    assert read_summary(run) == before
    pruned = calls.prune_to(tmp_path / "pruned", reporter, model=str(model), run=run)
    assert pruned["removed"] == [before["steps"][0]["block"]]
    run_search(config(model=str(model), num_remove=1), run, reporter)
    assert json.loads(file.read_text()) == before


def test_every_replaced_tensor_changes_the_fingerprint_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_llama(torch.float32, hidden_size=64, intermediate_size=512, num_hidden_layers=2).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert any(tensor.nbytes > 2**16 for tensor in weights.values())
    own = fingerprint(ModelSource(str(folder)))
    assert own is not None
    for name, tensor in weights.items():
        save_file({**weights, name: tensor * 1.001}, folder / "model.safetensors", metadata={"format": "pt"})
        assert fingerprint(ModelSource(str(folder))) != own, name
    small = weights["model.norm.weight"].clone()
    small[5] += 1e-6
    save_file({**weights, "model.norm.weight": small}, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(ModelSource(str(folder))) != own
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "4.0"}))  # who wrote it
    assert fingerprint(ModelSource(str(folder))) == own
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert fingerprint(ModelSource(str(folder))) != own


@pytest.mark.parametrize("name", ["modeling_own.py", "model.safetensors.index.json"])
def test_code_and_an_index_beside_the_weights_belong_to_the_fingerprint(tmp_path: Path, name: str) -> None:
    source = ModelSource(str(write_tiny(tmp_path / "model")))
    found = [fingerprint(source)]
    for content in ("{}", "{ }"):
        (tmp_path / "model" / name).write_text(content)
        found.append(fingerprint(source))
    assert len(set(found)) == 3


def test_a_fingerprint_of_the_earlier_kind_can_still_be_compared(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "recorded" / "model", tmp_path / "model")
    source = ModelSource(str(tmp_path / "model"))
    assert fingerprint(source, "2ff0080bf8dfe2f6") == "2ff0080bf8dfe2f6"
    assert str(fingerprint(source)).startswith("2:")


def test_a_gguf_is_known_by_all_of_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(2**20))
    first = identity(ModelSource(str(file)))
    copy = shutil.copy(file, tmp_path / "copy.gguf")
    assert first.name == str(file)
    assert identity(ModelSource(str(copy))).is_same(first)
    content = bytearray(file.read_bytes())
    content[777_777] = 1
    file.write_bytes(content)
    os.utime(file, ns=(0, 0))
    assert not identity(ModelSource(str(file))).is_same(first)


def test_a_model_in_memory_is_known_by_its_tensors(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    model = load(tiny_folder)
    text = bp.calibration(text_file, tiny_tokenizer(), num_samples=8, seq_len=16, num_windows=2)
    found = bp.search(model, text, num_remove=1, out=tmp_path / "run")
    assert found.summary["model"] == str(tiny_folder)
    assert bp.prune(model, found).num_parameters() < model.num_parameters()
    assert bp.prune(str(tiny_folder), tmp_path / "run", dtype="float32").num_parameters() < model.num_parameters()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(1.5)
    for what in (found, tmp_path / "run"):
        with pytest.raises(
            UserError, match=r"expected the model that .* searched, .*live:float32:.* got .*live:float32:"
        ):
            bp.prune(model, what)
    with pytest.raises(UserError, match="holds a run of another model"):
        bp.search(model, text, num_remove=2, out=tmp_path / "run")
    name = "/some/folder"
    assert identity_in_memory(model, name).is_same(Identity(name, None))
    assert not identity_in_memory(model, name).is_same(Identity("/other", "2:0123"))


def test_a_model_in_memory_with_another_config_is_another_one() -> None:
    model = tiny_llama(torch.float32)
    before = identity_in_memory(model, "m")
    model.config.rope_parameters["rope_theta"] = 5e5
    assert not identity_in_memory(model, "m").is_same(before)


def test_a_comparison_is_of_one_model_wherever_it_lies(
    model: Path, text_file: Path, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockpruner.comparing.comparing import compare_methods
    from blockpruner.comparing.config import CompareConfig

    def run_method(name: str, told: SearchConfig, folder: Path, translate: Any) -> dict[str, Any]:
        step = {"block": ["layer", 1], "ratio": 0.2, "search_s": 1.0, "work_flops": 1}
        times = {"num_threads": 1, "startup_s": 1.0, "load_s": 1.0, "peak_memory_bytes": 1}
        folder.mkdir(parents=True)
        (folder / "outcome.json").write_text(json.dumps({**times, "steps": [step]}))
        return {**times, "steps": [step]}

    monkeypatch.setattr("blockpruner.comparing.comparing.run_method", run_method)
    options = {**OPTIONS, "calibration": str(text_file), "methods": ("shortgpt",), "ratio": (0.1,), "repeats": 0}
    options.pop("no_ray")
    first = compare_methods(CompareConfig.of(model=str(model), **options), tmp_path / "out", reporter)
    assert (first["model"], first["fingerprint"]) == (str(model), fingerprint(ModelSource(str(model))))
    moved = shutil.move(model, tmp_path / "moved")
    again = compare_methods(CompareConfig.of(model=str(moved), **options), tmp_path / "out", reporter)
    assert again["rows"] == first["rows"]
    other_weights(Path(moved))
    with unchanged(tmp_path / "out"), pytest.raises(UserError, match=r"another config: .*`weights` was '2:"):
        compare_methods(CompareConfig.of(model=str(moved), **options), tmp_path / "out", reporter)


def test_a_gguf_in_memory_is_the_model_of_its_file(trained_folder: Path, text_file: Path, tmp_path: Path) -> None:
    file = write_gguf(load(trained_folder), tmp_path / "dense.gguf")
    asked = {"num_remove": 1, "num_samples": 8, "seq_len": 16, "num_windows": 2, "dtype": "float32", "no_ray": True}
    named = bp.search(file, text_file, out=tmp_path / "run", threads_per_replica=1, **asked)
    model, tokenizer = bp.load(file, dtype="float32")
    small = bp.prune(model, tmp_path / "run")
    assert small.num_parameters() < model.num_parameters()
    bp.save(small, tokenizer, tmp_path / "pruned")
    written = json.loads((tmp_path / "pruned" / "blockpruner.json").read_text())
    assert written["base_model"] == named.summary["model"] == str(file)


def test_a_hub_id_is_known_by_its_commit_also_when_the_branch_moves(
    hub_cache: HubCache, config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    run, one, other = tmp_path / "run", "a" * 40, "b" * 40
    write_tiny(hub_cache.snapshot("someone/tiny", one))
    asked = config(model="someone/tiny", num_remove=1)
    summary = run_search(asked, run, reporter)
    assert (summary["model"], summary["fingerprint"]) == ("someone/tiny", one)
    write_tiny(hub_cache.snapshot("someone/tiny", other), seed=1)
    way_out = f"`model=someone/tiny` and `revision={one}`"
    with unchanged(run), pytest.raises(UserError, match=f"it began with .*{one}.*now it is .*{other}.*{way_out}"):
        run_search(asked.replace(num_remove=2), run, reporter)
    with pytest.raises(UserError, match=f"searched, .*{one}.*got .*{other}.*{way_out}"):
        calls.prune_to(tmp_path / "pruned", reporter, model="someone/tiny", run=run)
    longer = run_search(asked.replace(num_remove=2, revision=one), run, reporter)
    assert longer["steps"][0]["nll"] == summary["steps"][0]["nll"]
    calls.prune_to(tmp_path / "pruned", reporter, model="someone/tiny", run=run, revision=one)
    provenance = read_pruned_provenance(tmp_path / "pruned")
    assert (provenance["revision"], provenance["base_fingerprint"]) == (one, one)
    options = {"calibration": asked.calibration, "seq_len": 16, "dtype": "float32", "no_ray": True}
    calls.compensate(tmp_path / "refitted", reporter, folder=tmp_path / "pruned", **options)
