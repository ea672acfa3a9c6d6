"""Turn calibration text into windows of tokens, drawn as in the official code so that anyone can reproduce them."""

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
from blockpruner.engine.sections import Calibration

FILE_TYPES = (".jsonl", ".json", ".parquet", ".txt", ".raw")


@dataclass(frozen=True)
class Windows:
    """Windows of equal length. The tail of the text is dropped."""

    tokens: Tensor
    """Token ids, int64 [num_windows, seq_len]."""
    num_rows: int
    """Number of texts that were joined."""
    notes: tuple[str, ...] = ()
    """Differences between what was requested and what the text could provide."""
    made_of: Calibration | None = None
    """The options that the windows were drawn with; None if this is not calibration text."""

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


def calibration_windows(text: Calibration, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """Draw `num_samples` rows (official code: `random.seed(seed)`, `random.sample`), join them with blank lines,
    tokenise once, cut into windows of `seq_len` tokens, and drop the tail. Keep only the first `num_windows` windows if
    it is given.

    Raises UserError if the text is missing, is empty, lacks the column, or is too short for one window.
    """
    source = text.calibration
    rows = read_rows(source, text.text_column, train=True)
    notes = []
    if text.num_samples > len(rows):
        notes.append(
            f"{source} has {len(rows)} rows, fewer than the {text.num_samples} samples requested; all are used"
        )
    order = random.Random(text.seed).sample(range(len(rows)), min(text.num_samples, len(rows)))
    tokens = cut_windows("\n\n".join(rows[index] for index in order), tokenizer, text.seq_len, source)
    if text.num_windows is not None and text.num_windows > len(tokens):
        notes.append(f"{source} gives {len(tokens)} windows, fewer than the {text.num_windows} requested")
    return Windows(tokens[: text.num_windows], len(order), tuple(notes), text.part(Calibration))


def evaluation_windows(
    source: str, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, text_column: str = "text"
) -> Windows:
    """Cut a test text into windows. `wikitext2` means its test split. A .txt or .raw file is used unchanged; the rows
    of other files are joined with blank lines."""
    path = Path(source)
    if path.suffix in (".txt", ".raw") and path.is_file():
        rows: Sequence[str] = [_read_text(path)]
    else:
        rows = read_rows(source, text_column, train=False)
    return Windows(cut_windows("\n\n".join(rows), tokenizer, seq_len, source), len(rows))


def read_rows(source: str, text_column: str, *, train: bool) -> Sequence[str]:
    """Return the texts of a named data set or a local file. `train` selects the split that calibration may use."""
    if source == "builtin":
        from pydoc_data.topics import topics  # the language reference shipped with every Python

        return list(topics.values())
    if source == "alpaca":
        return _official_alpaca_test()
    if source == "wikitext2":
        split = "train" if train else "test"
        return _hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split)["text"]
    return _file_rows(source, text_column)


def training_rows(source: str, text_column: str) -> Sequence[str]:
    """Return the texts to train on: for `alpaca` the official code's training split (80 %), otherwise the rows that
    calibration draws from."""
    return _alpaca_parts()["train"]["text"] if source == "alpaca" else read_rows(source, text_column, train=True)


def cut_windows(text: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, source: str) -> Tensor:
    """Tokenise once with the tokenizer's defaults, cut into windows, and drop the tail: int64 [num_windows,
    seq_len]."""
    if seq_len < 2:
        raise UserError(
            f"expected `seq_len` of at least 2 (the first token of a window is only context), got {seq_len}."
        )
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # "sequence longer than the model's maximum"; the text is cut below
    try:
        ids = tokenizer(text)["input_ids"]
    finally:
        transformers_logging.set_verbosity(verbosity)
    num_windows = len(ids) // seq_len
    if num_windows == 0:
        raise UserError(
            f"expected text for at least one window of {seq_len} tokens, but {source} has {len(ids)} tokens; "
            f"use more samples or a smaller `seq_len`."
        )
    return torch.tensor(ids[: num_windows * seq_len], dtype=torch.long).view(num_windows, seq_len)


def _official_alpaca_test() -> Sequence[str]:
    """The official code's 10 % test split: the first half of a held-out fifth (both splits use seed 42)."""
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
        except Exception as error:  # `datasets` passes on whatever its readers raise
            raise UserError(f"cannot read {source!r} as {path.suffix}: {_cause(error)}") from error
    if text_column not in table.column_names:
        raise UserError(
            f"expected a column {text_column!r} in {source!r}, which has {', '.join(table.column_names)}; "
            f"use `text_column`."
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
