"""Texts as windows of tokens: those to calibrate on, and those to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from blockpruner.engine.calibration import Windows, calibration_windows, evaluation_windows
from blockpruner.engine.sections import Calibration

Text: TypeAlias = str | Path | Sequence[str | Path]
"""The name of a text (alpaca, wikitext2, builtin, a file or a folder), or several."""


def calibration(text: Text, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Windows:
    """Calibration windows, drawn as the official code draws them.

    text: alpaca, wikitext2, builtin, a file or a folder; or several, which give equal numbers of windows. options:
    num_samples=256, seq_len=2048, num_windows=None, seed=42, text_column="text", chat_template="auto", bos="auto".
    """
    return calibration_windows(Calibration(calibration=texts_of(text), **options), tokenizer)


def test_text(
    text: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int = 2048,
    num_windows: int | None = None,
    text_column: str = "text",
    chat_template: str = "auto",
    bos: str = "auto",
) -> Windows:
    """All windows of a text to judge by: `wikitext2` means its test split."""
    chosen = Calibration.of(seq_len=seq_len, chat_template=chat_template, bos=bos)
    found = evaluation_windows(
        str(text), tokenizer, seq_len=seq_len, text_column=text_column, chat_template=chosen.chat_template,
        bos=chosen.bos,
    )  # fmt: skip
    return Windows(found.tokens[:num_windows], found.num_rows)


test_text.__test__ = False  # type: ignore[attr-defined] # pytest must not take it for a test


def texts_of(text: Text) -> tuple[str, ...]:
    """The names of one text or of several."""
    return (str(text),) if isinstance(text, str | Path) else tuple(map(str, text))
