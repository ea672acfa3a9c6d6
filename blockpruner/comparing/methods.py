"""The methods that can be compared, and how each is run.

All search or rank on the same calibration windows. What the published code of those by masks' scores does instead:

- SLEB scores by the sum of the tokens' NLLs, which orders windows of one length as the mean does.
- Shortened-LLaMA scores 10 samples of 128 tokens. Its "+" forms, which keep the first four and the last two layers, are
  not here: they rank by other statistics.
- FinerCut takes 10 samples of 256 tokens of WikiText-2 in float32. Its option that keeps the first layers out at the
  beginning is not here. What its divergence is: `engine/loss.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blockpruner.engine.blocks import Granularity
from blockpruner.engine.errors import UserError
from blockpruner.engine.methods.ranking import Statistic
from blockpruner.engine.metrics.metric import Metric


@dataclass(frozen=True)
class Searched:
    """By scores of masks, as `blockpruner search` does."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `SearchConfig`."""
    stepwise: bool = True
    """Whether it goes one removal after the other, so that `--strategy lazy` can make it cheaper."""
    keep_ends: bool = False
    """Whether the first and the last layer stay."""


@dataclass(frozen=True)
class Ranked:
    """By a statistic of the streams."""

    statistic: Statistic
    blocks: Granularity
    again: bool = False
    """Whether it is measured anew after each removal."""


@dataclass(frozen=True)
class Rebuilt:
    """The model that is left has other weights; each ratio is a run of its own."""


@dataclass(frozen=True)
class Method:
    how: Searched | Ranked | Rebuilt
    about: str
    """For people: what it is, and where it is from."""


LAYER = Granularity.LAYER
METHODS = {
    "blockpruner": Method(Searched(), "greedy over MHA and MLP blocks by perplexity (arXiv 2406.10594)"),
    "per-params": Method(
        Searched({"per": "params"}), "the same, but a removal's harm is judged per parameter that goes with it"
    ),
    "one-shot": Method(
        Searched({"strategy": "one-shot"}, stepwise=False), "its ablation without search: each block scored once"
    ),
    "layer": Method(Searched({"blocks": LAYER}), "its ablation without blocks: greedy over whole layers"),
    "sleb": Method(
        Searched({"blocks": LAYER}, keep_ends=True), "as layer, but the first and last stay (arXiv 2402.09025)"
    ),
    "shortened-llama": Method(
        Searched({"blocks": LAYER, "strategy": "one-shot"}, stepwise=False),
        "each layer scored once by perplexity (arXiv 2402.02834)",
    ),
    "finercut": Method(
        Searched({"metric": Metric.JS}), "greedy over blocks by JS divergence from the dense model (arXiv 2405.18218)"
    ),
    "shortgpt": Method(Ranked(Statistic.BI, LAYER), "whole layers by block influence (arXiv 2403.03853)"),
    "rm": Method(Ranked(Statistic.RM, LAYER), "whole layers by relative magnitude"),
    "bi-blocks": Method(Ranked(Statistic.BI, Granularity.MIX), "MHA and MLP blocks by block influence"),
    "rm-blocks": Method(Ranked(Statistic.RM, Granularity.MIX), "MHA and MLP blocks by relative magnitude"),
    "bi-blocks-again": Method(
        Ranked(Statistic.BI, Granularity.MIX, again=True), "as bi-blocks, measured anew after each removal"
    ),
    "rm-blocks-again": Method(
        Ranked(Statistic.RM, Granularity.MIX, again=True), "as rm-blocks, measured anew after each removal"
    ),
    "laco": Method(Rebuilt(), "layers merged into the one before them by its paper's formula (arXiv 2402.11187)"),
    "laco-code": Method(Rebuilt(), "the same loop, merging as its published code does"),
    "slicegpt": Method(Rebuilt(), "rotated, and the hidden size cut (arXiv 2401.15024)"),
}


def method(name: str) -> Method:
    if name not in METHODS:
        raise UserError(f"expected --methods out of {', '.join(METHODS)}, got {name!r}.")
    return METHODS[name]
