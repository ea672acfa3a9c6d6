"""Damaged and foreign tokenizers: they load and give ids that the model has, or are refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpruner.engine.calibration import calibration_windows
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.tokenizer import load_tokenizer
from blockpruner.engine.sections import Calibration, ModelSource
from blockpruner.engine.text.tokens import check_ids
from tests.conftest import TINY

EXAMPLES = int(os.environ.get("DAMAGED_EXAMPLES", "25"))
FILES = ("tokenizer.json", "tokenizer_config.json")
SCALARS = st.none() | st.booleans() | st.integers(-2, 10**6) | st.text(max_size=4)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
fuzz = settings(max_examples=EXAMPLES, derandomize=True, deadline=None)


def paths_of(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in a JSON value, but only a few of a long list or a vocabulary."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, each in list(inner)[:12] for path in paths_of(each, (*here, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def outcome(folder: Path, text: Path) -> None:
    """Make windows. Either they are as they have to be, or the tokenizer is refused in one line."""
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    try:
        tokenizer = load_tokenizer(ModelSource(str(folder)))
        windows = calibration_windows(
            Calibration(calibration=str(text), num_samples=8, seq_len=8), tokenizer, "llama"
        ).tokens
        check_ids(windows, TINY["vocab_size"])  # type: ignore[arg-type]
    except UserError as refused:
        message = str(refused)
    else:
        message = "one line"
        assert windows.shape[1] == 8
        assert windows.min() >= 0
        assert windows.max() < TINY["vocab_size"]
    assert len(message.splitlines()) == 1
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


@pytest.mark.parametrize("name", FILES)
@fuzz
@given(data=st.data())
def test_a_file_with_another_value_in_some_place(
    name: str, data: st.DataObject, tiny_folder: Path, text_file: Path
) -> None:
    content = json.loads((tiny_folder / name).read_text())
    path = data.draw(st.sampled_from(paths_of(content)))
    with tempfile.TemporaryDirectory() as copy:
        for file in FILES:
            shutil.copy(tiny_folder / file, copy)
        (Path(copy) / name).write_text(json.dumps(replaced(content, path, data.draw(JSON))))
        outcome(Path(copy), text_file)


@pytest.mark.parametrize("name", [*FILES, "special_tokens_map.json", "added_tokens.json"])
@fuzz
@given(data=st.data())
def test_a_file_that_is_cut_or_something_else(
    name: str, data: st.DataObject, tiny_folder: Path, text_file: Path
) -> None:
    whole = (tiny_folder / name).read_bytes() if name in FILES else b'{"<a>": 3}'
    cut = st.integers(0, len(whole)).map(lambda end: whole[:end])
    other = JSON.map(lambda value: json.dumps(value).encode())
    with tempfile.TemporaryDirectory() as copy:
        for file in FILES:
            shutil.copy(tiny_folder / file, copy)
        (Path(copy) / name).write_bytes(data.draw(cut | other | st.binary(max_size=20)))
        outcome(Path(copy), text_file)


@fuzz
@given(
    key=st.sampled_from(
        ["tokenizer_class", "bos_token", "eos_token", "pad_token", "unk_token", "extra_special_tokens", "chat_template",
         "added_tokens_decoder", "model_max_length", "auto_map", "padding_side", "add_bos_token", "backend",
         "clean_up_tokenization_spaces", "split_special_tokens", "model_input_names"]
    ),
    value=JSON | st.sampled_from(["<new>", "LlamaTokenizer", "BertTokenizer", "T5Tokenizer", {"content": "</s>"}]),
)  # fmt: skip
def test_any_value_of_a_key_of_the_config(key: str, value: object, tiny_folder: Path, text_file: Path) -> None:
    content = json.loads((tiny_folder / FILES[1]).read_text())
    with tempfile.TemporaryDirectory() as copy:
        shutil.copy(tiny_folder / FILES[0], copy)
        (Path(copy) / FILES[1]).write_text(json.dumps({**content, key: value}))
        outcome(Path(copy), text_file)
