"""`blockpruner prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockpruner.cli.app import command
from blockpruner.pruning.config import PruneConfig
from blockpruner.showing.console import Reporter


@command(
    "`blockpruner prune smollm2 --run run --num-remove 8 --out smollm2-pruned`",
    resumable=lambda **given: bool(given.get("compensate")),
)
def prune(
    reporter: Reporter,
    config: PruneConfig,
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.")],
) -> Any:
    """Write a checkpoint without the blocks that a search removed."""
    if config.compensate:
        from blockpruner.compensating.pruned import prune_and_compensate

        return prune_and_compensate(config, out, reporter)
    from blockpruner.pruning.pruning import prune_model

    return prune_model(config, out, reporter)
