"""`blockpruner serve-check`."""

from __future__ import annotations

from typing import Any

from blockpruner.cli.app import command
from blockpruner.serving.config import ServeCheckConfig
from blockpruner.showing.console import Reporter


@command(
    "`blockpruner serve-check smollm2-deci --python vllm-env/bin/python`",
    name="serve-check",
    failed=lambda result: any(found["result"] in ("failed", "differs") for found in result["results"]),
)
def serve_check(reporter: Reporter, config: ServeCheckConfig) -> Any:
    """Generate from an export in each installed runtime, and compare with the pruned model."""
    from blockpruner.serving.serve_check import check_serving

    return check_serving(config, reporter)
