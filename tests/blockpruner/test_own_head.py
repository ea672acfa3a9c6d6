"""Commands that take, train or rebuild a model keep a head of its own beside `tie_word_embeddings: true`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blockpruner.comparing.comparing import compare_methods
from blockpruner.comparing.config import CompareConfig
from blockpruner.engine.blocks import Mask
from blockpruner.engine.judge.judging import JudgingReplica
from blockpruner.engine.recovery.config import RecoveryConfig
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.evaluating.evaluating import evaluate_model
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from tests.calls import prune_to, recover
from tests.conftest import OPTIONS, load, tiny_llama, tiny_tokenizer
from tests.engine.test_ties import store_own_head

TEXTS = {"seq_len": (16,), "num_windows": 4, "dtype": "float32", "no_ray": True, "threads_per_replica": 1}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    store_own_head(tiny_llama(torch.float32, num_hidden_layers=6, tie_word_embeddings=True), tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["tie_word_embeddings"]
    return tmp_path / "dense"


def head_in(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["lm_head.weight"]


def assert_head_kept(folder: Path, dense: Path) -> None:
    """In the file, and in the model as it is loaded."""
    assert torch.equal(head_in(folder), head_in(dense))
    assert torch.equal(load(folder).get_output_embeddings().weight, head_in(dense))


@pytest.mark.parametrize("says_tied", [False, True])
def test_recovery_trains_the_blocks_and_keeps_the_head(
    dense: Path, text_file: Path, tmp_path: Path, reporter: Reporter, says_tied: bool
) -> None:
    pruned, sequence = tmp_path / "pruned", tmp_path / "order.json"
    sequence.write_text('{"1": [["mlp", 1]]}')
    prune_to(pruned, reporter, model=str(dense), sequence=sequence, dtype="float32")
    assert_head_kept(pruned, dense)
    if says_tied:  # as a checkpoint of another program may
        config = json.loads((pruned / "config.json").read_text())
        (pruned / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    training = RecoveryConfig.of(lr=0.01, seq_len=16).to_json()
    recover(tmp_path / "out", reporter, folder=pruned, data=str(text_file), num_rows=8, dtype="float32", **training)
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "out"))
    assert_head_kept(tmp_path / "out", dense)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])


def test_a_run_is_judged_with_the_head(
    dense: Path, text_file: Path, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": str(dense), "calibration": str(text_file), **OPTIONS, "num_remove": 1}
    run_search(SearchConfig.of(**options), tmp_path / "run", reporter)
    prune_to(tmp_path / "pruned", reporter, model=str(dense), run=tmp_path / "run")
    judged: list[torch.Tensor] = []
    opened = JudgingReplica._open

    def seen(self: JudgingReplica, mask: Mask) -> None:
        opened(self, mask)
        judged.append(self._model.get_output_embeddings().weight)

    monkeypatch.setattr(JudgingReplica, "_open", seen)

    def perplexity(**options: Any) -> float:
        config = EvaluationConfig(perplexity=(str(text_file),), **TEXTS, **options)
        return evaluate_model(config, reporter)["perplexity"][str(text_file)]["value"]

    assert perplexity(model=str(dense), run=tmp_path / "run", num_remove=(1,)) == perplexity(
        model=str(tmp_path / "pruned")
    )
    assert judged
    assert all(torch.equal(head, head_in(dense)) for head in judged)


@pytest.mark.usefixtures("one_process")
def test_a_rebuilt_model_is_written_with_the_head(
    dense: Path, text_file: Path, tmp_path: Path, reporter: Reporter
) -> None:
    config = CompareConfig.of(
        model=str(dense), calibration=str(text_file), num_samples=20, seq_len=16, num_windows=3, dtype="float32",
        device="cpu", no_ray=True, threads_per_replica=1, methods=("laco", "slicegpt"), ratio=(0.2,),
        perplexity=(str(text_file),), test_seq_len=16, test_windows=4, repeats=0,
    )  # fmt: skip
    compare_methods(config, tmp_path / "out", reporter)
    for checkpoint in (file.parent for file in (tmp_path / "out").rglob("model.safetensors")):
        assert_head_kept(checkpoint, dense)
    assert len(list((tmp_path / "out").rglob("model.safetensors"))) == 2
