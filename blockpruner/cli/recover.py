"""`blockpruner recover`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockpruner.cli.app import command
from blockpruner.recovering.config import RecoverConfig
from blockpruner.showing.console import Reporter


@command("`blockpruner recover smollm2-pruned --perplexity wikitext2 --out smollm2-recovered`", resumable=True)
def recover(
    reporter: Reporter,
    config: RecoverConfig,
    out: Annotated[
        Path, typer.Option(help="New folder for the recovered checkpoint. Run the same command again to resume.")
    ],
) -> Any:
    """Train a pruned checkpoint: LoRA adapters, which are merged, or its output projections."""
    from blockpruner.recovering.recovering import recover_model

    return recover_model(config, out, reporter)
