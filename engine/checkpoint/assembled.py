"""Assemble a model from a config and tensors, and compare it with the original."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from blockpruner.engine.errors import UserError


def assembled(model_class: type[PreTrainedModel], config: Any, weights: dict[str, Tensor]) -> PreTrainedModel:
    """Assemble a model that can be saved but not run, since buffers that are in no checkpoint stay on the meta device.
    Raises RuntimeError unless the tensors are exactly those of the model."""
    with torch.device("meta"), no_init_weights():
        model = model_class(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


@torch.inference_mode()
def check_same(written: PreTrainedModel, pruned: PreTrainedModel, tolerance: float) -> None:
    """Raise UserError unless both models give the same logits, up to `tolerance` standard deviations of the logits."""
    ids = torch.arange(3, 51, device=pruned.device)[None] % pruned.config.vocab_size
    expected, got = pruned(input_ids=ids, use_cache=False).logits, written(input_ids=ids, use_cache=False).logits
    difference = (expected - got).abs().max()
    if not difference <= tolerance * expected.std():
        raise UserError(
            f"expected the written model to give the logits of the pruned model, got different ones (difference "
            f"{difference:.3g}); nothing is kept. Use `format=grouped`."
        )
