"""The answers of an evaluation, stored in a file so that an interrupted evaluation can resume."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import TypedDict

from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import misfit
from blockpruner.engine.judge.judging import Answered, EvaluationUnit
from blockpruner.engine.options import different
from blockpruner.files import lock_folder, plain
from blockpruner.searching.ledger import Ledger, damaged, parse_ledger

FILE = "answers.jsonl"


class _Line(TypedDict):
    unit: str
    answers: list[Any]
    cuts: list[Any]


class Answers:
    """Answers by unit. With a folder, they are stored in its answers.jsonl.

    The first line of the file contains everything that the answers depend on. Each unit then adds one line, which is
    flushed and synced as it arrives. The lines are chained (`searching/ledger.py`).
    """

    def __init__(self, folder: Path | None, header: dict[str, Any]) -> None:
        """header: the settings that must be equal for answers to be reused."""
        self._known: dict[str, dict[str, Any]] = {}
        self._ledger: Ledger | None = None
        self._lock = None if folder is None else lock_folder(folder)
        if folder is not None:
            try:
                self._open(folder, header)
            except BaseException:
                self._close()
                raise

    def _open(self, folder: Path, header: dict[str, Any]) -> None:
        try:
            self._ledger = ledger = Ledger(folder / FILE)
        except OSError as error:
            raise UserError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another `out`.") from error
        lines = ledger.lines
        if lines and (differences := different(lines[0], header)):
            raise UserError(
                f"{str(folder)!r} holds answers of another evaluation: {differences}; choose another `out`."
            )
        for number, line in enumerate(lines[1:], start=2):
            if wrong := misfit(line, _Line):
                raise damaged(folder / FILE, number, wrong)
        if not lines:
            ledger.append(header)
        self._known = {line["unit"]: line for line in lines[1:]}

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        with suppress(OSError):  # a full disk was already reported during the write
            if self._ledger is not None:
                self._ledger.close()
        if self._lock is not None:
            self._lock.release()

    def __contains__(self, unit: EvaluationUnit) -> bool:
        return _key(unit) in self._known

    def __getitem__(self, unit: EvaluationUnit) -> Answered:
        line = self._known[_key(unit)]
        answers = [math.nan if answer is None else answer for answer in line["answers"]]
        return Answered([tuple(a) if isinstance(a, list) else a for a in answers], line["cuts"])

    def add(self, unit: EvaluationUnit, answered: Answered) -> None:
        # Convert through JSON even without a file, so that a resumed evaluation sees the same values.
        line = json.loads(json.dumps({"unit": _key(unit), **plain(asdict(answered))}, allow_nan=False))
        if self._ledger is not None:
            self._ledger.append(line)
        self._known[line["unit"]] = line


def _key(unit: EvaluationUnit) -> str:
    asked = json.dumps([str(unit.mask), unit.kind, unit.requests], default=repr)
    return hashlib.sha256(asked.encode()).hexdigest()[:32]


def recorded_model(folder: Path | None) -> str | None:
    """Return the fingerprint of the model whose answers a folder holds, or None if it holds none."""
    file = None if folder is None else folder / FILE
    lines = parse_ledger(file)[0] if file is not None and file.exists() else []
    model = lines[0].get("model") if lines else None
    return model if isinstance(model, str) else None
