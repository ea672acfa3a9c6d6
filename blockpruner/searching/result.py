"""What a search found, for callers in Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.metrics.metric import Metric
from blockpruner.searching.content import RunSummary, StepSummary
from blockpruner.searching.steps import block_of


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    summary: RunSummary
    """The content of run.json."""
    out: Path | None = None
    """The run directory, if it was kept."""
    channels: ChannelOrder | None = field(default=None, repr=False)
    """The order of the channels, if groups of them were removed."""

    @property
    def steps(self) -> list[StepSummary]:
        return self.summary["steps"]

    @property
    def order(self) -> list[Block]:
        """The blocks in the order of their removal."""
        return [block_of(step) for step in self.steps]

    @property
    def mask(self) -> Mask:
        """All removed blocks."""
        return Mask.of(self.order)

    @property
    def dense_perplexity(self) -> float | None:
        """Of the model as it is, on the calibration text."""
        dense = self.summary["dense"]
        return None if dense is None else dense["perplexity"]

    @property
    def perplexity(self) -> float | None:
        """After the last removal, on the calibration text; None where another metric was used."""
        return self.steps[-1]["perplexity"]

    def frame(self) -> pandas.DataFrame:
        """One row a step: step, block, nll, perplexity (or the metric that was used), ratio, and ms with times."""
        columns = dict.fromkeys(["nll", "perplexity", *(metric.key for metric in Metric.all().values())])
        known = [name for name in columns if any(step.get(name) is not None for step in self.steps)]
        rows = [
            {
                "step": step["step"],
                "block": str(block_of(step)),
                **{name: step.get(name) for name in known},
                "ratio": step["ratio"],
                **({"ms": step["ms"]} if "ms" in step else {}),
            }
            for step in self.steps
        ]
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        blocks = ", ".join(map(str, self.order))
        return f"SearchResult({len(self.order)} removed: {blocks}; ratio {self.steps[-1]['ratio']:.4f})"
