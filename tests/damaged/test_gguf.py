"""A damaged GGUF is refused in one line, or read as what it still says; nothing is left behind, nothing hangs."""

from __future__ import annotations

import math
import os
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.cache import cache_dir
from blockpruner.engine.model.from_gguf.header import read_gguf
from blockpruner.engine.model.loading import load_model, load_tokenizer, materialize
from blockpruner.engine.sections import ModelSource
from tests.conftest import tiny_llama
from tests.engine.ggufs import fields_of, tensors_of, tokenizer_fields, write

EXAMPLES = int(os.environ.get("DAMAGED_EXAMPLES", "40"))
MODEL = tiny_llama(torch.float32, num_hidden_layers=2, vocab_size=40, hidden_size=16, intermediate_size=24)
OWN = {f"llama.{name}": value for name, value in fields_of(MODEL).items()}
FIELDS = {"general.name": "tiny", **OWN, **tokenizer_fields(40), "tokenizer.ggml.add_bos_token": True}
TENSORS = tensors_of(MODEL)
SCALARS: st.SearchStrategy[object] = st.one_of(
    st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 0.0, -1.0, math.nan, math.inf, 1e-30, 1e30, True, False, "", "gpt2"]),
    st.integers(0, 2**32 - 1),
    st.floats(width=32),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=3), min_size=1, max_size=5),
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("whole") / "tiny.gguf", "llama", FIELDS, TENSORS).read_bytes()


def header_size(content: bytes) -> int:
    return len(content) - sum(math.ceil(values.nbytes / 32) * 32 for values in TENSORS.values())


def cached() -> set[Path]:
    return set(cache_dir().iterdir()) if cache_dir().exists() else set()


def check(file: Path) -> bool:
    """Read a file, and return whether it was taken. What is refused leaves the cache as it was; what is taken has the
    file's numbers."""
    before, message = cached(), None
    try:
        source = materialize(ModelSource(str(file)), "float32")
    except UserError as error:
        message = str(error)
    if message is not None:
        assert "\n" not in message
        assert len(message) < 700
        assert cached() == before
        return False
    raw = read_gguf(file).tensors
    found = load_model(source, "float32").state_dict()
    assert torch.equal(found["model.embed_tokens.weight"], torch.from_numpy(raw["token_embd.weight"].values.copy()))
    load_tokenizer(source)("the quick fox")
    return True


def damaged(content: bytes) -> Path:
    file = Path(tempfile.mkdtemp(dir=cache_dir().parent)) / "tiny.gguf"
    file.write_bytes(content)
    return file


def test_the_file_itself_is_taken(whole: bytes) -> None:
    assert check(damaged(whole))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_flipped_bytes_of_the_header_are_refused_or_are_what_the_file_says(whole: bytes, data: st.DataObject) -> None:
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header_size(whole) - 1))] = data.draw(st.integers(0, 255))
    check(damaged(bytes(content)))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(length=st.integers(0, 2**20))
def test_a_file_that_ends_early_is_refused(whole: bytes, length: int) -> None:
    assert not check(damaged(whole[: length % (len(whole) - 32)]))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(place=st.integers(0, 2**20), count=st.sampled_from([2**16, 2**31, 2**32, 2**40, 2**62, 2**64 - 1]))
@example(place=8, count=2**64 - 1)
@example(place=16, count=2**64 - 1)
def test_a_huge_count_is_refused_at_once(whole: bytes, place: int, count: int) -> None:
    place %= header_size(whole) - 8
    check(damaged(whole[:place] + struct.pack("<Q", count) + whole[place + 8 :]))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_fields_that_are_removed_or_of_other_types_are_refused_or_taken(data: st.DataObject) -> None:
    fields = dict(FIELDS)
    for name in data.draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=2, unique=True)):
        if data.draw(st.booleans()):
            del fields[name]
        else:
            fields[name] = data.draw(SCALARS)
    file = damaged(b"")
    check(write(file, "llama", fields, TENSORS))


@settings(max_examples=EXAMPLES // 2, deadline=None, derandomize=True)
@given(data=st.data())
def test_tensors_that_are_removed_or_of_other_shapes_are_refused(data: st.DataObject) -> None:
    tensors = dict(TENSORS)
    name = data.draw(st.sampled_from(sorted(TENSORS)))
    if data.draw(st.booleans()):
        del tensors[name]
    else:
        tensors[name] = data.draw(st.sampled_from([tensors[name][:-1], tensors[name][None], tensors[name][..., :-1]]))
    taken = check(write(damaged(b""), "llama", FIELDS, tensors))
    assert taken == (name == "output.weight" and name not in tensors)
