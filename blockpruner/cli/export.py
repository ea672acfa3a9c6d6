"""`blockpruner export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockpruner.cli.app import command
from blockpruner.exporting.config import ExportConfig
from blockpruner.showing.console import Reporter


@command(
    "`blockpruner export smollm2-pruned --out smollm2-deci`, or `blockpruner export smollm2-pruned --format gguf "
    "--base smollm2 --out smollm2-gguf`"
)
def export(
    reporter: Reporter,
    config: ExportConfig,
    out: Annotated[Path, typer.Option(help="New folder for the export.")],
) -> Any:
    """Export a pruned checkpoint in a format that a runtime can load, with a model card."""
    from blockpruner.exporting.exporting import export_model

    return export_model(config, out, reporter)
