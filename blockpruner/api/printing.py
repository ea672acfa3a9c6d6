"""What a caller sees on the screen: nothing, unless `verbose` is set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from blockpruner.showing.console import Reporter
from blockpruner.showing.libraries import libraries_quiet


@contextmanager
def printing(verbose: bool) -> Iterator[Reporter]:
    """A reporter that prints if `verbose` is set. The libraries print nothing in either case."""
    with libraries_quiet():
        yield Reporter(Console(quiet=not verbose))
