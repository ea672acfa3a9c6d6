"""Commands take the folder of a multimodal model: they are about its text decoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import blockpruner as bp
from blockpruner.compensating.pruned import prune_and_compensate
from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.checkpoint.grouped import SIDE_CAR
from blockpruner.engine.errors import UserError
from blockpruner.pruning.config import PruneConfig
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from tests.calls import compensate, export, plan, prune_to, recover
from tests.conftest import OPTIONS, load, tiny_tokenizer
from tests.engine.multimodals import E2B, image_inputs, without, write_multimodal

PROCESSOR = {
    "preprocessor_config.json": '{"image_processor_type": "Gemma3ImageProcessor"}',
    "processor_config.json": "{}",
}
LOADED_ELSEWHERE = """
import sys

import torch
from transformers import AutoModelForImageTextToText

folder, file = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
with torch.inference_mode():
    torch.save(model(**torch.load(file)).logits, file)
assert "blockpruner" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_multimodal(tmp_path_factory.mktemp("models") / "gemma3", "gemma3")
    tiny_tokenizer().save_pretrained(made)
    (made / "chat_template.jinja").write_text("{{ messages }}")
    for name, content in PROCESSOR.items():
        (made / name).write_text(content)
    return made


@pytest.fixture(scope="module")
def run(folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, and a third after a pause."""
    out, reporter = tmp_path_factory.mktemp("runs") / "run", Reporter(Console(quiet=True))
    for num_remove in (2, 3):
        config = SearchConfig.of(model=str(folder), calibration=str(text_file), num_remove=num_remove, **OPTIONS)
        run_search(config, out, reporter)
    return out


def test_a_search_of_a_multimodal_folder_is_resumed_and_scores_what_the_whole_model_would(
    folder: Path, run: Path
) -> None:
    summary = json.loads((run / "run.json").read_text())
    assert len(summary["steps"]) == 3
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    windows = bp.calibration(summary["config"]["calibration"], tiny_tokenizer(), seq_len=16, num_samples=20)
    for step, scored in enumerate([summary["dense"], *summary["steps"]]):
        mask = Mask.of([Block.from_json(each["block"]) for each in summary["steps"][:step]])
        with without(whole, mask):
            assert bp.perplexity(whole, windows) == pytest.approx(scored["perplexity"], rel=1e-5)


@pytest.fixture(scope="module")
def whole(folder: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "whole"
    prune_to(out, Reporter(Console(quiet=True)), model=str(folder), run=run, num_remove=2)
    return out


@pytest.fixture(scope="module")
def text_only(folder: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "text"
    prune_to(out, Reporter(Console(quiet=True)), model=str(folder), run=run, num_remove=2, text_only=True)
    return out


def removed_from(folder: Path) -> Mask:
    return Mask.of([Block.from_json(pair) for pair in json.loads((folder / SIDE_CAR).read_text())["removed"]])


def test_prune_writes_the_whole_model_which_loads_elsewhere_and_answers_about_an_image(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    dense = AutoModelForImageTextToText.from_pretrained(folder).eval()
    given = image_inputs(dense)
    torch.save(given, tmp_path / "given")
    subprocess.run(
        [sys.executable, "-I", "-c", LOADED_ELSEWHERE, str(whole), str(tmp_path / "given")],
        check=True, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, cwd=tmp_path,
    )  # fmt: skip
    with torch.inference_mode(), without(dense, removed_from(whole)):
        expected = dense(**given).logits
    torch.testing.assert_close(torch.load(tmp_path / "given"), expected, rtol=1e-5, atol=1e-5)


def test_a_whole_checkpoint_brings_its_processor_and_says_what_it_is(folder: Path, whole: Path) -> None:
    for name in (*PROCESSOR, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes()
    said = json.loads((whole / SIDE_CAR).read_text())
    assert (said["format"], said["multimodal"], len(said["removed"])) == ("multimodal", "gemma3", 2)
    stored, dense = (load_file(each / "model.safetensors") for each in (whole, folder))
    gone = sum(tensor.numel() for tensor in dense.values()) - sum(tensor.numel() for tensor in stored.values())
    assert gone == said["num_parameters_dense"] - said["num_parameters"] > 0


def test_commands_say_that_a_whole_checkpoint_is_not_theirs(whole: Path, tmp_path: Path, reporter: Reporter) -> None:
    calls: list[Callable[[], object]] = [
        lambda: export(whole, tmp_path / "out", reporter),
        lambda: recover(tmp_path / "out", reporter, folder=whole, data="builtin"),
        lambda: compensate(tmp_path / "out", reporter, folder=whole),
        lambda: bp.load(whole),
        lambda: plan(reporter, model=str(whole)),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"`text_only`") as error:
            call()
        assert "\n" not in str(error.value)


def test_the_text_decoder_alone_is_a_checkpoint_like_any_other(
    folder: Path, text_only: Path, tmp_path: Path, reporter: Reporter
) -> None:
    said = json.loads((text_only / SIDE_CAR).read_text())
    assert (said["format"], said["multimodal"]) == ("grouped", "gemma3")
    assert not (text_only / "preprocessor_config.json").exists()
    assert (text_only / "chat_template.jinja").exists()
    dense, ids = AutoModelForImageTextToText.from_pretrained(folder).eval(), torch.arange(3, 40)[None]
    with torch.inference_mode(), without(dense, removed_from(text_only)):
        expected = dense(input_ids=ids).logits
    with torch.inference_mode():
        torch.testing.assert_close(load(text_only)(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    export(text_only, tmp_path / "served", reporter)
    card = (tmp_path / "served" / "README.md").read_text()
    assert "this is the text decoder of it, a multimodal model of type gemma3" in card


def test_a_compensated_checkpoint_is_of_the_text_decoder_alone(
    folder: Path, run: Path, tmp_path: Path, reporter: Reporter
) -> None:
    config = PruneConfig.of(model=str(folder), run=run, compensate=True)
    with pytest.raises(UserError, match=r"expected `text_only` with `compensate`.*type 'gemma3'"):
        prune_and_compensate(config, tmp_path / "out", reporter)


def test_a_type_that_cannot_be_written_as_a_whole_is_refused_before_it_is_loaded(
    tmp_path: Path, reporter: Reporter
) -> None:
    sequence = tmp_path / "order.json"
    sequence.write_text('{"1": [["mlp", 1]]}')
    folder = write_multimodal(tmp_path / "voxtral", "voxtral")
    tiny_tokenizer().save_pretrained(folder)
    given = {"model": str(folder), "sequence": sequence}
    with pytest.raises(UserError, match=r"'voxtral' cannot be written as a whole.*use `text_only`"):
        prune_to(tmp_path / "out", reporter, **given)
    assert not (tmp_path / "out").exists()
    prune_to(tmp_path / "out", reporter, **given, text_only=True)
    assert json.loads((tmp_path / "out" / SIDE_CAR).read_text())["multimodal"] == "voxtral"


def test_the_python_functions_take_the_text_decoder(folder: Path, tmp_path: Path) -> None:
    text, tokenizer = bp.load(folder, dtype="float32")
    small = bp.prune(text, ["mha.1", "mlp.2"])
    bp.save(small, tokenizer, tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / SIDE_CAR).read_text())["multimodal"] == "gemma3"
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    with pytest.raises(UserError, match=r"got a multimodal one of type 'gemma3' in memory; blockpruner.load loads"):
        bp.prune(whole, ["mha.1"])


def test_a_small_gemma4_is_planned_searched_and_written_whole_and_as_text(
    text_file: Path, tmp_path: Path, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layers are given values of the tokens, and the last two read the keys and values of the first two."""
    folder = write_multimodal(tmp_path / "model", "gemma4", text_config=E2B)
    tiny_tokenizer().save_pretrained(folder)
    assert plan(reporter, model=str(folder), seq_len=16, num_windows=4, num_remove=2)["num_blocks"] == 8
    config = SearchConfig.of(model=str(folder), calibration=str(text_file), num_remove=3, **OPTIONS)
    summary = run_search(config, tmp_path / "run", reporter)
    assert capsys.readouterr().out.count("mha.0, mha.1 stay, because mixers of later layers read their keys") == 2
    assert summary["steps"][0]["num_candidates"] == 6
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    windows = bp.calibration(summary["config"]["calibration"], tiny_tokenizer(), seq_len=16, num_samples=20)
    mask = Mask.of([Block.from_json(step["block"]) for step in summary["steps"]])
    ids = windows.tokens[:2]
    with torch.inference_mode(), without(whole, mask):
        assert bp.perplexity(whole, windows) == pytest.approx(summary["steps"][-1]["perplexity"], rel=1e-5)
        expected = whole(input_ids=ids).logits
    prune_to(tmp_path / "text", reporter, model=str(folder), run=tmp_path / "run", text_only=True)
    prune_to(tmp_path / "whole", reporter, model=str(folder), run=tmp_path / "run")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", trust_remote_code=True).eval()
    with torch.inference_mode():
        for pruned in (load(tmp_path / "text"), again):
            assert torch.allclose(pruned(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    export(tmp_path / "text", tmp_path / "grouped", reporter, format="grouped")
    for options in ({"format": "vanilla"}, {"format": "deci"}, {"format": "gguf", "gguf_type": "f16"}):
        with pytest.raises(UserError, match="gemma4_text"):
            export(tmp_path / "text", tmp_path / "other", reporter, **options)
