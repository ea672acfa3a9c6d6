"""Cache folder for converted models and modelling files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return $BLOCKPRUNER_CACHE if it is set, else `blockpruner` in the user's cache folder."""
    if own := os.environ.get("BLOCKPRUNER_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "blockpruner"
