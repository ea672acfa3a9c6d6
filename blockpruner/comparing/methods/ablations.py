"""The ablations of BlockPruner's paper (section 5.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from blockpruner.comparing.searched import Searched
from blockpruner.engine.blocks import Granularity
from blockpruner.engine.strategies.one_shot import OneShot


class WithoutSearch(Searched):
    name = "one-shot"
    about = "blockpruner without its search: scores each block once"
    changes: ClassVar[Mapping[str, Any]] = {"strategy": OneShot()}


class WithoutBlocks(Searched):
    name = "layer"
    about = "blockpruner without its blocks: greedy over whole layers"
    changes: ClassVar[Mapping[str, Any]] = {"blocks": Granularity.LAYER}
