"""The answers of an evaluation, stored in a file so that an interrupted evaluation can resume."""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.judging import Answered, EvaluationUnit
from blockpruner.engine.options import different
from blockpruner.files import lock_folder, plain
from blockpruner.searching.ledger import append_line, parse_ledger


class Answers:
    """Answers by unit. With a folder, they are stored in its answers.jsonl.

    The first line of the file contains everything that the answers depend on. Each unit then adds one line, which is
    flushed and synced as it arrives.
    """

    def __init__(self, folder: Path | None, header: dict[str, Any]) -> None:
        """header: the settings that must be equal for answers to be reused."""
        self._known: dict[str, dict[str, Any]] = {}
        self._close = ExitStack()
        self._stream: TextIO | None = None
        if folder is not None:
            try:
                self._open(folder, header)
            except BaseException:
                self._close.close()
                raise

    def _open(self, folder: Path, header: dict[str, Any]) -> None:
        path = folder / "answers.jsonl"
        self._close.enter_context(lock_folder(folder))
        lines, num_bytes = parse_ledger(path) if path.exists() else ([], 0)
        if lines and (differences := different(lines[0], header)):
            raise UserError(
                f"{str(folder)!r} holds answers of another evaluation: {differences}; choose another `out`."
            )
        try:
            path.touch()
            os.truncate(path, num_bytes)
            self._stream = self._close.enter_context(path.open("a", encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another `out`.") from error
        if not lines:
            append_line(self._stream, header)
        self._known = {line["unit"]: line for line in lines[1:]}

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk was already reported during the write
            self._close.close()

    def __contains__(self, unit: EvaluationUnit) -> bool:
        return _key(unit) in self._known

    def __getitem__(self, unit: EvaluationUnit) -> Answered:
        line = self._known[_key(unit)]
        answers = [math.nan if answer is None else answer for answer in line["answers"]]
        return Answered([tuple(a) if isinstance(a, list) else a for a in answers], line["cuts"])

    def add(self, unit: EvaluationUnit, answered: Answered) -> None:
        # Convert through JSON even without a file, so that a resumed evaluation sees the same values.
        line = json.loads(json.dumps({"unit": _key(unit), **plain(asdict(answered))}, allow_nan=False))
        if self._stream is not None:
            append_line(self._stream, line)
        self._known[line["unit"]] = line


def _key(unit: EvaluationUnit) -> str:
    asked = json.dumps([str(unit.mask), unit.kind, unit.requests], default=repr)
    return hashlib.sha256(asked.encode()).hexdigest()[:32]
