"""BlockPruner with the harm of a removal divided by the number of removed parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from blockpruner.comparing.searched import Searched
from blockpruner.engine.search.budget import Per


class PerParams(Searched):
    name = "per-params"
    about = "like blockpruner, but compares the harm of a removal per removed parameter"
    changes: ClassVar[Mapping[str, Any]] = {"per": Per.PARAMS}
