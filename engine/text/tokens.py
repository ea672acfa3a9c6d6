"""Tokenise texts, and check that the model has an embedding for every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.sections import Bos

BYTES_PER_CHARACTER = 100
"""Memory that a tokenizer takes for one character. Measured: 60 to 220."""


def cut_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, source: str, bos: Bos = Bos.FIRST_WINDOW
) -> Tensor:
    """Tokenise once, cut into windows, and drop the tail: int64 [num_windows, seq_len].

    bos: `first-window` is what the tokenizer does by itself. With `every-window`, a window is a BOS token and
    seq_len - 1 tokens of the text.
    """
    if seq_len < 2:
        raise UserError(
            f"expected `seq_len` of at least 2 (the first token of a window is only context), got {seq_len}."
        )
    needed, free = BYTES_PER_CHARACTER * len(text), psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"{source} has {len(text):,} characters, which take about {needed / 2**30:.0f} GiB to tokenise, and "
            f"{free / 2**30:.0f} GiB are free; use fewer rows."
        )
    [ids] = token_ids([text], tokenizer, is_plain=bos is not Bos.FIRST_WINDOW)
    if text.strip() and {*ids} <= {tokenizer.unk_token_id}:
        raise UserError(
            f"the tokenizer knows no token of the text of {source}; it is damaged, or not made for this text."
        )
    size = seq_len - 1 if bos is Bos.EVERY_WINDOW else seq_len
    num_windows = len(ids) // size
    if num_windows == 0:
        raise UserError(
            f"expected text for at least one window of {seq_len} tokens, but {source} has {len(ids)} tokens; "
            f"use more samples or a smaller `seq_len`."
        )
    windows = torch.tensor(ids[: num_windows * size], dtype=torch.long).view(num_windows, size)
    if bos is Bos.EVERY_WINDOW:
        windows = torch.cat([torch.full((num_windows, 1), tokenizer.bos_token_id), windows], dim=1)
    return windows


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, is_plain: bool = False) -> list[list[int]]:
    """Tokenise each text with the tokenizer's defaults, or, if `is_plain`, without special tokens around it."""
    options = {"add_special_tokens": False} if is_plain else {}
    with _no_length_warning():
        try:
            found: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
        except Exception as error:  # the tokenizer's own code, which may come with the model
            raise UserError(
                f"the tokenizer cannot tokenise the text ({first_line(error)[:200]}); it is damaged, or not this "
                f"model's."
            ) from error
    return found


def check_ids(tokens: Tensor | Sequence[Tensor], vocab_size: int) -> None:
    """Raise UserError if the model has no embedding for a token. On a GPU, it would end the process."""
    largest = max((int(part.max()) for part in tokens if len(part)), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives token {largest}, but the model has embeddings for 0 to {vocab_size - 1}; use the "
            f"tokenizer of this model."
        )


@contextmanager
def _no_length_warning() -> Iterator[None]:
    """Suppress "sequence longer than the model's maximum": the text is cut afterwards."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
