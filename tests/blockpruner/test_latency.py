"""Models are measured in processes of their own; what is wrong is found before those start, where it can be."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from blockpruner.engine.checkpoint.grouped import SIDE_CAR
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.sections import ModelSource
from blockpruner.showing.console import Reporter
from blockpruner.timing.model_process import ModelProcess, serve
from tests.calls import latency, prune_to
from tests.conftest import load, tiny_llama
from tests.processes import REPOSITORY

SMALL = Workload(prompt_len=6, num_tokens=4)


@pytest.fixture
def pruned_folder(tiny_folder: Path, tmp_path: Path, reporter: Reporter) -> Path:
    """Lacks two of the four attentions."""
    sequence, folder = tmp_path / "order.json", tmp_path / "pruned"
    sequence.write_text('{"1": [["mha", 1], ["mlp", 2], ["mha", 3]]}')
    prune_to(folder, reporter, model=str(tiny_folder), sequence=sequence, dtype="float32")
    return folder


def measure(model: Path, reporter: Reporter, **options: Any) -> dict[str, Any]:
    return latency(reporter, **{"model": str(model), **SMALL.to_json(), "dtype": "float32", "threads": 1, **options})


def change_side_car(folder: Path, **values: Any) -> None:
    """None takes a value away."""
    file = folder / SIDE_CAR
    changed = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def test_a_pruned_checkpoint_is_measured_beside_the_model_it_was_made_from(
    tiny_folder: Path, pruned_folder: Path, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    change_side_car(pruned_folder, blockpruner="0.0.1")
    found = measure(pruned_folder, reporter, repeats=2)
    speeds = {"prefill_tokens_per_s", "decode_tokens_per_s", "generate_4_s"}
    sizes = {"kv_cache_bytes_per_token", "peak_memory_bytes", "weights_bytes"}
    assert list(found) == ["dense", "pruned", "ratio", "setting"]
    for figures in (found["dense"], found["pruned"], found["ratio"]):
        assert figures.keys() == speeds | sizes | {"spread"}
        assert figures["spread"].keys() == speeds
        assert all(figures[name] > 0 for name in speeds | sizes)
    assert found["ratio"]["kv_cache_bytes_per_token"] == 0.5
    assert found["dense"]["kv_cache_bytes_per_token"] == 2 * 4 * 2 * 8 * 4
    for name, folder in (("dense", tiny_folder), ("pruned", pruned_folder)):
        assert found[name]["weights_bytes"] == (folder / "model.safetensors").stat().st_size
    assert found["setting"] == {
        "device": "cpu", "dtype": "float32", "threads": 1, "repeats": 2, "prompt_len": 6, "num_tokens": 4,
        "batch_size": 1, "static_cache": False, "model": str(pruned_folder), "dense": None, "no_dense": False,
        "revision": None, "trust_remote_code": False,
    }  # fmt: skip
    assert not multiprocessing.active_children()
    said = capsys.readouterr().out
    assert "dense and pruned on cpu in float32 (as asked), 1 CPU threads" in said
    assert "pruned by blockpruner 0.0.1" in said
    assert "pruned / dense" in said


def test_what_a_process_finds_wrong_is_raised_here(tiny_folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    ours, theirs = multiprocessing.Pipe()
    serve(theirs, ModelSource(str(broken)), "float32", torch.device("cpu"), torch.get_num_threads(), SMALL)
    with pytest.raises(UserError, match=r"1 tensors are missing, 'model\.norm\.weight'"):
        ModelProcess("broken", ours).wait_until_loaded()


def test_a_process_ends_when_nobody_listens_any_more(tiny_folder: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    serve(theirs, ModelSource(str(tiny_folder)), "float32", torch.device("cpu"), torch.get_num_threads(), SMALL)


def test_a_process_that_was_killed_is_named() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(SearchFailed, match="that measured 'big' ended"):
        ModelProcess("big", ours).generate()


@pytest.mark.slow
def test_an_interrupt_is_one_line_and_ends_all_processes(tiny_folder: Path) -> None:
    """Ctrl-C reaches the whole process group."""
    process = subprocess.Popen(
        [sys.executable, "-m", "blockpruner", "latency", str(tiny_folder), "--repeats", "1000000", "--num-tokens", "99",
         "--prompt-len", "8"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    while "warmed up" not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert stderr == "stopped; nothing was written\n"
    assert not psutil.wait_procs(family, timeout=30)[1]


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "positions": ({"prompt_len": 125, "num_tokens": 4}, r"together of at most 128 .* got 129"),
    "contradiction": ({"dense": "x", "no_dense": True}, "expected either `dense` or `no_dense`"),
    "another model": ({"dense": "OTHER"}, r"'TINY' with [\d,]+ parameters, got .*other' with"),
    "a pruned model for dense": ({"dense": "PRUNED"}, "expected the model that"),
    "no dense model": ({"dense": "./nowhere"}, r"'\./nowhere', which does not exist\. Set one with `dense`"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_wrong_options_are_refused_before_anything_starts(
    tiny_folder: Path, pruned_folder: Path, tmp_path: Path, reporter: Reporter, case: str
) -> None:
    options, message = BAD_OPTIONS[case]
    tiny_llama(torch.float32, num_hidden_layers=3).save_pretrained(tmp_path / "other")
    places = {"OTHER": str(tmp_path / "other"), "PRUNED": str(pruned_folder)}
    options = {name: places.get(value, value) if name == "dense" else value for name, value in options.items()}
    with pytest.raises(UserError, match=message.replace("TINY", str(tiny_folder))):
        measure(pruned_folder, reporter, **options)


@pytest.mark.parametrize("named", [False, True])
def test_a_dense_model_whose_weights_were_replaced_is_refused(
    tiny_folder: Path, tmp_path: Path, reporter: Reporter, named: bool
) -> None:
    dense, sequence = shutil.copytree(tiny_folder, tmp_path / "dense"), tmp_path / "order.json"
    sequence.write_text('{"1": [["mha", 1]]}')
    prune_to(tmp_path / "pruned", reporter, model=str(dense), sequence=sequence, dtype="float32")
    tiny_llama(torch.float32, seed=2).save_pretrained(dense)
    with pytest.raises(UserError, match=r"expected the dense model of the checkpoint, .* got .*with `no_dense`"):
        measure(tmp_path / "pruned", reporter, **({"dense": str(dense)} if named else {}))


@pytest.mark.slow  # four measurements for a sentence
def test_a_dense_model_in_another_dtype_may_be_named_and_this_is_said(
    tiny_folder: Path, pruned_folder: Path, tmp_path: Path, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    same = shutil.copytree(tiny_folder, tmp_path / "same")
    assert measure(pruned_folder, reporter, repeats=1, dense=str(same))["dense"]
    assert "weights may differ" not in capsys.readouterr().out
    load(tiny_folder, "bfloat16").save_pretrained(tmp_path / "cast")
    assert measure(pruned_folder, reporter, repeats=1, dense=str(tmp_path / "cast"))["dense"]
    assert "so its weights may differ; its speed is that of its sizes" in " ".join(capsys.readouterr().out.split())


BAD_SIDE_CARS: dict[str, tuple[dict[str, Any], str]] = {
    "of another version": ({"num_parameters_dense": None}, "expected num_parameters_dense in the blockpruner.json"),
    "whose model is gone": ({"base_model": "./gone"}, r"no dense model to compare with: .* alone with `no_dense`"),
}


@pytest.mark.parametrize("case", BAD_SIDE_CARS)
def test_a_checkpoint_without_a_usable_record_is_refused(pruned_folder: Path, reporter: Reporter, case: str) -> None:
    values, message = BAD_SIDE_CARS[case]
    change_side_car(pruned_folder, **values)
    with pytest.raises(UserError, match=message):
        measure(pruned_folder, reporter)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_checkpoint_without_a_record_is_refused(pruned_folder: Path, reporter: Reporter, content: str | None) -> None:
    if content is None:
        (pruned_folder / SIDE_CAR).unlink()
    else:
        (pruned_folder / SIDE_CAR).write_text(content)
    with pytest.raises(UserError, match=r"blockpruner\.json .*`no_dense`"):
        measure(pruned_folder, reporter)


@pytest.mark.parametrize("options", [{"dense": "smollm2"}, {"no_dense": True}])
def test_a_dense_model_has_no_dense_model_beside_it(
    tiny_folder: Path, reporter: Reporter, options: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="expected a pruned checkpoint"):
        measure(tiny_folder, reporter, **options)
