"""A model's tokenizer is there, whole, and gives tokens that the model has; otherwise one line says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blockpruner.engine.blocks import Mask
from blockpruner.engine.calibration import calibration_windows
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.judging import EvaluationUnit, JudgingReplica
from blockpruner.engine.model.tokenizer import load_tokenizer
from blockpruner.engine.sections import Calibration, ModelSource
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.evaluating.evaluating import evaluate_model
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from tests import calls
from tests.conftest import load, tiny_llama, tiny_tokenizer


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edited(name: str, **values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))


def as_folder(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda folder: (folder / "tokenizer.json").unlink(), "expected a tokenizer in .*, which has none"),
    "empty": (lambda folder: (folder / "tokenizer.json").write_text(""), "tokenizer.json', got an empty file"),
    "cut": (lambda folder: (folder / "vocab.json").write_text('{"a": '), "vocab.json', got .*Expecting"),
    "a list": (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "object in .*, got a list"),
    "no model": (edited("tokenizer.json", model=None), "files are damaged, or of another kind"),
    "wrong type": (edited("tokenizer_config.json", eos_token=3), "files are damaged, or of another kind"),
    "latin": (lambda folder: (folder / "tokenizer.json").write_bytes(b'{"\xe4": 1}'), "got something else .*byte 0xe4"),
    "a pointer": (
        lambda folder: (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
        "got the pointer that Git LFS leaves in its place",
    ),
    "a folder": (as_folder, "tokenizer.json', which is a folder"),
    "other ids": (
        edited("tokenizer_config.json", added_tokens_decoder={"999": {"content": "<q>"}}),
        "do not fit each other: token '<q>' is 999 in one and 96 in another",
    ),
    "own code": (
        edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own"),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_tokenizer_is_refused_in_one_line(folder: Path, name: str) -> None:
    damage, message = WRONG[name]
    damage(folder)
    if not message:
        (folder / "tokenizer.json").unlink()
        message = "own code; give `trust_remote_code`|cannot load"
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(ModelSource(str(folder)))
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_is_only_a_sentencepiece_model_is_read(tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    folder = tmp_path / "model"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=60, model_type="bpe", byte_fallback=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tiny_llama(torch.float32).config.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    )
    tokenizer = load_tokenizer(ModelSource(str(folder)))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer("the lazy fox", add_special_tokens=False)["input_ids"] == pieces.encode("the lazy fox")


def with_far_ids(folder: Path) -> None:
    """Add tokens without an embedding: the words of the texts are whole tokens beyond the vocabulary."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["fox", *(f"<{number}>" for number in range(100)), "dog"])
    tokenizer.save_pretrained(folder)


def test_a_token_without_an_embedding_is_refused_before_anything_is_scored(
    folder: Path, config: Callable[..., SearchConfig], text_file: Path, reporter: Reporter, tmp_path: Path
) -> None:
    with_far_ids(folder)
    told = "gives token 197, but the model has embeddings for 0 to 159; use the tokenizer of this model"
    with pytest.raises(UserError, match=told):
        run_search(config(model=str(folder), num_remove=1), tmp_path / "run", reporter)
    judging = EvaluationConfig.of(
        model=str(folder), perplexity=(str(text_file),), seq_len=(16,), dtype="float32", no_ray=True
    )
    with pytest.raises(UserError, match=told):
        evaluate_model(judging, reporter)
    run_search(config(num_remove=1), tmp_path / "run", reporter)
    pruned = tmp_path / "pruned"
    calls.prune_to(pruned, reporter, model=config(num_remove=1).model, run=tmp_path / "run")
    with_far_ids(pruned)
    with pytest.raises(UserError, match=told):
        calls.recover(
            tmp_path / "out", reporter, folder=pruned, dtype="float32", data=str(text_file), num_rows=20, seq_len=16
        )
    assert not (tmp_path / "out").exists()


def test_a_task_with_such_a_token_is_refused(folder: Path) -> None:
    with_far_ids(folder)
    replica = JudgingReplica(load(folder), load_tokenizer(ModelSource(str(folder))), {})
    with pytest.raises(UserError, match="gives token 197"):
        replica.score(EvaluationUnit(Mask(), "loglikelihood", (("the", " dog"),), 1.0, "a request"))


def test_tasks_need_a_token_to_begin_with(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = tokenizer.unk_token = None
    replica = JudgingReplica(load(folder), tokenizer, {})
    unit = EvaluationUnit(Mask(), "loglikelihood", (("the", " dog"), ("the lazy", " fox")), 1.0, "a request")
    with pytest.raises(UserError, match="expected a tokenizer with an EOS token for `tasks`"):
        replica.score(unit)
    tokenizer.bos_token = "<s>"
    answered, _ = replica.score(unit)
    assert len(answered.answers) == 2
    assert len(tokenizer) == 96  # no padding token without an embedding was added


@pytest.mark.parametrize("known", [{}, {"<unk>": 0}])
def test_a_tokenizer_that_knows_nothing_of_a_text_is_refused(text_file: Path, known: dict[str, int]) -> None:
    backend = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>" if known else None)
    with pytest.raises(UserError, match=r"the tokenizer (knows no token|cannot tokenise)"):
        calibration_windows(Calibration(calibration=str(text_file), num_samples=8, seq_len=8), tokenizer)
