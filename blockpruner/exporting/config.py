"""The options of an export."""

from __future__ import annotations

from pathlib import Path

from blockpruner.engine.checkpoint.format import Format
from blockpruner.engine.checkpoint.formats.auto import Auto
from blockpruner.engine.options import Options


class ExportConfig(Options):
    folder: Path
    """Checkpoint written by prune or recover."""
    format: Format = Auto()
    """Format to write."""
    evaluation: tuple[Path, ...] = ()
    """Output file of `evaluate --json` to include in the model card. May be repeated."""
    trust_remote_code: bool = False
    """Allow code that comes with the model to run."""
