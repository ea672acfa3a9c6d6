"""The answers of an evaluation, in a file that an interrupted one goes on from."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from filelock import FileLock, Timeout

from cluster.run import parse_ledger
from engine.errors import UserError
from engine.evaluator import EvaluationUnit


class Answers:
    """By unit. With a folder, answers.jsonl there holds them: first what they depend on, then a line for each unit,
    flushed and synced as it comes."""

    def __init__(self, folder: Path | None, header: dict[str, Any]) -> None:
        """header: what must agree for answers to be used again."""
        self._known: dict[str, list[Any]] = {}
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._close.enter_context(FileLock(folder / ".lock").acquire(blocking=False))
            lines: list[dict[str, Any]] = []
            if path.exists():
                lines, num_bytes = parse_ledger(path)
                os.truncate(path, num_bytes)
            self._stream = self._close.enter_context(path.open("a", encoding="utf-8"))
        except Timeout:
            raise UserError(f"another process is at work in {str(folder)!r}; wait, or choose another --out.") from None
        except OSError as error:
            raise UserError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another --out.") from error
        if not lines:
            self._write(header)
        elif lines[0] != header:
            unlike = [
                f"{key} was {lines[0].get(key)!r}, now {header[key]!r}"
                for key in header
                if lines[0].get(key) != header[key]
            ]
            raise UserError(
                f"{str(folder)!r} holds answers of another evaluation: {'; '.join(unlike)}; choose another --out."
            )
        self._known = {line["unit"]: line["answers"] for line in lines[1:]}

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    def __contains__(self, unit: EvaluationUnit) -> bool:
        return _key(unit) in self._known

    def __getitem__(self, unit: EvaluationUnit) -> list[Any]:
        return self._known[_key(unit)]

    def add(self, unit: EvaluationUnit, answers: list[Any]) -> None:
        # Through JSON also without a file, so that a resumed evaluation sees the same values.
        line = json.loads(json.dumps({"unit": _key(unit), "answers": answers}))
        if self._stream is not None:
            self._write(line)
        self._known[line["unit"]] = line["answers"]

    def _write(self, line: dict[str, Any]) -> None:
        assert self._stream is not None
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _key(unit: EvaluationUnit) -> str:
    asked = json.dumps([str(unit.mask), unit.kind, unit.requests], default=repr)
    return hashlib.sha256(asked.encode()).hexdigest()[:32]
