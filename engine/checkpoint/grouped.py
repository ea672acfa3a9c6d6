"""The grouped layout: one decoder layer per kept attention, a small modelling file beside the weights.

The folder loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` where this project is not
installed, and without the flag where it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

SIDE_CAR = "blockpruner.json"
"""What was removed, from what, and by which run."""


def write_grouped(
    pruned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, provenance: dict[str, Any], folder: Path
) -> None:
    """Write a model that `surgery.prune` made into an existing, empty folder."""
    pruned.save_pretrained(folder)  # also copies the modelling file: its classes are registered for the Auto classes
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / SIDE_CAR).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
