"""The Python API: every line of docs/python.md, and what it promises besides."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import blockpruner as bp
from blockpruner.engine.blocks import Granularity
from blockpruner.engine.scoring.reference import plain_search
from tests.conftest import load, random_windows, tiny_llama, tiny_tokenizer
from tests.processes import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "python.md"


@pytest.fixture
def model(tiny_folder: Path) -> PreTrainedModel:
    return load(tiny_folder)


@pytest.fixture
def text(text_file: Path) -> bp.SearchResult:
    return bp.calibration(text_file, tiny_tokenizer(), num_samples=20, seq_len=16)


def test_every_line_of_the_manual_runs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert len(blocks) == 8
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    out = capsys.readouterr().out
    assert out.startswith("step 1: ")
    assert out.rstrip().endswith(
        "expected `strategy` to be evolution, greedy, lazy, multipruner or one-shot, got 'fastest'."
    )
    assert (tmp_path / "exported" / "config.json").is_file()
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_model_in_memory_is_searched_as_the_official_loop_does(model: PreTrainedModel, text: object) -> None:
    found = bp.search(model, text, num_remove=3)
    official = plain_search(model, text.tokens, 3)
    assert found.order == [block for block, _ in official]
    assert found.perplexity == pytest.approx(bp.perplexity(bp.prune(model, found), text), rel=1e-5)
    assert found.dense_perplexity == pytest.approx(bp.perplexity(model, text), rel=1e-5)
    assert list(found.frame().columns) == ["step", "block", "nll", "perplexity", "ratio"]


def test_the_same_search_by_name_and_in_memory_gives_the_same_bits(
    model: PreTrainedModel, tiny_folder: Path, text: object
) -> None:
    options = {"num_remove": 2, "threads_per_replica": 1}
    here = bp.search(model, text, **options)
    by_name = bp.search(tiny_folder, text, no_ray=True, dtype="float32", **options)
    assert here.frame().equals(by_name.frame())


def test_a_search_leaves_the_callers_model_and_process_as_they_were(model: PreTrainedModel, text: object) -> None:
    model.train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    threads, verbosity = torch.get_num_threads(), transformers_logging.get_verbosity()
    bp.search(model, text, num_remove=1, threads_per_replica=2)
    assert model.training
    assert (torch.get_num_threads(), transformers_logging.get_verbosity()) == (threads, verbosity)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_nothing_is_printed_unless_asked(
    model: PreTrainedModel, text: object, capsys: pytest.CaptureFixture[str]
) -> None:
    bp.search(model, text, num_remove=1)
    assert capsys.readouterr().out == ""
    bp.search(model, text, num_remove=1, verbose=True)
    assert "step 1 of 1" in capsys.readouterr().out


def test_a_run_is_resumed_and_told_again(model: PreTrainedModel, text: object, tmp_path: Path) -> None:
    first = bp.search(model, text, num_remove=1, out=tmp_path / "run")
    steps: list[str] = []
    further = bp.search(model, text, num_remove=2, out=tmp_path / "run", on_step=lambda step: steps.append(str(step)))
    assert further.order[:1] == first.order
    assert [line.partition(":")[0] for line in steps] == ["step 1", "step 2"]
    other = bp.calibration("builtin", tiny_tokenizer(), num_samples=2, seq_len=16, num_windows=2)
    with pytest.raises(bp.UserError, match="`calibration` was"):
        bp.search(model, other, num_remove=2, out=tmp_path / "run")


def test_ctrl_c_leaves_a_run_that_can_be_resumed(model: PreTrainedModel, text: object, tmp_path: Path) -> None:
    def stop(step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bp.search(model, text, num_remove=2, out=tmp_path, on_step=stop)
    whole = bp.search(model, text, num_remove=2)
    assert bp.search(model, text, num_remove=2, out=tmp_path).order == whole.order


def test_windows_of_ones_own_are_taken(model: PreTrainedModel) -> None:
    from blockpruner.engine.calibration import Windows

    windows = Windows(random_windows(), num_rows=3)
    found = bp.search(model, windows, num_remove=1, blocks="layer")
    assert found.order == [block for block, _ in plain_search(model, windows.tokens, 1, Granularity.LAYER)]


def test_a_pruned_model_shares_weights_and_comes_back_from_disk(model: PreTrainedModel, tmp_path: Path) -> None:
    small = bp.prune(model, ["mha.1", "mlp.2"])
    assert small.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    bp.save(small, tiny_tokenizer(), tmp_path / "pruned")
    ids = random_windows()
    again = load(tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, small(input_ids=ids).logits)
    exported = bp.export(tmp_path / "pruned", tmp_path / "exported", format="grouped")
    assert exported["format"] == "grouped"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: bp.search(m, t), "expected one of `num_remove`, `ratio` and `budget_ms`"),
        (lambda m, t: bp.search(m, t, num_remove=99), "`num_remove` from 1 to 7"),
        (lambda m, t: bp.search(m, "builtin", num_remove=1), "windows from blockpruner.calibration"),
        (lambda m, t: bp.search(m, t, num_remove=1, replicas=2), "the name of a model with `replicas`"),
        (lambda m, t: bp.search(m, t, num_remove=1, tolerance="1se"), "`tolerance` with `strategy=lazy`"),
        (lambda m, t: bp.search(m, t, num_removed=1), "there is no option 'num_removed' here; did you mean"),
        (lambda m, t: bp.search("no/such/model", t, num_remove=1, no_ray=True), "'no/such/model'"),
        (lambda m, t: bp.prune(m, ["ffn.1"]), "expected a block such as mha.5"),
        (lambda m, t: bp.prune(m, ["mha.9"]), "a model with 4 layers"),
        (lambda m, t: bp.save(m, None, "nowhere"), "that blockpruner.prune returned"),
        (lambda m, t: bp.evaluate(m, perplexity=("builtin",)), "expected `tokenizer`"),
        (lambda m, t: bp.latency(m), "`save` it first"),
        (lambda m, t: bp.recover("nowhere", "out", rank=4), "prune` or `recover` wrote, got 'nowhere'"),
    ],
)
def test_what_a_caller_gets_wrong_is_one_line_that_names_arguments(
    model: PreTrainedModel, text: object, call: object, message: str
) -> None:
    with pytest.raises(bp.UserError, match=re.escape(message)) as caught:
        call(model, text)
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value)


def test_a_model_whose_layers_do_more_than_their_blocks_is_refused(model: PreTrainedModel) -> None:
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda stream, *args, **kwargs: forward(stream, *args, **kwargs) * 1.01
    with pytest.raises(bp.UserError, match="removing a block has no clear meaning"):
        bp.prune(model, ["mha.2"])


def test_importing_the_package_is_cheap_and_help_needs_no_torch() -> None:
    script = (
        "import sys, blockpruner, blockpruner.cli\n"
        "assert not {'torch', 'transformers', 'ray', 'lm_eval'} & sys.modules.keys()\n"
        "assert callable(blockpruner.search)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_name_that_the_package_lists_is_there() -> None:
    assert dir(bp) == bp.__all__
    assert all(hasattr(bp, name) for name in bp.__all__)


def test_a_script_without_a_main_guard_may_start_processes(tmp_path: Path) -> None:
    """Python's own way to start a process runs the script again in it."""
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(
        "import blockpruner as bp\n"
        "print(sorted(bp.latency('model', repeats=1, prompt_len=4, num_tokens=2, threads=1)))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['dense', 'setting']"]


def test_models_in_memory_are_judged_as_their_checkpoints_are(
    model: PreTrainedModel, tiny_folder: Path, text_file: Path
) -> None:
    options = {"perplexity": (str(text_file),), "seq_len": (16,), "num_windows": 3}
    here = bp.evaluate(model, tokenizer=tiny_tokenizer(), **options)
    by_name = bp.evaluate(tiny_folder, no_ray=True, dtype="float32", threads_per_replica=1, **options)
    assert here["perplexity"][str(text_file)]["value"] == pytest.approx(
        by_name["perplexity"][str(text_file)]["value"], rel=1e-6
    )
