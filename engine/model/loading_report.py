"""What transformers reports after it has loaded a model: each kind of difference between file and model has a rule."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"expected all weights in {name!r}, but {len(missing)} tensors are missing, {missing[0]!r} among "
            f"them; the checkpoint is incomplete or not of type {model.config.model_type!r}."
        )
    unused = sorted(key for key in info["unexpected_keys"] if not is_harmless(key, _shape(key, stored)))
    if unused:
        raise UserError(
            f"expected a model that uses all weights in {name!r}, but {len(unused)} tensors of the file are not used "
            f"by the model, {unused[0]!r} among them; the config does not fit the weights, or they hold more than a "
            f"language model of type {model.config.model_type!r}."
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
