"""Whether a model's head is its embedding. The tensors decide; the config's `tie_word_embeddings` may be wrong.

transformers keeps both tensors if a file has both with different values, but leaves the config as it is. Whatever is
made from that config later would tie them and lose the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from blockpruner.engine.model.hub import local_folder
from blockpruner.engine.sections import ModelSource

ROWS = 4096
"""Number of rows that are compared at once."""


def is_tied(model: PreTrainedModel) -> bool:
    """Whether a model in memory has one tensor for its embedding and its head."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return False
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # code that does not say where they are
        return True
    return head is None or head.weight is embedding.weight


def record_tie(model: PreTrainedModel) -> PreTrainedModel:
    """Let the config of a loaded model say whether its head is its embedding."""
    if not is_tied(model):
        model.config.tie_word_embeddings = False
    return model


def tie_as_stored(empty: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
    """Give a model on the meta device a head of its own if the files of `source` hold one, as loading would.

    Weights of a hub id that are not in the cache are not looked for.
    """
    head = empty.get_output_embeddings()
    tied = getattr(empty, "all_tied_weights_keys", None)
    if is_tied(empty) and head is not None and has_own_head(tied, empty.base_model_prefix, source):
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
        empty.config.tie_word_embeddings = False
    return empty


def has_own_head(tied: Mapping[str, str] | None, prefix: str, source: ModelSource) -> bool:
    """Whether the files hold a head that differs from the embedding.

    tied: the names of what a config ties, as transformers has them: the head's and the embedding's. prefix: of the
    model without a head.
    """
    found = _files_by_tensor(local_folder(source)) if tied else {}
    for head, embedding in (tied or {}).items():
        names = [_name_in_file(name, prefix, found) for name in (head, embedding)]
        if None not in names and not _are_equal(*((found[name], name) for name in names if name is not None)):
            return True
    return False


def _files_by_tensor(folder: Path | None) -> dict[str, Path]:
    """Return the file of each tensor. A file that cannot be read is left to whoever loads the model."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder is not None else []:
        try:
            with safe_open(file, "pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except (OSError, SafetensorError):
            continue
    return found


def _name_in_file(name: str, prefix: str, found: dict[str, Path]) -> str | None:
    """Return a tensor's name in the files, which may lack the prefix of the model without a head."""
    return next((known for known in (name, name.removeprefix(f"{prefix}.")) if known in found), None)


def _are_equal(one: tuple[Path, str], other: tuple[Path, str]) -> bool:
    with safe_open(one[0], "pt") as of_one, safe_open(other[0], "pt") as of_other:
        first, second = of_one.get_slice(one[1]), of_other.get_slice(other[1])
        if first.get_shape() != second.get_shape() or first.get_dtype() != second.get_dtype():
            return False
        starts = range(0, first.get_shape()[0], ROWS)
        return all(torch.equal(first[row : row + ROWS], second[row : row + ROWS]) for row in starts)
