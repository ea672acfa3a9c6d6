"""What transformers reports after it has loaded a model: each kind of difference between file and model has a rule."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.weight_files import Stored, is_harmless


def check_report(model: PreTrainedModel, info: Mapping[str, Any], stored: Mapping[str, Stored], name: str) -> None:
    """Raise UserError unless the model was made of all tensors of its files and of nothing else.

    info: what `from_pretrained` returns with `output_loading_info`. stored: the tensors in the files.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        tensor, in_file, in_model = mismatched[0]
        raise UserError(
            f"the weights of {name!r} do not fit its config: {len(mismatched)} tensors have another shape, {tensor!r} "
            f"among them: {list(in_file)} in the file, {list(in_model)} by the config."
        )
    unused = [key for key in info["unexpected_keys"] if not is_harmless(key, _shape(key, stored))]
    _refuse(model, name, missing=info["missing_keys"], unused=unused)


def check_names(model: PreTrainedModel, stored: Mapping[str, Stored], name: str) -> None:
    """Raise UserError if the names in the files already show what `check_report` would find after loading.

    A family whose tensors are renamed while they are loaded both lacks names and has others; it is not judged here.
    model: with or without weights.
    """
    expected = set(model.state_dict())
    tied = getattr(model, "all_tied_weights_keys", {})
    optional = re.compile("|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing or ["^$"]))
    may_lack = {*tied.keys(), *tied.values()}
    missing = [key for key in expected - stored.keys() - may_lack if not optional.search(key)]
    purpose = set(left_out_by_class(model, stored))
    unused = [key for key in stored.keys() - expected - purpose if not is_harmless(key, stored[key].shape)]
    if not (missing and unused):
        _refuse(model, name, missing=missing, unused=unused)


def _refuse(model: PreTrainedModel, name: str, *, missing: Iterable[str], unused: Iterable[str]) -> None:
    model_type = model.config.model_type
    if lacking := sorted(missing):
        raise UserError(
            f"expected all weights in {name!r}, but {len(lacking)} tensors are missing, {lacking[0]!r} among "
            f"them; the checkpoint is incomplete or not of type {model_type!r}."
        )
    if left := sorted(unused):
        raise UserError(
            f"expected a model that uses all weights in {name!r}, but {len(left)} tensors of the file are not used "
            f"by the model, {left[0]!r} among them; the config does not fit the weights, or they hold more than a "
            f"language model of type {model_type!r}."
        )


def left_out_by_class(model: PreTrainedModel, stored: Mapping[str, Stored]) -> list[str]:
    """Names of stored tensors that the model's class leaves out on purpose, such as layers that predict several tokens
    ahead. transformers does not report them."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    if not patterns:
        return []
    known = re.compile("|".join(f"({pattern})" for pattern in patterns))
    used = model.state_dict().keys()
    return sorted(
        key
        for key, found in stored.items()
        if known.search(key) and key not in used and not is_harmless(key, found.shape)
    )


def _shape(key: str, stored: Mapping[str, Stored]) -> tuple[int, ...] | None:
    """Shape of a tensor that transformers reports, whose name it may have prefixed."""
    found = stored.get(key) or next((part for name, part in stored.items() if key.endswith(f".{name}")), None)
    return found.shape if found else None
