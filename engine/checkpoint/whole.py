"""A multimodal checkpoint whose text decoder lacks blocks: every other part, and its processor, as they were.

The folder loads with `AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.engine.checkpoint.assembled import check_same
from blockpruner.engine.checkpoint.format import ROUNDED
from blockpruner.engine.checkpoint.grouped import SIDE_CAR
from blockpruner.engine.checkpoint.provenance import WHOLE
from blockpruner.engine.model.tokenizer_files import write_processor, write_tokenizer
from blockpruner.engine.sections import ModelSource


def write_whole(
    made: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    provenance: dict[str, Any],
    folder: Path,
    source: ModelSource,
) -> None:
    """Write a model from `prune_whole` into an existing, empty folder. Raises UserError unless it says of a text what
    its text decoder does.

    pruned: the text decoder without blocks, as a language model. source: where the files of its processor are.
    """
    check_same(made, pruned, ROUNDED)
    made.save_pretrained(folder)  # also copies the modelling file
    write_tokenizer(tokenizer, folder, source)
    write_processor(folder, source)
    content = json.dumps({**provenance, "format": WHOLE}, indent=1)
    (folder / SIDE_CAR).write_text(f"{content}\n", encoding="utf-8")
