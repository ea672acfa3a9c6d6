"""`blockpruner plan`."""

from __future__ import annotations

from typing import Any

from blockpruner.cli.app import command
from blockpruner.planning.config import PlanConfig
from blockpruner.showing.console import Reporter


@command("`blockpruner plan llama-2-13b --gpus 2x24GB`, or `blockpruner plan smollm2`")
def plan(reporter: Reporter, config: PlanConfig) -> Any:
    """Show placement, memory and time of a search, using only the config of the model."""
    from blockpruner.planning.planning import plan_search

    return plan_search(config, reporter)
