"""Load the dense model that a training distills, beside the model that is trained."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.full_memory import full_memory_ends
from blockpruner.engine.model.holding import load_decoder
from blockpruner.engine.model.loading import DTYPES, meta_model
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import ModelBytes, Placement

SHARE = 0.5
"""Share of the free memory of a GPU that a resident teacher may take; activations and the optimizer need the rest."""


def load_teacher(source: ModelSource, dtype: str, device: torch.device) -> PreTrainedModel:
    """Load the dense model, frozen. On a GPU in whose free memory it takes too much, its layers are streamed."""
    placement = Placement.RESIDENT
    if device.type == "cuda":
        sizes = ModelBytes.of(Decoder(meta_model(source, dtype)).shape, DTYPES[dtype].itemsize)
        free_bytes, _ = torch.cuda.mem_get_info(device)
        placement = Placement.RESIDENT if sizes.total <= SHARE * free_bytes else Placement.STREAMED
    with full_memory_ends("before the dense model is loaded", "other programs may be using it; free memory."):
        model = load_decoder(source, dtype, placement, [device]).model
    return model.eval().requires_grad_(False)
