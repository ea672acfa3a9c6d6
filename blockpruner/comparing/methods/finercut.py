"""FinerCut (arXiv 2405.18218)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from blockpruner.comparing.searched import Searched
from blockpruner.engine.metrics.js import Js


class FinerCut(Searched):
    name = "finercut"
    about = "greedy over MHA and MLP blocks by JS divergence from the dense model (arXiv 2405.18218)"
    changes: ClassVar[Mapping[str, Any]] = {"metric": Js()}
