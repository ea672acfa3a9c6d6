"""The options of sampling."""

from __future__ import annotations

from pydantic import Field

from blockpruner.engine.sections import Model, Precision


class SampleConfig(Precision, Model):
    num_rows: int = Field(default=96, ge=1)
    """Number of texts."""
    num_tokens: int = Field(default=256, ge=2)
    """Tokens in each text. After the end of a document the model begins the next one."""
    start: str | None = None
    """Token that every text begins with. Default: BOS, or EOS if there is none."""
    batch_size: int = Field(default=16, ge=1)
    """Number of texts that are written at once."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the draws. The same seed gives the same texts on the same device with the same batch size."""
