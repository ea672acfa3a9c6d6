"""`blockpruner evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockpruner.cli.app import command
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.showing.console import Reporter


@command(
    "`blockpruner evaluate smollm2-pruned --tasks paper --perplexity wikitext2`, or, without writing a checkpoint, "
    "`blockpruner evaluate smollm2 --run run --num-remove 0,4,8 --perplexity wikitext2`",
    resumable=lambda **given: given.get("out") is not None,
)
def evaluate(
    reporter: Reporter,
    config: EvaluationConfig,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results. Run the same command again to resume."),
    ] = None,
) -> Any:
    """Measure task scores and perplexity of a model or a pruned checkpoint."""
    from blockpruner.evaluating.evaluating import evaluate_model

    return evaluate_model(config, reporter, out=out)
