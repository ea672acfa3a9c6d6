"""Whatever lies in a model's folder, its weights are taken bit for bit or refused in one line, and nothing hangs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.loading import load_model, materialize
from blockpruner.engine.sections import ModelSource
from tests.conftest import tiny_llama

INDEX = "model.safetensors.index.json"
SETTINGS: dict[str, Any] = {
    "derandomize": True, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture],
}  # fmt: skip


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sharded"
    tiny_llama(torch.float32).save_pretrained(folder, max_shard_size="30KB")
    return folder


def copy_of(folder: Path, tmp_path: Path) -> Path:
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    return shutil.copytree(folder, tmp_path / "model")


def taken_or_refused(folder: Path) -> bool:
    """Whether the weights are taken. Raises unless they are those of the undamaged model, or refused in one line."""
    try:
        model = load_model(materialize(ModelSource(str(folder)), "float32"), "float32")
    except UserError as error:
        is_one_line = "\n" not in str(error) and len(str(error)) < 900
        if not is_one_line:
            raise AssertionError("expected one line") from error
        return False
    true = tiny_llama(torch.float32).state_dict()
    assert all(torch.equal(weight, true[name]) for name, weight in model.state_dict().items()), "other bits"
    return True


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


JSON = st.recursive(
    st.sampled_from([None, True, 0, -1, 1, 32, 2**63, 10**30, 0.5, "", "F32", "BF16", "I8", "F8_E4M3", "U8", "\n"])
    | st.sampled_from(["model.norm.weight", "../model-00001-of-00008.safetensors", "/etc/passwd", "a\0b", "."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "dtype", "shape"]), inner),
    max_leaves=4,
)


@settings(max_examples=35, **SETTINGS)
@given(data=st.data(), key=st.sampled_from(["dtype", "shape", "data_offsets", "name", "gone", "extra", "whole"]))
def test_a_header_that_says_anything_is_taken_or_refused(
    tiny_folder: Path, tmp_path: Path, data: st.DataObject, key: str
) -> None:
    folder = copy_of(tiny_folder, tmp_path)
    header, tensors = header_of(folder / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(header)))
    if key == "gone":
        del header[name]
    elif key == "whole":
        header[name] = data.draw(JSON)
    elif key in ("name", "extra"):
        other = data.draw(st.sampled_from(sorted(header)) | st.text(max_size=5))
        header[other] = header.pop(name) if key == "name" else header[name]
    elif isinstance(header[name], dict):
        value = data.draw(JSON | st.lists(st.integers(0, 2000), max_size=3))
        header[name] = {**header[name], key: value}
    written = json.dumps(header).encode()
    write(folder / "model.safetensors", written + b" " * (-len(written) % 8), tensors)
    taken_or_refused(folder)


@settings(max_examples=30, **SETTINGS)
@given(start=st.integers(0, 2500), cut=st.integers(0, 100), put=st.binary(max_size=12))
def test_a_weight_file_with_any_bytes_in_its_header_is_taken_or_refused(
    tiny_folder: Path, tmp_path: Path, start: int, cut: int, put: bytes
) -> None:
    folder = copy_of(tiny_folder, tmp_path)
    header, tensors = header_of(folder / "model.safetensors")
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    start %= len(written)
    write(folder / "model.safetensors", written[:start] + put + written[start + cut :], tensors)
    taken_or_refused(folder)


@settings(max_examples=35, **SETTINGS)
@given(data=st.data(), how=st.sampled_from(["value", "key", "gone", "map", "metadata", "whole", "bytes"]))
def test_an_index_that_says_anything_is_taken_or_refused(
    sharded: Path, tmp_path: Path, data: st.DataObject, how: str
) -> None:
    folder = copy_of(sharded, tmp_path)
    index = json.loads((folder / INDEX).read_text())
    names, files = sorted(index["weight_map"]), sorted(set(index["weight_map"].values()))
    name = data.draw(st.sampled_from(names))
    if how == "value":
        index["weight_map"][name] = data.draw(JSON | st.sampled_from(files))
    elif how == "key":
        index["weight_map"][data.draw(st.text(max_size=5) | st.sampled_from(names))] = index["weight_map"].pop(name)
    elif how == "gone":
        for one in data.draw(st.sets(st.sampled_from(names))):
            del index["weight_map"][one]
    elif how in ("map", "metadata"):
        index["weight_map" if how == "map" else how] = data.draw(JSON)
    elif how == "whole":
        index = data.draw(JSON)
    content = json.dumps(index).encode()
    if how == "bytes":
        start = data.draw(st.integers(0, len(content)))
        content = content[:start] + data.draw(st.binary(max_size=4)) + content[start + data.draw(st.integers(0, 9)) :]
    (folder / INDEX).write_bytes(content)
    taken_or_refused(folder)
