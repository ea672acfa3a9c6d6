"""The options of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from blockpruner.cluster.options import Replicas
from blockpruner.engine.errors import UserError
from blockpruner.engine.options import Names, Numbers
from blockpruner.engine.sections import Bos, ChatTemplate, Model, Precision


class EvaluationConfig(Replicas, Precision, Model):
    tasks: Names = Field(default=(), examples=["piqa,…"])
    """Tasks, groups or tags of lm-eval to run. paper: the five tasks of Table 1 in the paper; paper-more: the four
    additional tasks of its Table 10; paper-aqua: AQuA-RAT."""
    include_path: Path | None = None
    """Folder with additional task files for lm-eval."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N questions of each task."""
    perplexity: tuple[str, ...] = ()
    """Text to measure perplexity on: wikitext2 (its test split), builtin, a file or a folder. May be repeated."""
    text_column: str = "text"
    """Column that contains the texts, or the conversations, in a file or folder with columns."""
    chat_template: ChatTemplate = ChatTemplate.AUTO
    """What to do with a column of conversations. auto: apply the chat template of the tokenizer; none: refuse it."""
    seq_len: tuple[int, ...] = (2048,)
    """Tokens per window of `perplexity`. May be repeated."""
    bos: Bos = Bos.AUTO
    """Which windows of `perplexity` begin with a BOS token, as for search. auto: every window for Gemma, else the first
    one, if the tokenizer adds it by itself."""
    num_windows: int | None = Field(default=None, ge=1)
    """Use only the first N windows of each text."""
    run: Path | None = None
    """Evaluate the model without the blocks that this run removed."""
    num_remove: Numbers = Field(default=(), examples=["0,4,8"])
    """With `run`: evaluate after this many removals; 0 is the dense model. Default: all removals."""
    batch_size: int = Field(default=1, ge=1)
    """Task requests per call. The paper uses 1."""
    task_timeout_s: float = Field(default=600.0, ge=1)
    """Give up on a unit of work after this many seconds, or after 5 times its expected duration if that is longer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.tasks and not self.perplexity:
            raise UserError("nothing to evaluate: give `tasks`, or `perplexity` (wikitext2, builtin or a file).")
        if self.num_remove and self.run is None:
            raise UserError("expected `num_remove` together with `run`: it counts the removals of the run.")
        if self.include_path is not None and not self.tasks:
            raise UserError("expected `include_path` together with `tasks`.")
        if any(length < 2 for length in self.seq_len):
            raise UserError(f"expected `seq_len` of at least 2, got {min(self.seq_len)}.")
        return self
