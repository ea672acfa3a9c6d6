"""Load a tokenizer. What is wrong with its files is said in one line."""

from __future__ import annotations

from os.path import lexists
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.hub import why_unreachable
from blockpruner.engine.model.json_object import read_object
from blockpruner.engine.model.remote_code import remote_code_told
from blockpruner.engine.plain_file import check_file
from blockpruner.engine.sections import ModelSource

OBJECTS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
)  # fmt: skip
"""Files of a tokenizer that hold a JSON object."""
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
    "tekken.json",
)  # fmt: skip
ENDS = (".model", ".tiktoken", ".spm", ".bpe")
"""Files of which a tokenizer needs one, by their names and by the ends of their names."""


@remote_code_told
def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub id or folder. Raises UserError if it has none, or a damaged one."""
    folder = Path(source.name)
    if folder.is_dir():
        _check_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, **source.arguments)
        given = tokenizer("a b")["input_ids"]
        # Looking up an unknown token never ends if the unknown token itself is unknown.
        _ = tokenizer.all_special_ids, tokenizer.bos_token_id, tokenizer.eos_token_id
    except Exception as error:  # a tokenizer's files are read by code of many kinds, some of it the model's own
        raise _unusable(source, error) from error
    if not isinstance(given, list) or not all(isinstance(each, int) for each in given):
        raise UserError(f"expected a tokenizer in {source.name!r} that gives token ids, got {type(given).__name__}.")
    if len(tokenizer) == 0:
        raise UserError(f"expected a tokenizer with tokens in {source.name!r}, got an empty vocabulary.")
    if folder.is_dir():
        _check_added(folder, tokenizer)
    return tokenizer


def _check_files(folder: Path) -> None:
    """Raise UserError for files that transformers would stumble over."""
    contents: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys((*OBJECTS, *VOCABULARIES)):
        file = folder / name
        if not lexists(file):
            continue
        if name in OBJECTS:
            contents[name] = read_object(file)
        else:
            check_file(file)
    has_own_code = "auto_map" in contents.get("tokenizer_config.json", {})
    if not has_own_code and not any(file.name in VOCABULARIES or file.suffix in ENDS for file in folder.iterdir()):
        raise UserError(
            f"expected a tokenizer in {str(folder)!r}, which has none ({', '.join(VOCABULARIES[:2])}, …); copy the "
            f"tokenizer's files of the model into it."
        )


def _check_added(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if an added token has another id than its file says: transformers then numbers it anew."""
    loaded = tokenizer.get_added_vocab()
    for token, number in _added(folder).items():
        if loaded.get(token, number) != number:
            raise UserError(
                f"the tokenizer's files in {str(folder)!r} do not fit each other: token {token!r} is {number} in one "
                f"and {loaded[token]} in another; fetch them again."
            )


def _added(folder: Path) -> dict[str, int]:
    """Return the added tokens that tokenizer_config.json or added_tokens.json lists, with their ids."""
    found: dict[str, int] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content = read_object(folder / name)
            if name == "tokenizer_config.json":
                listed = content.get("added_tokens_decoder") or {}
                content = {str(token.get("content")): int(number) for number, token in listed.items()}
            found |= {token: number for token, number in content.items() if isinstance(number, int)}
    return found


def _unusable(source: ModelSource, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return UserError(
            f"the tokenizer of {source.name!r} comes with its own code; give `trust_remote_code` if you trust it."
        )
    if isinstance(error, ImportError) or "Couldn't instantiate the backend" in text:
        return UserError(
            f"cannot load the tokenizer of {source.name!r}: it needs a package that is not installed, or its files are "
            f"incomplete ({text[:120]})."
        )
    if (of_hub := why_unreachable(source, error)) is not None and not Path(source.name).is_dir():
        return UserError(of_hub)
    if isinstance(error, OSError):
        return UserError(f"cannot load a tokenizer from {source.name!r}: {text[:200]}")
    return UserError(
        f"cannot load the tokenizer of {source.name!r}: its files are damaged, or of another kind than they say "
        f"({type(error).__name__}: {text[:120]})."
    )
