"""SLEB (arXiv 2402.09025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from blockpruner.comparing.searched import Searched
from blockpruner.engine.blocks import Granularity


class Sleb(Searched):
    name = "sleb"
    about = "greedy over whole layers by perplexity, keeping the first and the last (arXiv 2402.09025)"
    changes: ClassVar[Mapping[str, Any]] = {"blocks": Granularity.LAYER}
    keep_ends = True
