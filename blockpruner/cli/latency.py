"""`blockpruner latency`."""

from __future__ import annotations

from typing import Any

from blockpruner.cli.app import command
from blockpruner.showing.console import Reporter
from blockpruner.timing.config import LatencyConfig


@command("`blockpruner latency smollm2-pruned --repeats 20`")
def latency(reporter: Reporter, config: LatencyConfig) -> Any:
    """Measure the generation speed and the memory of a model. A pruned model is compared with its dense model."""
    from blockpruner.timing.timing import measure_latency

    return measure_latency(config, reporter)
