"""`blockpruner compensate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockpruner.cli.app import command
from blockpruner.compensating.config import CompensateConfig
from blockpruner.showing.console import Reporter


@command("`blockpruner compensate smollm2-pruned --perplexity wikitext2 --out smollm2-compensated`", resumable=True)
def compensate(
    reporter: Reporter,
    config: CompensateConfig,
    out: Annotated[
        Path, typer.Option(help="New folder for the compensated checkpoint. Run the same command again to resume.")
    ],
) -> Any:
    """Fit the output projections of the blocks that remain, so that they make up for those that are gone."""
    from blockpruner.compensating.compensating import compensate_checkpoint

    return compensate_checkpoint(config, out, reporter)
