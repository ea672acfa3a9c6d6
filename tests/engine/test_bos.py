"""BOS tokens stand where the model's family was trained to see them, and where older runs had them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerBase

from blockpruner.engine.blocks import Mask
from blockpruner.engine.calibration import calibration_windows, evaluation_windows
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.judging import EvaluationUnit, JudgingReplica
from blockpruner.engine.recovery.training import draw_rows
from blockpruner.engine.sections import Bos, Calibration
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.evaluating.evaluating import evaluate_model
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from tests.conftest import TINY, tiny_tokenizer

BOS = 1


def with_bos() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "plain-name"
    torch.manual_seed(0)
    config = Gemma3TextConfig(**{**TINY, "head_dim": 8, "initializer_range": 0.2, "sliding_window": 64})
    Gemma3ForCausalLM(config).save_pretrained(folder)
    with_bos().save_pretrained(folder)
    return folder


def drawn(text_file: Path, tokenizer: PreTrainedTokenizerBase, model_type: str | None, **options: Any) -> torch.Tensor:
    text = Calibration(calibration=str(text_file), num_samples=20, seq_len=16, **options)
    return calibration_windows(text, tokenizer, model_type).tokens


def test_auto_is_every_window_for_gemma_and_the_official_way_for_others(text_file: Path) -> None:
    gemma, llama = (drawn(text_file, with_bos(), kind) for kind in ("gemma3_text", "llama"))
    assert gemma[:, 0].tolist() == [BOS] * len(gemma)
    assert (gemma[:, 1:] != BOS).all()
    assert (llama == BOS).nonzero().tolist() == [[0, 0]]
    assert torch.equal(gemma[:, 1:].flatten()[:100], llama.flatten()[1:101])
    assert torch.equal(drawn(text_file, tiny_tokenizer(), "gemma"), drawn(text_file, tiny_tokenizer(), "llama"))


def test_bos_stands_where_it_is_asked_for(text_file: Path) -> None:
    tokenizer = with_bos()
    every = drawn(text_file, tokenizer, "llama", bos="every-window")
    none = drawn(text_file, tokenizer, "gemma2", bos="none")
    assert torch.equal(every, drawn(text_file, tokenizer, "gemma2"))
    assert (none != BOS).all()
    assert torch.equal(none.flatten()[:15], every[0, 1:])
    assert torch.equal(drawn(text_file, tokenizer, "gemma", bos="first-window"), drawn(text_file, tokenizer, "llama"))


def test_without_a_config_the_family_is_that_of_the_folder_of_the_tokenizer(text_file: Path, gemma: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gemma)
    assert torch.equal(drawn(text_file, tokenizer, None), drawn(text_file, tokenizer, "gemma3_text"))
    assert torch.equal(drawn(text_file, with_bos(), None), drawn(text_file, with_bos(), "llama"))


def test_what_is_not_as_the_model_was_trained_is_said(text_file: Path) -> None:
    windows = evaluation_windows(str(text_file), with_bos(), seq_len=16, bos=Bos.FIRST_WINDOW, model_type="gemma")
    assert "`bos=every-window` is as it was trained" in windows.notes[0]
    assert not evaluation_windows(str(text_file), with_bos(), seq_len=16, model_type="gemma").notes


def test_a_tokenizer_without_the_token_is_refused(text_file: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="BOS token for `bos=every-window`"):
        drawn(text_file, tokenizer, "llama", bos="every-window")


def test_rows_to_train_on_begin_with_one_bos_token_or_none(text_file: Path) -> None:
    def rows(bos: Bos) -> list[list[int]]:
        found = draw_rows(str(text_file), with_bos(), num_rows=5, seq_len=12, seed=1, bos=bos)
        return [row.tolist() for row in found.tokens]

    assert rows(Bos.EVERY_WINDOW) == rows(Bos.FIRST_WINDOW)
    assert all(row[0] == BOS and BOS not in row[1:] for row in rows(Bos.EVERY_WINDOW))
    assert all(BOS not in row for row in rows(Bos.NONE))


def test_a_search_records_what_auto_meant(
    gemma: Path, config: Callable[..., SearchConfig], reporter: Reporter, tmp_path: Path
) -> None:
    asked = config(model=str(gemma), num_remove=1)
    found = run_search(asked, tmp_path / "run", reporter)
    assert found["config"]["bos"] == "every-window"
    again = run_search(asked.replace(num_remove=2), tmp_path / "run", reporter)
    assert len(again["steps"]) == 2
    with pytest.raises(UserError, match="`bos` was 'every-window', now 'first-window'"):
        run_search(asked.replace(bos=Bos.FIRST_WINDOW), tmp_path / "run", reporter)


def test_a_run_from_before_the_option_goes_on_as_it_began(
    gemma: Path, config: Callable[..., SearchConfig], reporter: Reporter, tmp_path: Path
) -> None:
    asked = config(model=str(gemma), num_remove=1)
    run = tmp_path / "run"
    old = run_search(asked.replace(bos=Bos.FIRST_WINDOW), run, reporter)
    for file in (run / "ledger.jsonl", run / "run.json"):  # in those days the ledger was not chained either
        file.write_text(re.sub(r'"bos": ?"first-window", ?|, "chain": "[0-9a-f]+"', "", file.read_text()))
    header = json.loads((run / "ledger.jsonl").read_text().splitlines()[0])
    assert "bos" not in header["config"]
    found = run_search(asked.replace(num_remove=2), run, reporter)
    assert found["calibration"] == old["calibration"]
    assert len(found["steps"]) == 2


def test_an_evaluation_records_it_too(gemma: Path, text_file: Path, reporter: Reporter) -> None:
    def judged(**options: Any) -> dict[str, Any]:
        config = EvaluationConfig.of(
            model=str(gemma), perplexity=(str(text_file),), seq_len=(16,), num_windows=3, dtype="float32", no_ray=True,
            **options,
        )  # fmt: skip
        return evaluate_model(config, reporter)

    auto, every, first = judged(), judged(bos="every-window"), judged(bos="first-window")
    assert [each["setting"]["bos"] for each in (auto, every, first)] == ["every-window", "every-window", "first-window"]
    assert auto["perplexity"] == every["perplexity"] != first["perplexity"]


def test_task_requests_to_a_gemma_begin_with_bos(gemma: Path) -> None:
    from tests.conftest import load

    replica = JudgingReplica(load(gemma), with_bos(), {})
    replica.score(EvaluationUnit(Mask(), "loglikelihood", (("the fox", " runs"),), 1.0, "a request"))
    assert replica._harness is not None
    assert replica._harness.tok_encode("the fox")[0] == BOS
