"""Damaged and strange files of text: read with the right values, or refused in one line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpruner.engine.errors import UserError
from blockpruner.engine.text.rows import rows_of

EXAMPLES = int(os.environ.get("DAMAGED_EXAMPLES", "25"))
TEXTS = st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=6)
KEYS = st.sampled_from(["text", "a", "role", "content", "from", "value"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
fuzz = settings(max_examples=EXAMPLES, derandomize=True, deadline=None)


def outcome(path: Path, column: str = "text") -> list[object] | None:
    """Return the rows, or None if they were refused, as they have to be."""
    before = sorted(path.parent.iterdir())
    try:
        rows = rows_of(str(path), column, train=True)
    except UserError as refused:
        message = str(refused)
    else:
        message = None
    assert sorted(path.parent.iterdir()) == before
    if message is not None:
        assert len(message.splitlines()) == 1
        return None
    assert len(rows) > 0
    return list(rows.values)


def as_json_lines(texts: list[str | None], other: list[object]) -> bytes:
    lines = [{"other": other[index % len(other)], "text": text} for index, text in enumerate(texts)]
    return "\n".join(json.dumps(line) for line in lines).encode()


def as_array(texts: list[str | None], other: list[object]) -> bytes:
    return b"[" + as_json_lines(texts, other).replace(b"\n", b", \n") + b"]"


def as_gzip(texts: list[str | None], other: list[object]) -> bytes:
    return gzip.compress(as_json_lines(texts, other), mtime=0)


def as_csv(texts: list[str | None], other: list[object]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(["other", "text"])
    writer.writerows([json.dumps(other[index % len(other)]), text] for index, text in enumerate(texts))
    return stream.getvalue().encode()


def as_parquet(texts: list[str | None], other: list[object]) -> bytes:
    stream = io.BytesIO()
    table = pa.table({"other": [json.dumps(other)] * len(texts), "text": pa.array(texts, pa.string())})
    pq.write_table(table, stream)
    return stream.getvalue()


def as_arrow(texts: list[str | None], other: list[object]) -> bytes:
    table = pa.table({"other": [json.dumps(other)] * len(texts), "text": pa.array(texts, pa.string())})
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


FORMS: dict[str, Callable[[list[str | None], list[object]], bytes]] = {
    "rows.jsonl": as_json_lines,
    "rows.json": as_array,
    "rows.jsonl.gz": as_gzip,
    "rows.csv": as_csv,
    "rows.parquet": as_parquet,
    "rows.arrow": as_arrow,
}


@pytest.mark.parametrize("name", FORMS)
@fuzz
@given(texts=TEXTS, other=st.lists(JSON, min_size=1, max_size=3))
def test_texts_come_back_whatever_stands_beside_them(name: str, texts: list[str | None], other: list[object]) -> None:
    expected = [text or "" for text in texts] if name == "rows.csv" else [text for text in texts if text is not None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(FORMS[name](texts, other))
        assert (outcome(path) or []) == expected


@pytest.mark.parametrize("name", FORMS)
@fuzz
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(name: str, data: st.DataObject) -> None:
    content = bytearray(FORMS[name](["one text", None, "another one"], [{"a": [1]}]))
    kind = data.draw(st.sampled_from(["cut", "flip", "insert", "repeat"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        del content[place:]
    elif kind == "flip":
        content[place] ^= data.draw(st.integers(1, 255))
    elif kind == "insert":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
    else:
        content[place:place] = content[place:] * 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        outcome(path)


@pytest.mark.parametrize("name", [*FORMS, "rows.txt", "rows.raw.gz"])
@fuzz
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_read_or_refused(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        outcome(path)


@fuzz
@given(rows=st.lists(JSON, max_size=4), column=st.sampled_from(["text", "a", "messages"]))
def test_any_json_is_read_or_refused(rows: list[object], column: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps(rows))
        outcome(path, column)
        path.write_text("\n".join(map(json.dumps, rows)))
        outcome(path, column)


@fuzz
@given(name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=30))
def test_any_name_is_that_of_one_file(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for other in ("a.txt", "1.txt", "x.txt"):
            (Path(folder) / other).write_text("another file")
        path = Path(folder) / f"{name}.txt"
        path.write_text("this file")
        assert outcome(path) == ["this file"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("saved") / "both"
    part = datasets.Dataset.from_dict({"text": ["a", "b"]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(folder)
    return folder


@fuzz
@given(value=JSON | st.just({"splits": ["../train"]}) | st.just({"_data_files": [{"filename": "/etc/passwd"}]}))
def test_the_files_of_a_saved_data_set_are_checked(saved: Path, value: object) -> None:
    for file in (saved / "dataset_dict.json", saved / "train" / "state.json"):
        before = file.read_bytes()
        try:
            file.write_text(json.dumps(value))
            assert outcome(saved) is None
        finally:
            file.write_bytes(before)
