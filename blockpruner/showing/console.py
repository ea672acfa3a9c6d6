"""Progress output: bars with an ETA on a terminal, and lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_S = 60.0
"""Without a terminal, a progress line is printed after at most this many seconds."""


class Reporter:
    """Prints to the console. Work is counted in FLOPs, so the ETA does not depend on the size of units."""

    def __init__(self, console: Console, translate: Callable[[str], str] = str) -> None:
        """translate: function applied to each message, for example to replace field names by command-line options."""
        self.console = console
        self.translate = translate
        self._progress: Progress | None = None
        self._done = 0.0
        self._total = 0.0
        self._start = self._said = time.monotonic()
        self._description = ""

    def say(self, text: str) -> None:
        self._said = time.monotonic()
        self.console.print(self.translate(text), markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, description: str, total: float) -> Iterator[None]:
        """Show progress towards `total`, in the same unit as `advance`."""
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
        """Update the expected total."""
        self._total = total
        self._description = description or self._description
        if self._progress is not None:
            self._progress.update(self._task, total=total, description=description)

    @property
    def eta(self) -> str:
        """Remaining time at the average speed so far, as h:mm:ss."""
        if not self._done:
            return "unknown"
        left = (time.monotonic() - self._start) * max(0.0, self._total / self._done - 1)
        minutes, seconds = divmod(round(left), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
