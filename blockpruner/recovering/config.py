"""The options of a recovery."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from blockpruner.engine.recovery.config import RecoveryConfig
from blockpruner.engine.sections import Bos, ChatTemplate, Precision, Texts


class RecoverConfig(Precision, RecoveryConfig):
    folder: Path
    """Checkpoint written by prune."""
    data: Texts = Field(default=("alpaca",), min_length=1)
    """Training data: alpaca, wikitext2, builtin, a file or a folder, as for search. May be repeated: each text then
    gives the same share of the rows."""
    text_column: str = "text"
    """Column that contains the texts, or the conversations, in a file or folder with columns."""
    chat_template: ChatTemplate = ChatTemplate.AUTO
    """What to do with a column of conversations. auto: apply the chat template of the tokenizer; none: refuse it."""
    bos: Bos = Bos.AUTO
    """Where BOS tokens stand. every-window: at the head of each row and of each window of `perplexity`; first-window:
    where the tokenizer by itself adds them, before each row and before the text of `perplexity`; none: nowhere. auto:
    every-window for Gemma, else first-window."""
    num_rows: int = Field(default=8000, ge=1)
    """Number of rows to draw from the data for training, in all. The other rows are held out."""
    perplexity: tuple[str, ...] = ()
    """Text to measure the recovery on: rest (the held-out rows), wikitext2 (its test split), builtin, a file or a
    folder. May be repeated."""
    num_windows: int | None = Field(default=None, ge=1)
    """Use only the first N windows of `perplexity`."""
    gpus: int = Field(default=1, ge=1)
    """Number of GPUs of this machine to use. Each holds a copy of the model."""
    trust_remote_code: bool = False
    """Allow code that comes with the model to run."""
