"""`blockpruner report`."""

from __future__ import annotations

from typing import Any

from blockpruner.cli.app import command
from blockpruner.reporting.config import ReportConfig
from blockpruner.showing.console import Reporter


@command("`blockpruner report run`, or `blockpruner report greedy lazy --out both`")
def report(reporter: Reporter, config: ReportConfig) -> Any:
    """Draw the removal order, the perplexity along the search and more, as figures and one HTML page."""
    from blockpruner.reporting.writing import write_report

    return write_report(config, reporter)
