"""Write a tokenizer beside a model, as the files it was loaded from.

transformers 5 writes other files than it reads: another `tokenizer_class`, which transformers 4 does not know, and no
`tokenizer.model`, which llama.cpp's converter needs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from blockpruner.engine.model.cache import cache_dir
from blockpruner.engine.model.hub import FAILURES
from blockpruner.engine.sections import ModelSource

PATTERNS = (
    "tokenizer*", "tokenization*.py", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "additional_chat_templates/*", "vocab*", "merges.txt", "tekken.json", "*.model", "*.tiktoken", "*.spm", "*.bpe",
)  # fmt: skip
"""Files of tokenizers."""
PROCESSOR_PATTERNS = (
    "*processor*.json", "*processing*.py", "feature_extract*.py", "feature_extract*.json",
)  # fmt: skip
"""Files of what makes pixels and sounds into numbers."""
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Texts that must stay with the weights."""


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, source: ModelSource | None = None) -> None:
    """Write a tokenizer into an existing folder.

    source: where the tokenizer was loaded from, if it was not changed since. Then its own files are copied, byte for
    byte, and the licence with them.
    """
    origin = _folder(source, (*PATTERNS, *LICENCES)) if source is not None else None
    names = [] if origin is None else sorted({*_matching(origin, PATTERNS), *_code(origin)})
    if origin is not None:
        for name in [*names, *_matching(origin, LICENCES)]:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(origin / name, folder / name)
    if not names:
        tokenizer.save_pretrained(folder)
    is_ours = origin is not None and cache_dir().resolve() in origin.resolve().parents
    if not names or is_ours:  # transformers 5 wrote these files here
        _name_class_as_known(folder / "tokenizer_config.json")


def write_processor(folder: Path, source: ModelSource) -> None:
    """Write the processor of a multimodal model beside it: its own files, byte for byte."""
    origin = _folder(source, PROCESSOR_PATTERNS)
    if origin is None:
        return
    for name in _matching(origin, PROCESSOR_PATTERNS):
        shutil.copyfile(origin / name, folder / name)


def _folder(source: ModelSource, patterns: tuple[str, ...]) -> Path | None:
    """Return the folder with a source's files. Of a hub id it is the cached snapshot, where the files are brought; what
    is there already has to do if the hub cannot be reached."""
    if Path(source.name).is_dir():
        return Path(source.name)
    others = [f"*/{pattern}" for pattern in patterns if "/" not in pattern]  # a pattern's * is any number of folders
    try:
        return Path(
            snapshot_download(
                source.name, revision=source.revision, allow_patterns=list(patterns), ignore_patterns=others
            )
        )
    except FAILURES:
        return None


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(str(file.relative_to(folder)) for file in found)


def _code(origin: Path) -> list[str]:
    """Return the files in the folder that hold the classes of a tokenizer with its own code."""
    try:
        values = json.loads((origin / "tokenizer_config.json").read_text(encoding="utf-8"))
        classes = [name for name in values["auto_map"]["AutoTokenizer"] if name and "--" not in name]
    except (OSError, ValueError, LookupError, TypeError):  # there is none, or loading it has complained already
        return []
    files = {f"{name.partition('.')[0]}.py" for name in classes}
    return sorted(name for name in files if (origin / name).is_file())


def _name_class_as_known(file: Path) -> None:
    """Name a class of transformers 5 as all versions know it."""
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")
