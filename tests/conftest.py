"""Tiny real Hugging Face models and tokenizers, made here: no download, no fixed files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The tests must behave the same with and without a network, and on any number of cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
# Code that test models bring must not stay in the user's cache.
_modules = tempfile.TemporaryDirectory(prefix="modules-")
os.environ["HF_MODULES_CACHE"] = _modules.name

import pytest
import torch
from hypothesis import settings
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from blockpruner.apart import Apart
from blockpruner.cluster.session import ray_session
from blockpruner.engine.model.loading import load_model
from blockpruner.engine.sections import ModelSource
from blockpruner.searching.config import SearchConfig
from blockpruner.showing.console import Reporter
from tests.hub import hub_cache as hub_cache
from tests.processes import command, finish

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

TEXT = "the quick brown fox jumps over the lazy dog and runs far away from the old river bank while birds sing "

TINY = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random Llama whose blocks matter: larger weights than the usual initialisation gives."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**TINY, "initializer_range": 0.2, **overrides})
    return LlamaForCausalLM(config).to(dtype).eval()


def random_windows(num_windows: int = 3, seq_len: int = 16, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, TINY["vocab_size"], (num_windows, seq_len), generator=generator)


def tiny_tokenizer(*, adds_space: bool = True) -> PreTrainedTokenizerFast:
    """adds_space: whether it puts a space before a text, which llama.cpp does not."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=TINY["vocab_size"], special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def write_tiny(folder: Path, **options: Any) -> Path:
    """Write a float32 checkpoint of a tiny Llama with its tokenizer. options: of its config."""
    tiny_llama(torch.float32, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint folder of a tiny Llama with its tokenizer."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt its text, so that there is something to lose."""
    folder = tmp_path_factory.mktemp("models") / "trained"
    model, tokenizer = tiny_llama(torch.float32), tiny_tokenizer()
    ids = torch.tensor(tokenizer(TEXT * 5)["input_ids"])
    windows = ids[: len(ids) // 16 * 16].view(-1, 16)[:64]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration rows that differ from each other."""
    words = TEXT.split()
    rows = [" ".join(words[(index * step) % len(words)] for index in range(12)) for step in range(1, 40)]
    path = tmp_path_factory.mktemp("data") / "rows.txt"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKPRUNER_CACHE", str(tmp_path / "cache"))


def load(folder: Path | str, dtype: str = "float32") -> PreTrainedModel:
    return load_model(ModelSource(str(folder)), dtype)


def generate(model: PreTrainedModel, **options: object) -> list[list[int]]:
    """Greedy tokens for a left-padded batch: a batch of one hides wrong caches."""
    ids = torch.tensor([[0, 0, 0, 0, 17, 33], [9, 12, 45, 7, 81, 5], [0, 0, 101, 44, 60, 13]])
    output = model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=10,
        min_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=2,
        **options,
    )
    return output.tolist()


OPTIONS = {"seq_len": 16, "num_samples": 20, "dtype": "float32", "threads_per_replica": 1, "no_ray": True}


@pytest.fixture
def config(tiny_folder: Path, text_file: Path) -> Callable[..., SearchConfig]:
    def make(**options: Any) -> SearchConfig:
        return SearchConfig.of(**{"model": str(tiny_folder), "calibration": str(text_file), **OPTIONS, **options})

    return make


@pytest.fixture
def reporter(capsys: pytest.CaptureFixture[str]) -> Reporter:
    return Reporter(Console(width=200))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    with ray_session(None, num_cpus=4):
        from ray import cloudpickle

        from tests.cluster import fakes

        # Workers find the installed package, but not the tests.
        cloudpickle.register_pickle_by_value(fakes)
        yield


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough that a step can be interrupted."""
    folder = tmp_path_factory.mktemp("models") / "slow"
    model = tiny_llama(
        torch.float32, num_hidden_layers=10, hidden_size=128, intermediate_size=256, initializer_range=0.08
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return finish(command(slow_model, tmp_path_factory.mktemp("undisturbed") / "run", "--no-ray"))


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods and evaluations of a comparison run here: starting processes takes most of the time."""

    def here(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Apart[Any]:
        return Apart(function(*args, **kwargs), 0)

    monkeypatch.setattr("blockpruner.comparing.comparing.run_apart", here)
    monkeypatch.setattr("blockpruner.comparing.running.run_apart", here)
