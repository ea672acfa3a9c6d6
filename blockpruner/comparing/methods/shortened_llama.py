"""Shortened-LLaMA by perplexity (arXiv 2402.02834)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from blockpruner.comparing.searched import Searched
from blockpruner.engine.blocks import Granularity
from blockpruner.engine.strategies.one_shot import OneShot


class ShortenedLlama(Searched):
    name = "shortened-llama"
    about = "scores each layer once by perplexity (arXiv 2402.02834)"
    changes: ClassVar[Mapping[str, Any]] = {"blocks": Granularity.LAYER, "strategy": OneShot()}
