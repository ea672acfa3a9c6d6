"""Perplexities of checkpoints on test texts, one checkpoint after the other, as recover and compensate report them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.engine.calibration import evaluation_windows
from blockpruner.engine.judge.evaluation import evaluate_perplexity
from blockpruner.engine.model.full_memory import full_memory_ends
from blockpruner.engine.model.loading import load_model
from blockpruner.engine.sections import Bos, ChatTemplate, ModelSource
from blockpruner.engine.text.tokens import check_ids
from blockpruner.showing.console import Reporter


def text_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    model_config: Any,
    *,
    seq_len: int,
    text_column: str,
    chat_template: ChatTemplate,
    bos: Bos,
    num_windows: int | None,
) -> dict[str, Tensor]:
    """Return the token ids of each text [num_windows, seq_len], of at most `num_windows` windows."""
    sets = {}
    for text in texts:
        windows = evaluation_windows(
            text,
            tokenizer,
            seq_len=seq_len,
            text_column=text_column,
            chat_template=chat_template,
            bos=bos,
            model_type=model_config.model_type,
        ).tokens
        sets[text] = windows[:num_windows]
        check_ids(sets[text], model_config.get_text_config().vocab_size)
    return sets


def perplexities(
    which: str, source: ModelSource, dtype: str, place: torch.device, sets: dict[str, Tensor], reporter: Reporter
) -> dict[str, float]:
    """Measure a model on each text. which: what to call it."""
    values: dict[str, float] = {}
    model = load_on(source, dtype, place) if sets else None
    for text, windows in sets.items():
        with reporter.bar(f"{which}: perplexity on {text}", len(windows)):
            values[text] = evaluate_perplexity(model, windows, lambda: reporter.advance(1)).value
        reporter.say(f"{which}: perplexity {values[text]:.4f} on {text} ({len(windows)} windows of {windows.shape[1]})")
    return values


def load_on(source: ModelSource, dtype: str, place: torch.device) -> PreTrainedModel:
    with full_memory_ends("before the model is loaded", "other programs may be using it; free memory."):
        return load_model(source, dtype, place)
