"""What a person sees while it runs: bars with an ETA on a terminal, one line a step elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """No warnings and progress bars of libraries between ours."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


LINE_S = 60.0
"""Where there is no terminal, at least so often a line says how far it is."""


class Reporter:
    """Speaks to the console. Work is counted in FLOPs, so the ETA does not depend on how units are cut."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._done = 0.0
        self._total = 0.0
        self._start = self._said = time.monotonic()
        self._description = ""

    def say(self, text: str) -> None:
        self._said = time.monotonic()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, description: str, total: float) -> Iterator[None]:
        """Progress towards `total` (in whatever unit `advance` is given)."""
        self._done, self._total, self._start = 0.0, total, time.monotonic()
        self._description, self._said = description, self._start
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as self._progress:
            self._task = self._progress.add_task(description, total=total)
            try:
                yield
            finally:
                self._progress = None

    @property
    def done(self) -> float:
        return self._done

    def advance(self, amount: float) -> None:
        self._done += amount
        if self._progress is not None:
            self._progress.update(self._task, advance=amount)
        elif time.monotonic() - self._said > LINE_S and self._total:
            self.say(f"{self._description}: {self._done / self._total:.0%}, ETA {self.eta}")

    def expect(self, total: float, description: str | None = None) -> None:
        """Correct the expected total."""
        self._total = total
        self._description = description or self._description
        if self._progress is not None:
            self._progress.update(self._task, total=total, description=description)

    @property
    def eta(self) -> str:
        """Time left at the speed seen so far, as h:mm:ss."""
        if not self._done:
            return "unknown"
        left = (time.monotonic() - self._start) * max(0.0, self._total / self._done - 1)
        minutes, seconds = divmod(round(left), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
