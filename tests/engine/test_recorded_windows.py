"""Windows that were made before the readers were rewritten keep their tokens: runs and comparisons resume by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from blockpruner.engine.calibration import calibration_windows, evaluation_windows
from blockpruner.engine.recovery.training import draw_rows
from blockpruner.engine.sections import Calibration
from tests.conftest import TEXT
from tests.processes import REPOSITORY

WORDS = TEXT.split()
TEXTS = [" ".join(WORDS[(index * step + step) % len(WORDS)] for index in range(14)) for step in range(1, 60)]
ODD: list[str | None] = [
    "", None, "a line\nand a line", "tabs\tand \"quotes\"", "Fähre 中文 😀", "form\x0cfeed", "\u2028 separated", "  ",
]  # fmt: skip
ROWS: list[str | None] = [*TEXTS, *ODD]
OTHERS = [{"label": index, "nested": {"a": [1, {"b": None}]}, "kind": "x"} for index in range(len(ROWS))]


def as_lines(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": row, **other}) + "\n" for row, other in zip(ROWS, OTHERS, strict=True)))


def as_lines_unescaped(path: Path) -> None:
    lines = (json.dumps({"text": row, "label": 1}, ensure_ascii=False) for row in ROWS)
    path.write_bytes("\r\n\n".join(lines).encode())


def as_array(path: Path) -> None:
    path.write_text(json.dumps([{"text": row, **other} for row, other in zip(ROWS, OTHERS, strict=True)]))


def as_indented_array(path: Path) -> None:
    path.write_text(json.dumps([{"text": row} for row in ROWS], indent=2))


def as_indented_objects(path: Path) -> None:
    path.write_text("\n".join(json.dumps({"text": row, "n": 1}, indent=1) for row in ROWS))


def as_strings(path: Path) -> None:
    path.write_text(json.dumps(ROWS))


def as_parquet(path: Path) -> None:
    pq.write_table(pa.table({"label": list(range(len(ROWS))), "text": ROWS}), path, row_group_size=10)


def as_large_strings(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(ROWS, pa.large_string())}), path, compression="gzip")


def as_text(path: Path) -> None:
    path.write_bytes("\r\n".join(row for row in ROWS if row is not None).encode())


KINDS: dict[str, Callable[[Path], None]] = {
    "lines.jsonl": as_lines,
    "lines.json": as_lines,
    "unescaped.jsonl": as_lines_unescaped,
    "array.json": as_array,
    "array.jsonl": as_array,
    "indented.json": as_indented_array,
    "objects.json": as_indented_objects,
    "strings.json": as_strings,
    "plain.parquet": as_parquet,
    "large.parquet": as_large_strings,
    "plain.txt": as_text,
    "plain.raw": as_text,
}

OF_ROWS = ("7cb778f25c43934e", 66, "5dedec5223fd2445", 66, "3b7f70054460bae3", 26)
OF_LINES = ("9a13e3e237882ca7", 66, "e5d54b43ed98f696", 1, "ab40cb4b4b0aac63", 29)
"""Fingerprints and numbers of rows: to calibrate on, to judge by, to train on."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(REPOSITORY / "tests" / "recorded" / "model")


def made(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int, str, int, str, int]:
    drawn = calibration_windows(
        Calibration(calibration=str(path), num_samples=66, seq_len=16, seed=7, num_windows=30), tokenizer
    )
    judged = evaluation_windows(str(path), tokenizer, seq_len=16)
    rows = draw_rows(str(path), tokenizer, num_rows=40, seq_len=12, seed=3)
    short = drawn.fingerprint[:16], judged.fingerprint[:16]
    return short[0], drawn.num_rows, short[1], judged.num_rows, rows.fingerprint, len(rows.rest)


@pytest.mark.parametrize("name", KINDS)
def test_a_text_gives_the_windows_that_it_always_gave(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    KINDS[name](tmp_path / name)
    assert made(tmp_path / name, tokenizer) == (OF_LINES if KINDS[name] is as_text else OF_ROWS)
