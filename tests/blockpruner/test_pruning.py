"""What `prune` writes: the blocks that are left, in the dtype in which the model is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXJapaneseConfig

import blockpruner as bp
from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.judging import JudgingReplica
from blockpruner.engine.model import loading
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.scoring.scoring import ScoringReplica
from blockpruner.pruning.config import PruneConfig
from blockpruner.pruning.pruning import prune_model
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from tests.conftest import OPTIONS, TINY, tiny_llama, tiny_tokenizer
from tests.families.configs import make_config


@pytest.fixture
def in_bfloat16(tmp_path: Path) -> Path:
    folder = tmp_path / "bfloat16"
    tiny_llama(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def sequence(tmp_path: Path) -> Path:
    file = tmp_path / "order.json"
    file.write_text(json.dumps({"1": [["mlp", 1]]}))
    return file


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize("has_instructions", [False, True])
def test_the_dtype_stays_that_of_the_checkpoint_on_any_processor(
    in_bfloat16: Path,
    sequence: Path,
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    has_instructions: bool,
) -> None:
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: has_instructions)
    prune_model(PruneConfig(model=str(in_bfloat16), sequence=sequence), tmp_path / "pruned", reporter)
    assert "in bfloat16 (as the checkpoint stores it)" in capsys.readouterr().out
    dense, pruned = (load_file(folder / "model.safetensors") for folder in (in_bfloat16, tmp_path / "pruned"))
    assert pruned.keys() < dense.keys()
    assert all(torch.equal(weight, dense[name]) for name, weight in pruned.items())
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_search_in_another_dtype_is_said_and_does_not_change_the_weights(
    in_bfloat16: Path, text_file: Path, tmp_path: Path, reporter: Reporter, capsys: pytest.CaptureFixture[str]
) -> None:
    search = SearchConfig.of(model=str(in_bfloat16), calibration=str(text_file), num_remove=1, **OPTIONS)
    run_search(search, tmp_path / "run", reporter)
    prune_model(PruneConfig(model=str(in_bfloat16), run=tmp_path / "run"), tmp_path / "pruned", reporter)
    assert "note: the perplexities of the run are those of the model in float32" in capsys.readouterr().out
    assert dtypes(tmp_path / "pruned") == {torch.bfloat16}
    asked = PruneConfig(model=str(in_bfloat16), run=tmp_path / "run", dtype="float32")
    prune_model(asked, tmp_path / "asked", reporter)
    assert dtypes(tmp_path / "asked") == {torch.float32}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers add a bias that their attention returns, whether the attention is there or not."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "refused"
    AutoModelForCausalLM.from_config(GPTNeoXJapaneseConfig(**TINY)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_what_search_refuses_is_not_pruned_by_a_sequence(
    refused: Path, sequence: Path, tmp_path: Path, reporter: Reporter
) -> None:
    with pytest.raises(UserError, match="'gpt_neox_japanese' is not supported yet"):
        prune_model(PruneConfig(model=str(refused), sequence=sequence), tmp_path / "pruned", reporter)
    assert not (tmp_path / "pruned").exists()


UNFIT = {
    "minimax": "changes its stream even when its attention and its MLP are both absent",
    "recurrent_gemma": "could not generate, so no checkpoint can be written of it",
}
"""Families of which only running shows that blocks cannot be removed, or that nothing can be generated then."""


def unfit(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make_config(family)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", UNFIT)
def test_what_only_running_shows_is_found_before_anything_is_written(
    family: str, sequence: Path, tmp_path: Path, reporter: Reporter
) -> None:
    model = str(unfit(tmp_path / "model", family))
    with pytest.raises(UserError, match=UNFIT[family]):
        prune_model(PruneConfig(model=model, sequence=sequence, dtype="float32"), tmp_path / "pruned", reporter)
    assert not (tmp_path / "pruned").exists()
    with pytest.raises(UserError, match=UNFIT[family]):
        bp.prune(model, ["mlp.1"], dtype="float32")


def test_what_search_refuses_is_not_judged_without_blocks(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(unfit(tmp_path, "minimax"))
    replica = JudgingReplica(model, tiny_tokenizer(), {})
    with pytest.raises(UserError, match=UNFIT["minimax"]):
        replica._open(Mask.of([Block.parse("mlp.1")]))
    with pytest.raises(UserError, match=UNFIT["minimax"]):
        ScoringReplica(Decoder(model), torch.zeros(1, 8, dtype=torch.long))


def test_a_model_that_uses_half_of_its_weights_is_not_pruned(
    tiny_folder: Path, sequence: Path, tmp_path: Path, reporter: Reporter
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 2'))
    with pytest.raises(UserError, match="18 tensors of the file are not used"):
        prune_model(PruneConfig(model=str(folder), sequence=sequence), tmp_path / "pruned", reporter)
    assert not (tmp_path / "pruned").exists()
