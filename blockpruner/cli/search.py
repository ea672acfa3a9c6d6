"""`blockpruner search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockpruner.cli.app import command
from blockpruner.searching.config import SearchConfig
from blockpruner.showing.console import Reporter


@command(
    "`blockpruner search smollm2 --calibration builtin --num-remove 8 --seq-len 256 --out run`, or "
    "`blockpruner search smollm2 --calibration builtin --seq-len 64 --num-windows 32 --ratio 0.2 --strategy lazy "
    "--audit 2 --out lazy`, or `blockpruner search smollm2 --budget-ms 30 --for decode --context 512 --per ms "
    "--out fast`",
    resumable=True,
)
def search(
    reporter: Reporter,
    config: SearchConfig,
    out: Annotated[Path, typer.Option(help="Run directory. Run the same command again to resume.")],
) -> Any:
    """Find the order in which blocks can be removed."""
    from blockpruner.searching.driver import run_search

    return run_search(config, out, reporter)
