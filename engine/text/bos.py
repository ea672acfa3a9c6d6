"""Where BOS tokens stand in windows: as the family of the model was trained."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from blockpruner.engine.errors import UserError
from blockpruner.engine.sections import Bos

NEED_BOS = "gemma"
"""Part of the model types that give wrong predictions for a text without a BOS token before it. Gemma 3 270M has a
perplexity of 23.9 with it at the head of every window and of 61.5 without (docs/texts.md)."""


def needs_bos(tokenizer: PreTrainedTokenizerBase, model_type: str | None) -> bool:
    """Whether every window needs a BOS token: of this family, and with a tokenizer that adds it by itself.

    model_type: of the model's config; None to tell the family by the tokenizer: where it came from, or its class.
    """
    return NEED_BOS in (model_type or _family(tokenizer)).lower() and adds_bos(tokenizer)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer by itself puts a BOS token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def recorded_bos(file: Path) -> Bos:
    """Return what a JSON file of options says of BOS. Files from before the option, and damaged ones, do not say it:
    then it was the official way, or whoever reads the rest will refuse them."""
    try:
        return Bos(json.loads(file.read_text(encoding="utf-8"))["bos"])
    except (OSError, ValueError, KeyError, TypeError):
        return Bos.FIRST_WINDOW


def bos_notes(bos: Bos, tokenizer: PreTrainedTokenizerBase, model_type: str | None) -> tuple[str, ...]:
    """Return what is to be said if windows are not as the model was trained."""
    if bos is Bos.EVERY_WINDOW or not needs_bos(tokenizer, model_type):
        return ()
    return (
        f"with `bos={bos}` not every window begins with a BOS token, without which this model's predictions are wrong; "
        f"`bos=every-window` is as it was trained",
    )


def _family(tokenizer: PreTrainedTokenizerBase) -> str:
    place = Path(tokenizer.name_or_path)
    try:
        return str(json.loads((place / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):  # not a local folder of a model
        return f"{type(tokenizer).__name__} {place.name}"


def resolve_bos(asked: Bos, tokenizer: PreTrainedTokenizerBase, model_type: str | None) -> Bos:
    """Turn `auto` into what it means for this model. Raises UserError if the tokenizer lacks the token."""
    if asked is Bos.AUTO:
        return Bos.EVERY_WINDOW if needs_bos(tokenizer, model_type) else Bos.FIRST_WINDOW
    if asked is Bos.EVERY_WINDOW and tokenizer.bos_token_id is None:
        raise UserError("expected a tokenizer with a BOS token for `bos=every-window`; use `bos=auto`.")
    return asked
