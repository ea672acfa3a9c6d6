"""`blockpruner times`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockpruner.cli.app import command
from blockpruner.showing.console import Reporter
from blockpruner.timing.times_config import TimesConfig


@command(
    "`blockpruner times smollm2 --prompt-len 512 --num-tokens 64 --out times.json`, then `blockpruner search smollm2 "
    "--times times.json --budget-ms 12 --per ms --out run`"
)
def times(
    reporter: Reporter,
    config: TimesConfig,
    out: Annotated[Path, typer.Option(help="File for the table.")],
) -> Any:
    """Measure what each kind of block costs in time on this device, for searches with a budget in milliseconds.

    A search without such a table measures one itself. Use this command to measure on another machine, or to compare
    the model that a search found with what was expected of it."""
    from blockpruner.timing.block_times import measure_times

    return measure_times(config, out, reporter)
