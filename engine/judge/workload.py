"""Options for the generation that is timed."""

from __future__ import annotations

from pydantic import Field

from blockpruner.engine.options import Options

REPEATS = 5
"""Number of measured generations of each model, after one warm-up, unless the user says otherwise."""


class Workload(Options):
    """What to generate"""

    prompt_len: int = Field(default=512, ge=1)
    """Number of tokens in a prompt. They are random, and the same for all models with the same vocabulary size."""
    num_tokens: int = Field(default=128, ge=2)
    """Number of tokens to generate greedily after each prompt. An end-of-text token does not stop generation."""
    batch_size: int = Field(default=1, ge=1)
    """Number of prompts in one batch."""
    static_cache: bool = False
    """Use a KV cache of fixed size. On a GPU, transformers then compiles the decoding step into CUDA graphs."""

    @property
    def generate_s(self) -> str:
        """Key of the total time of a generation."""
        return f"generate_{self.num_tokens}_s"
