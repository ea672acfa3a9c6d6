"""`blockpruner sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockpruner.cli.app import command
from blockpruner.sampling.config import SampleConfig
from blockpruner.showing.console import Reporter


@command("`blockpruner sample smollm2 --start '<|endoftext|>' --num-rows 96 --out own.jsonl`")
def sample(
    reporter: Reporter,
    config: SampleConfig,
    out: Annotated[Path, typer.Option(help="New .jsonl file.")],
) -> Any:
    """Let the model write calibration text: more kinds of text where you have only one."""
    from blockpruner.sampling.sampling import sample_text

    return sample_text(config, out, reporter)
