"""CALIBRATION to windows of tokens, as the official code draws them, so that anyone can rebuild them."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from blockpruner.engine.errors import UserError, first_line

FILE_TYPES = (".jsonl", ".json", ".parquet", ".txt", ".raw")


@dataclass(frozen=True)
class Windows:
    """Windows of equal length, the tail of the text dropped."""

    tokens: Tensor
    """Token ids, int64 [num_windows, seq_len]."""
    num_rows: int
    """Texts that were joined."""
    notes: tuple[str, ...] = ()
    """What came out otherwise than was asked."""

    @property
    def num_windows(self) -> int:
        return self.tokens.shape[0]

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[1]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the token ids and their shape."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.contiguous().numpy().tobytes())
        return digest.hexdigest()


def calibration_windows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    text_column: str = "text",
    num_windows: int | None = None,
) -> Windows:
    """Draw `num_samples` rows (official code: `random.seed(seed)`, `random.sample`), join them by blank lines, tokenise
    once, cut into windows of `seq_len`, drop the tail. With `num_windows` only the first so many are kept.

    Raises UserError when the source is missing, empty, without the column, or too short for one window.
    """
    rows = read_rows(source, text_column, train=True)
    notes = []
    if num_samples > len(rows):
        notes.append(f"{source} has {len(rows)} rows, fewer than the {num_samples} samples asked for; all are used")
    order = random.Random(seed).sample(range(len(rows)), min(num_samples, len(rows)))
    tokens = cut_windows("\n\n".join(rows[index] for index in order), tokenizer, seq_len, source)
    if num_windows is not None and num_windows > len(tokens):
        notes.append(f"{source} gives {len(tokens)} windows, fewer than the {num_windows} asked for")
    return Windows(tokens[:num_windows], len(order), tuple(notes))


def evaluation_windows(
    source: str, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, text_column: str = "text"
) -> Windows:
    """All windows of a test text: `wikitext2` is its test split, a .txt or .raw file is taken as it is, the rows of
    other files are joined by blank lines."""
    path = Path(source)
    if path.suffix in (".txt", ".raw") and path.is_file():
        rows: Sequence[str] = [_read_text(path)]
    else:
        rows = read_rows(source, text_column, train=False)
    return Windows(cut_windows("\n\n".join(rows), tokenizer, seq_len, source), len(rows))


def read_rows(source: str, text_column: str, *, train: bool) -> Sequence[str]:
    """The texts of a named set or a local file. `train` picks the split that calibration may use."""
    if source == "builtin":
        from pydoc_data.topics import topics  # the language reference that comes with every Python

        return list(topics.values())
    if source == "alpaca":
        return _official_alpaca_test()
    if source == "wikitext2":
        split = "train" if train else "test"
        return _hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split)["text"]
    return _file_rows(source, text_column)


def training_rows(source: str, text_column: str) -> Sequence[str]:
    """Texts to train on: of `alpaca` the official code's training split (80 %), else what calibration draws from."""
    return _alpaca_parts()["train"]["text"] if source == "alpaca" else read_rows(source, text_column, train=True)


def cut_windows(text: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, source: str) -> Tensor:
    """Tokenise once with the tokenizer's defaults, cut, drop the tail: int64 [num_windows, seq_len]."""
    if seq_len < 2:
        raise UserError(
            f"expected --seq-len of at least 2 (a window predicts its tokens but the first), got {seq_len}."
        )
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # "sequence longer than the model's maximum": it is cut below
    try:
        ids = tokenizer(text)["input_ids"]
    finally:
        transformers_logging.set_verbosity(verbosity)
    num_windows = len(ids) // seq_len
    if num_windows == 0:
        raise UserError(
            f"expected text for at least one window of {seq_len} tokens, but {source} gives {len(ids)} tokens; "
            f"use more samples or a smaller --seq-len."
        )
    return torch.tensor(ids[: num_windows * seq_len], dtype=torch.long).view(num_windows, seq_len)


def _official_alpaca_test() -> Sequence[str]:
    """The 10 % test split that the official code makes: a fifth held out, the first half of it (both seed 42)."""
    return _alpaca_parts()["test"].train_test_split(test_size=0.5, seed=42)["train"]["text"]


def _alpaca_parts() -> datasets.DatasetDict:
    return _hub_rows("tatsu-lab/alpaca", None, "train").train_test_split(test_size=0.2, seed=42)


def _hub_rows(path: str, name: str | None, split: str) -> datasets.Dataset:
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path!r} from the hub ({first_line(error)}); give a local file or 'builtin' instead."
        ) from error


def _file_rows(source: str, text_column: str) -> Sequence[str]:
    path = Path(source)
    if path.suffix not in FILE_TYPES:
        raise UserError(
            f"expected alpaca, wikitext2, builtin or a file ending in {', '.join(FILE_TYPES)}, got {source!r}."
        )
    if not path.is_file():
        raise UserError(f"expected a text file, got {source!r}, which does not exist.")
    if path.stat().st_size == 0:
        raise UserError(f"expected a file with texts, got {source!r}, which is empty.")
    if path.suffix in (".txt", ".raw"):
        return _read_text(path).splitlines()
    datasets.disable_progress_bars()
    read = datasets.Dataset.from_parquet if path.suffix == ".parquet" else datasets.Dataset.from_json
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = read(str(path), cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # `datasets` raises whatever its readers raise
            raise UserError(f"cannot read {source!r} as {path.suffix}: {_cause(error)}") from error
    if text_column not in table.column_names:
        raise UserError(
            f"expected a column {text_column!r} in {source!r}, which has {', '.join(table.column_names)}; "
            f"use --text-column."
        )
    rows = [row for row in table[text_column] if row is not None]
    if not all(isinstance(row, str) for row in rows):
        raise UserError(f"expected texts in column {text_column!r} of {source!r}, got other values.")
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"expected UTF-8 text in {str(path)!r}: {error}.") from error


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
