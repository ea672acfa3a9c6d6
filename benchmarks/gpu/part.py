"""A part of the benchmark: what it is given, and what it gives back. Each part runs in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

LINE = "part: "
"""Beginning of the line with which a part's process gives back what it found."""


@dataclass(frozen=True)
class Setting:
    model: str
    """See models.py."""
    large: str
    """Model of the timings that need no files."""
    dtype: str
    device: str
    """cuda, or cpu to try the benchmark itself."""
    seq_len: int
    folder: Path
    """Holds the model's files and the text; parts write their runs into it."""

    @property
    def dense(self) -> Path:
        return self.folder / "dense"

    @property
    def text(self) -> Path:
        return self.folder / "text.jsonl"


@dataclass(frozen=True)
class Promise:
    what: str
    promised: str
    seen: str
    is_kept: bool | None
    """None if it could not be tried."""


@dataclass
class Report:
    promises: list[Promise] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, promised: str, seen: str, *, is_kept: bool | None) -> None:
        self.promises.append(Promise(what, promised, seen, is_kept))


def run_part(name: str, setting: Setting, limit_s: float) -> tuple[Report, float]:
    """Run one part in its own process. A part that fails, or takes longer than its limit, has broken its promise."""
    start = time.perf_counter()
    given = json.dumps({**asdict(setting), "folder": str(setting.folder)})
    command = [sys.executable, "-m", "benchmarks.gpu.alone", name, given]
    with tempfile.TemporaryFile("w+", errors="replace") as said:  # a pipe would stay open while any process is left
        process = subprocess.Popen(command, stdout=said)
        try:
            code = process.wait(limit_s)
            failure = f"ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            failure = f"not at its end after {limit_s:.0f} s"
        finally:
            _end(process.pid)
            process.wait()
        said.seek(0)
        lines = [line for line in said if line.startswith(LINE)]
    failure = failure or ("" if lines else "ended without a word")
    report = Report()
    if lines:  # the last one has all that was found until then
        values = json.loads(lines[-1].removeprefix(LINE))
        report = Report([Promise(**one) for one in values["promises"]], values["figures"])
    if failure:
        report.add(name, "ends", failure, is_kept=False)
    return report, time.perf_counter() - start


def _end(pid: int) -> None:
    """End a process and all that it started: a replica that is left would keep its memory on the device."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                one.kill()


def tell(report: Report) -> None:
    """Give back what was found so far. The last call counts, so nothing is lost when a later step fails."""
    print(LINE + json.dumps(asdict(report)), flush=True)
