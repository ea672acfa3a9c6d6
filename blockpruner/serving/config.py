"""The options of a check of an export."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from blockpruner.engine.options import Options
from blockpruner.engine.sections import Dtype


class ServeCheckConfig(Options):
    folder: Path
    """Folder written by export, prune or recover. Code in it will run."""
    python: tuple[Path, ...] = ()
    """Python interpreter of another environment to search for runtimes. May be repeated."""
    pruned: Path | None = None
    """Checkpoint that was exported. Default: the one recorded in the export."""
    num_tokens: int = Field(default=24, ge=1)
    """Tokens to generate for each prompt."""
    dtype: Dtype = Dtype.AUTO
    """Data type for computation, if the runtime supports a choice. auto: float32."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads. Default: all."""
    trust_remote_code: bool = False
    """Allow code that comes with the model to run."""
