"""Rows of text by name: the sets of the official code, and any file or folder."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.text.chat import Conversation, as_conversation
from blockpruner.engine.text.files import NAMES, check_file, lines, open_text, status, unreadable
from blockpruner.engine.text.records import csv_column, json_column
from blockpruner.engine.text.tables import SPLITS, STATE, arrow_column, parquet_column, saved_column

PLAIN = (".txt", ".raw")
"""Files of plain text, whose lines are the rows."""
COLUMNS = {
    ".jsonl": json_column, ".json": json_column, ".csv": csv_column, ".parquet": parquet_column, ".arrow": arrow_column
}  # fmt: skip
"""Readers of one column, by the end of a file's name."""
GZIP = (".jsonl", ".json", ".csv", *PLAIN)
"""Files that may be compressed."""
FILE_TYPES = (*COLUMNS, *PLAIN)
SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of characters, which JSON can write and UTF-8 cannot."""


@dataclass(frozen=True)
class Rows:
    source: str
    """What the user gave."""
    values: Sequence[str] | Sequence[Conversation]
    column: str | None = None
    """Column that holds the rows."""
    notes: tuple[str, ...] = ()

    @property
    def are_chat(self) -> bool:
        return bool(self.values) and not isinstance(self.values[0], str)

    def __len__(self) -> int:
        return len(self.values)

    def draw(self, number: int, seed: int) -> list[int]:
        """Return the indices of `number` rows, or of all if there are fewer, drawn as in the official code."""
        return random.Random(seed).sample(range(len(self)), min(number, len(self)))


def rows_of(source: str, text_column: str, *, train: bool) -> Rows:
    """Return the rows of a named set, a file or a folder. `train` selects the split that calibration may use.

    Raises UserError if they are missing, damaged or too large, or are neither texts nor conversations.
    """
    if source == "builtin":
        from pydoc_data.topics import topics  # the language reference shipped with every Python

        return Rows(source, list(topics.values()))
    if source == "alpaca":
        return Rows(source, _official_alpaca_test())
    if source == "wikitext2":
        split = "train" if train else "test"
        return Rows(source, _hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split)["text"])
    found = status(source)
    if found is not None and S_ISDIR(found.st_mode):
        return _folder_rows(source, text_column, train=train)
    return _file_rows(source, text_column)


def training_rows_of(source: str, text_column: str) -> Rows:
    """Return the rows to train on: for `alpaca` the official code's training split (80 %), otherwise the rows that
    calibration draws from."""
    if source == "alpaca":
        return Rows(source, _alpaca_parts()["train"]["text"])
    return rows_of(source, text_column, train=True)


def plain_text(source: str) -> str | None:
    """Return the content of a file of plain text, or None for anything else."""
    found = status(source)
    if file_type(source) not in PLAIN or (found is not None and S_ISDIR(found.st_mode)):
        return None
    return _read_text(source)


def file_type(source: str) -> str:
    """Return the end of a file's name in lower case, without .gz if the file may be compressed."""
    path = Path(source.lower())
    return Path(path.stem).suffix if path.suffix == ".gz" and Path(path.stem).suffix in GZIP else path.suffix


def check_texts(sources: Iterable[str]) -> None:
    """Raise UserError if one is no named set, and no file or folder that is there. Costs nothing, so call it before
    what is slow."""
    for source in sources:
        found = None if source in NAMES else status(source)
        if source not in NAMES and not (found is not None and S_ISDIR(found.st_mode)):
            _kind(source)
            check_file(source)


def _kind(source: str) -> str:
    kind = file_type(source)
    if kind not in FILE_TYPES:
        raise UserError(
            f"expected alpaca, wikitext2, builtin or a file ending in {', '.join(FILE_TYPES)} (or "
            f"{', '.join(f'{each}.gz' for each in GZIP)}), or a folder, got {source!r}."
        )
    return kind


def _file_rows(source: str, column: str) -> Rows:
    kind = _kind(source)
    if kind in PLAIN:
        return Rows(source, _read_text(source).splitlines())
    return _checked(COLUMNS[kind](check_file(source), source, column), source, column)


def _folder_rows(source: str, column: str, *, train: bool) -> Rows:
    """Read a folder of `save_to_disk`, or a folder of .txt files: one row a file, in the order of their names."""
    folder = Path(source)
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(source, error) from error
    if STATE in names or SPLITS in names:
        return _checked(saved_column(folder, source, column, train=train), source, column)
    texts = [name for name in names if file_type(name) == ".txt" and not name.startswith(".")]
    if not texts:
        raise UserError(
            f"expected a folder of .txt files or of `save_to_disk`, got {source!r}, which is neither; give one of its "
            f"files."
        )
    rows = [_read_text(str(folder / name)) for name in texts]
    others = [name for name in names if name not in texts and not name.startswith(".")]
    note = (f"{source!r} holds {len(texts)} .txt files; {len(others)} others are not read",) if others else ()
    return Rows(source, rows, notes=note)


def _read_text(source: str) -> str:
    with open_text(check_file(source), source) as text:
        return "".join(lines(text, source))


def _checked(values: list[Any], source: str, column: str) -> Rows:
    """Return the rows that are not null. Raises UserError unless all of them are texts, or all are conversations."""
    where = f"column {column!r} of {source!r}"
    if not values:
        raise UserError(f"expected texts in {source!r}, which has no rows.")
    first = next((value for value in values if value is not None), None)
    if first is None:
        raise UserError(f"expected texts in {where}, got null in all {len(values)} rows.")
    numbered = ((number, value) for number, value in enumerate(values, start=1) if value is not None)
    if isinstance(first, list):
        return Rows(source, [as_conversation(value, where, number) for number, value in numbered], column)
    for number, value in numbered:
        if not isinstance(value, str):
            raise UserError(f"expected texts in {where}, got other values ({_shown(value)} in row {number}).")
        if not value.isascii() and SURROGATES.search(value):
            raise UserError(f"expected texts in {where}, got half of a character in row {number}.")
    return Rows(source, [value for value in values if value is not None], column)


def _shown(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"


def _official_alpaca_test() -> Sequence[str]:
    """The official code's 10 % test split: the first half of a held-out fifth (both splits use seed 42)."""
    return _alpaca_parts()["test"].train_test_split(test_size=0.5, seed=42)["train"]["text"]


def _alpaca_parts() -> datasets.DatasetDict:
    return _hub_rows("tatsu-lab/alpaca", None, "train").train_test_split(test_size=0.2, seed=42)


def _hub_rows(path: str, name: str | None, split: str) -> datasets.Dataset:
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, DatasetsError, httpx.HTTPError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise UserError(
            f"cannot read {path!r} from the hub ({first_line(cause)}); give a local file or 'builtin' instead."
        ) from error
    if "text" not in found.column_names:
        raise UserError(
            f"expected a column 'text' in {path!r} on the hub, got {', '.join(found.column_names)}, so it has changed; "
            f"give a local file or 'builtin' instead."
        )
    return found
