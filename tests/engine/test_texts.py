"""What people have in files and folders is read as it is, or refused in one line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blockpruner.engine.calibration import calibration_windows, evaluation_windows
from blockpruner.engine.errors import UserError
from blockpruner.engine.sections import Calibration
from blockpruner.engine.text import files
from blockpruner.engine.text.rows import Rows, rows_of
from tests.conftest import tiny_tokenizer

ROWS = ["the quick brown fox", "", "jumps over\nthe lazy dog", "Fähre 😀"]
LINES = "".join(json.dumps({"text": row}) + "\n" for row in ROWS)
CONVERSATION = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "runs away"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}{{ strftime_now('%Y') }}"


def read(path: Path | str, column: str = "text", *, train: bool = True) -> list[Any]:
    return list(rows_of(str(path), column, train=train).values)


@pytest.mark.parametrize(
    "name",
    ["a[1].jsonl", "*.jsonl", "{a,b}.jsonl", "what?.jsonl", "zip::x.jsonl", "file:x.jsonl", "50%25.jsonl", "#1.jsonl",
     "~.jsonl", "my rows.jsonl", "two\nlines.jsonl", "ROWS.JSONL"],
)  # fmt: skip
def test_a_path_is_no_pattern(tmp_path: Path, name: str) -> None:
    for other in ("a1.jsonl", "a.jsonl", "b.jsonl", "whatx.jsonl", "x.jsonl", "50%.jsonl"):
        (tmp_path / other).write_text('{"text": "another file"}\n')
    (tmp_path / name).write_text(LINES)
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize("folder", ["[1]", "a::b", "s3:", "*"])
def test_a_folder_in_a_path_is_no_pattern_either(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"text": ROWS}), tmp_path / folder / "rows.parquet")
    assert read(f"{folder}/rows.parquet") == ROWS


@pytest.mark.parametrize(
    "others",
    [
        lambda index: {"licence": None if index < 2000 else "mit"},
        lambda index: {"label": index if index < 2000 else "n/a"},
        lambda index: {"date": "2026-01-02T00:00:00" if index < 2000 else "unknown"},
        lambda index: {"extra": [1, {"a": "b"}]} if index >= 2000 else {"extra": 10**400},
    ],
)
def test_other_columns_do_not_matter(tmp_path: Path, others: Any) -> None:
    texts = [f"row {index} " * 300 for index in range(2500)]  # more than one chunk
    lines = (json.dumps({"text": text, **others(index)}) for index, text in enumerate(texts))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert read(tmp_path / "rows.jsonl") == texts


def test_csv_has_quotes_and_line_ends_in_its_fields(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b'\xef\xbb\xbfid,text\r\n1,"one ""quoted"",\r\nand more"\r\n\r\n2,\r\n3,last')
    assert read(tmp_path / "rows.csv") == ['one "quoted",\r\nand more', "", "last"]


def test_compressed_files_are_read_whatever_their_name(tmp_path: Path) -> None:
    for name in ("rows.jsonl.gz", "ROWS.JSONL.GZ", "rows.jsonl"):
        (tmp_path / name).write_bytes(gzip.compress(LINES.encode()))
        assert read(tmp_path / name) == ROWS
    (tmp_path / "rows.txt.gz").write_bytes(gzip.compress(b"one\r\ntwo\n"))
    assert read(tmp_path / "rows.txt.gz") == ["one", "two"]
    assert evaluation_windows(str(tmp_path / "rows.txt.gz"), tiny_tokenizer(), seq_len=2).num_rows == 1


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", LINES), ("a.json", json.dumps(ROWS)), ("a.txt", "one\ntwo")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.json") == ROWS
    assert read(tmp_path / "a.txt") == ["one", "two"]


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    one = datasets.Dataset.from_dict({"text": [*ROWS, None], "label": [0, 1, 2, 3, 4]})
    other = datasets.Dataset.from_dict({"text": ["to judge by"]})
    one.save_to_disk(tmp_path / "one[1]", num_shards=2)
    datasets.DatasetDict({"train": one, "test": other}).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"validation": other}).save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"a": one, "b": other}).save_to_disk(tmp_path / "unclear")
    assert read(tmp_path / "one[1]") == read(tmp_path / "both") == read(tmp_path / "both" / "train") == ROWS
    assert read(tmp_path / "both", train=False) == read(tmp_path / "single") == ["to judge by"]
    assert read(next((tmp_path / "one[1]").glob("*.arrow"))) == ROWS[:3]
    with pytest.raises(
        UserError, match=r"expected a split 'train' in .*, which has a, b; give the folder of one split"
    ):
        read(tmp_path / "unclear")


def test_a_folder_of_text_files_has_a_row_for_each_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.TXT"):
        (tmp_path / name).write_text(f"all of\n\n{name}")
    assert read(tmp_path) == ["all of\n\na.txt", "all of\n\nb.txt", "all of\n\nc.TXT"]
    (tmp_path / "notes.md").write_text("no row")
    assert "1 others are not read" in rows_of(str(tmp_path), "text", train=True).notes[0]


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets 4.0 has no such column")
def test_what_datasets_encodes_as_json_is_decoded(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Json()})
    datasets.Dataset.from_dict({"text": ["plain"]}, features=features).to_parquet(tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet")["text"].to_pylist() == ['"plain"']
    assert read(tmp_path / "rows.parquet") == ["plain"]


def test_tables_of_other_types_of_text_are_read(tmp_path: Path) -> None:
    for number, values in enumerate((pa.array(ROWS, pa.large_string()), pa.array(ROWS).dictionary_encode())):
        pq.write_table(pa.table({"text": values, "text.en": ["x"] * 4}), tmp_path / f"{number}.parquet")
        assert read(tmp_path / f"{number}.parquet") == ROWS
        assert read(tmp_path / f"{number}.parquet", "text.en") == ["x"] * 4


def chat_windows(path: Path, column: str, template: str | None = TEMPLATE, **options: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    text = Calibration.of(calibration=str(path), text_column=column, num_samples=3, seq_len=4, **options)
    return calibration_windows(text, tokenizer)


def test_conversations_go_through_the_chat_template_and_this_is_said(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": CONVERSATION, "conversations": [
        {"from": "human", "value": "the fox"}, {"from": "gpt", "value": "runs away"},
    ]}))  # fmt: skip
    windows = chat_windows(path, "messages")
    text = "[user: the fox][assistant: runs away]2024"  # no BOS of the template, and no date of today
    expected = tiny_tokenizer()(text)["input_ids"]
    assert windows.tokens.flatten().tolist() == expected[: windows.tokens.numel()]
    assert any("chat template was applied to the conversations in column 'messages'" in note for note in windows.notes)
    assert chat_windows(path, "conversations").fingerprint == windows.fingerprint


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (CONVERSATION, {"template": None}, "expected a tokenizer with a chat template"),
        (CONVERSATION, {"chat_template": "none"}, "got conversations; use `chat_template=auto`"),
        (CONVERSATION, {"template": "{{ raise_exception('no such role') }}"}, "does not take conversation 1 .*no such"),
        (CONVERSATION, {"template": "{% broken"}, "does not take conversation 1"),
        ([], {}, "lists of messages .*row 1"),
        (["text"], {}, "lists of messages .*row 1"),
        ([{"who": "me"}], {}, "got the keys 'who' in row 1"),
        ([{"from": "narrator", "value": "x"}], {}, "expected human, .*got 'narrator'"),
        ([{"role": 3, "content": "x"}], {}, "got other types in row 1"),
    ],
)
def test_conversations_that_cannot_be_used_are_refused(
    tmp_path: Path, value: Any, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"m": value}))
    with pytest.raises(UserError, match=message) as error:
        chat_windows(path, "m", **options)
    assert "\n" not in str(error.value)


REFUSED = {
    "utf16.jsonl": (LINES.encode("utf-16"), "got UTF-16; save it as UTF-8"),
    "utf16.txt": (LINES.encode("utf-16-be"), "got UTF-16 or no text"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer that Git LFS"),
    "table.jsonl": (b"PAR1....", "got a Parquet file"),
    "archive.jsonl": (b"PK\x03\x04....", "got a zip archive"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-5], "cannot read"),
    "nothing.jsonl": (b"\n \n", "which has no rows"),
    "nothing.csv": (b"text\n", "which has no rows"),
    "null.jsonl": (b'{"text": null}\n' * 3, "got null in all 3 rows"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}', "the column 'text' twice, in row 1"),
    "twice.csv": (b"text,text\na,b\n", "expected one column 'text'"),
    "short.csv": (b"text,id\na\n", "expected 2 fields in every row of .*, got 1 in line 2"),
    "open.csv": (b'text\n"a', "as CSV"),
    "mixed.jsonl": (b'{"text": "a"}\n{"text": 3}', r"got other values \(3.0 in row 2\)"),
    "bare.jsonl": (b'{"text": "a"}\n"b"', "expected objects in .*, got a text in row 2"),
    "half.jsonl": (b'{"text": "\\ud83d"}', "half of a character in row 1"),
    "deep.jsonl": (b'{"text": "a", "b": ' + b"[" * 10**5, "nested too deeply"),
    "after.json": (b'[{"text": "a"}] x', "something after the array"),
    "open.json": (b'[{"text": "a"}', "an array that does not end"),
    "data.json": (b'{"data": [{"text": "a"}]}', "column 'text' in .*, which has data; use `text_column`"),
    "broken.arrow": (b"ARROW1 nothing", "damaged, or no Arrow file"),
    "model.gguf": (b"GGUF", "builtin or a file ending in"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    (tmp_path / "folder.jsonl").mkdir()
    told = {"pipe.jsonl": "which is a pipe", "link.jsonl": "a link to 'nowhere'", "folder.jsonl": "a folder of .txt",
            "a\0b.jsonl": "null byte", f"{'long' * 100}.jsonl": "name too long"}  # fmt: skip
    for name, message in told.items():
        with pytest.raises(UserError, match=message):
            read(f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt", "rows.parquet", "rows.jsonl.gz"])
def test_a_long_row_is_refused_before_it_fills_the_memory(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("files", "records", "tables"):
        monkeypatch.setattr(f"blockpruner.engine.text.{module}.MAX_ROW", 2**20)
    text = "word " * 2**19
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": [text] * 3}), tmp_path / name)
    else:
        content = {"rows.csv": f"text\n{text}", "rows.txt": text}.get(name, json.dumps({"text": text})).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UserError, match=r"got a longer one in (row|line) [12] of"):
        read(tmp_path / name)


def test_a_small_file_with_much_in_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress((json.dumps({"text": "x"}) + " " * 2**20 + "\n").encode() * 8))
    monkeypatch.setattr(files, "MAX_BYTES", 2**22)
    with pytest.raises(UserError, match="after decompression"):
        read(bomb)
    rows = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": pa.nulls(10_000, pa.string())}), rows)
    monkeypatch.setattr(files, "MAX_ROWS", 5_000)
    with pytest.raises(UserError, match="at most 5,000 rows"):
        read(rows)


def test_a_name_and_another_spelling_of_it_are_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.txt").write_text("a")
    (tmp_path / "other.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to("rows.txt")
    monkeypatch.chdir(tmp_path)
    for name in ("rows.txt", "./rows.txt", "link.txt", str(tmp_path / "rows.txt")):
        assert files.is_same_text(name, "rows.txt")
        assert not files.is_same_text(name, "other.txt")
    assert files.is_same_text("builtin", "builtin")
    assert not files.is_same_text("builtin", "alpaca")
    assert not files.is_same_text("rows.txt", "alpaca")
    assert files.is_same_text("rows.txt", "of/another/folder.txt")  # the tokens have to tell


def test_rows_know_whether_they_are_conversations() -> None:
    assert not Rows("x", ["a"]).are_chat
    assert Rows("x", [CONVERSATION]).are_chat
