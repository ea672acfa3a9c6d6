"""Read one column of a file of records: JSON and CSV. Whatever stands in the other columns does not matter."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from blockpruner.engine.errors import UserError
from blockpruner.engine.text.files import MAX_ROW, check_number, lines, open_text, too_long

CHUNK = 2**20
SPACE = re.compile(r"[ \t\n\r]*")
SLACK = 16
"""A value that is cut off raises an error at most this many characters before the end."""
SHOWN = 20
"""Number of columns to show in a message."""


def json_column(path: Path, source: str, column: str) -> list[Any]:
    """Return the values of a column: of objects one after the other (as in JSON Lines), or of an array of objects. In
    an array, texts stand for objects with only the column `text`. A value that is missing is None."""
    found: list[Any] = []
    columns: dict[str, None] = {}
    with open_text(path, source) as text:
        for number, row in enumerate(_rows(text, source, column), start=1):
            if not isinstance(row, dict):
                raise UserError(f"expected objects in {source!r}, got {_kind(row)} in row {number}.")
            check_number(number, source)
            columns |= dict.fromkeys(row)
            found.append(row.get(column))
    if not found:
        raise UserError(f"expected texts in {source!r}, which has no rows.")
    check_column(columns, column, source)
    return found


def csv_column(path: Path, source: str, column: str) -> list[Any]:
    """Return the values of a column of a CSV file, whose first row holds the names of the columns."""
    found: list[Any] = []
    before = csv.field_size_limit(MAX_ROW)
    try:
        with open_text(path, source, newline="") as text:
            rows = csv.reader(lines(text, source), strict=True)
            header = next(rows, [])
            check_column(dict.fromkeys(header), column, source)
            if header.count(column) > 1:
                raise UserError(f"expected one column {column!r} in {source!r}, got {header.count(column)}.")
            place = header.index(column)
            for row in rows:
                if row and len(row) != len(header):
                    raise UserError(
                        f"expected {len(header)} fields in every row of {source!r}, got {len(row)} in line "
                        f"{rows.line_num}."
                    )
                found += row[place : place + 1]
    except csv.Error as error:
        raise UserError(f"cannot read {source!r} as CSV: {error}, in line {rows.line_num}.") from error
    finally:
        csv.field_size_limit(before)
    if not found:
        raise UserError(f"expected texts in {source!r}, which has no rows.")
    return found


def check_column(columns: Mapping[str, object], column: str, source: str) -> None:
    """Raise UserError if the column is not among those of the file."""
    if column not in columns:
        shown = ", ".join(map(_one_line, list(columns)[:SHOWN])) or "none"
        more = ", …" if len(columns) > SHOWN else ""
        raise UserError(f"expected a column {column!r} in {source!r}, which has {shown}{more}; use `text_column`.")


def _one_line(name: str) -> str:
    return (name if name.isprintable() else repr(name))[:80]


def _rows(text: TextIO, source: str, column: str) -> Iterator[Any]:
    """Yield the values of an array, or values one after the other, without holding more than one in memory."""
    reader = _Reader(text, source, column)
    if not reader.take("["):
        while not reader.at_end():
            yield reader.value()
        return
    if not reader.take("]"):
        while True:
            value = reader.value()
            yield {"text": value} if value is None or isinstance(value, str) else value
            if not reader.take(","):
                break
        if not reader.take("]"):
            raise reader.error("an array that does not end")
    if not reader.at_end():
        raise reader.error("something after the array")


class _Reader:
    """Decodes JSON values from a stream, one at a time."""

    def __init__(self, text: TextIO, source: str, column: str) -> None:
        self._text, self._source, self._column = text, source, column
        self._buffer, self._at, self._number = "", 0, 1
        # The value of a number does not matter, and Python refuses to read a whole number of thousands of digits.
        self._decoder = json.JSONDecoder(parse_int=float, object_pairs_hook=self._object)

    def value(self) -> Any:
        """Decode the next value."""
        while True:
            self._skip_space()
            try:
                found, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                is_cut_off = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - SLACK
                if is_cut_off and len(self._buffer) - self._at > MAX_ROW:
                    raise too_long(self._source, f"row {self._number}") from error
                if not is_cut_off or not self._read():
                    raise self.error(error.msg) from error
            except RecursionError as error:
                raise self.error("values that are nested too deeply") from error
            else:
                if end - self._at > MAX_ROW:
                    raise too_long(self._source, f"row {self._number}")
                self._at, self._number = end, self._number + 1
                return found

    def take(self, character: str) -> bool:
        """Go past a character, if it comes next."""
        is_next = not self.at_end() and self._buffer[self._at] == character
        self._at += is_next
        return is_next

    def at_end(self) -> bool:
        self._skip_space()
        return self._at == len(self._buffer)

    def error(self, what: str) -> UserError:
        return UserError(f"cannot read {self._source!r} as JSON: {what}, in row {self._number}.")

    def _skip_space(self) -> None:
        while True:
            found = SPACE.match(self._buffer, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._buffer) or not self._read():
                return

    def _read(self) -> bool:
        """Read more, at least as much as there is of the value, so that long values are not tried too often."""
        rest = self._buffer[self._at :]
        more = self._text.read(max(CHUNK, len(rest)))
        self._buffer, self._at = rest + more, 0
        return bool(more)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and sum(name == self._column for name, _ in pairs) > 1:
            raise self.error(f"the column {self._column!r} twice")
        return found


def _kind(value: Any) -> str:
    names = {str: "a text", list: "an array", bool: "true or false", float: "a number", type(None): "null"}
    return names[type(value)]
