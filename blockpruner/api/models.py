"""Models as a caller has them: by name, or in memory, where they must stay as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.loading import load_model, load_tokenizer, materialize, resolve_dtype
from blockpruner.engine.model.multimodal import is_multimodal
from blockpruner.engine.model.source import full_name
from blockpruner.engine.sections import ModelSource, Precision
from blockpruner.showing.libraries import libraries_quiet

Model: TypeAlias = PreTrainedModel | str | Path
"""A transformers model in memory, or its name: a Hugging Face id, a folder, a .gguf file, `smollm2`."""


def load(
    name: str | Path, *, dtype: str = "auto", revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer by name: a Hugging Face id, a folder, a .gguf file, or `smollm2`. On the CPU; `auto` is
    bfloat16 if the processor has instructions for it, else float32. Of a multimodal model it is the text decoder."""
    source = ModelSource(str(name), revision, trust_remote_code)
    chosen, _ = resolve_dtype(Precision.of(dtype=dtype).dtype, source, torch.device("cpu"))
    with libraries_quiet():
        made = materialize(source, chosen)
        model = load_model(made, chosen)
        if made.name != source.name:  # a GGUF: the model is known by the file, not by what it was converted to
            model.config.name_or_path = full_name(source.name)
        return model, load_tokenizer(made)


def name_of(model: PreTrainedModel) -> str:
    """What a run records of a model in memory."""
    return model.config.name_or_path or f"{type(model).__name__} in memory"


def check_no_other_parts(model: PreTrainedModel) -> None:
    """Raise UserError for a multimodal model: BlockPruner itself loads its text decoder."""
    if is_multimodal(model.config):
        raise UserError(
            f"expected a language model, got a multimodal one of type {model.config.model_type!r} in memory; "
            f"blockpruner.load loads the text decoder of its folder."
        )


@contextmanager
def as_it_was(model: PreTrainedModel | None) -> Iterator[None]:
    """Leave a caller's model in the mode in which it was, and torch with as many threads."""
    training, threads = model is not None and model.training, torch.get_num_threads()
    try:
        yield
    finally:
        if model is not None and training:
            model.train()
        if model is not None:
            torch.set_num_threads(threads)
