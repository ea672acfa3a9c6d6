"""Turn calibration text into windows of tokens, drawn as in the official code so that anyone can reproduce them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blockpruner.engine.errors import UserError
from blockpruner.engine.sections import Bos, Calibration, ChatTemplate
from blockpruner.engine.text.bos import bos_notes, resolve_bos
from blockpruner.engine.text.chat import as_texts
from blockpruner.engine.text.rows import Rows, plain_text, rows_of
from blockpruner.engine.text.tokens import cut_windows


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
    """The options that the windows were drawn with, without `auto`; None if this is not calibration text."""

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
    text: Calibration, tokenizer: PreTrainedTokenizerBase, model_type: str | None = None
) -> Windows:
    """Draw `num_samples` rows (official code: `random.seed(seed)`, `random.sample`), join them with blank lines,
    tokenise once, cut into windows of `seq_len` tokens, and drop the tail. Keep only the first `num_windows` windows if
    it is given.

    Several texts give as many windows each as the shortest one has, and take turns: the first window of each, then the
    second one of each, and so on.

    model_type: type of the model, on which `bos=auto` depends; None to tell it by the tokenizer.

    Raises UserError if a text is missing, is empty, lacks the column, or is too short for one window.
    """
    bos = resolve_bos(text.bos, tokenizer, model_type)
    drawn = [_drawn(source, text, tokenizer, bos) for source in text.calibration]
    notes = [*bos_notes(bos, tokenizer, model_type), *(note for one in drawn for note in one.notes)]
    each = min(one.num_windows for one in drawn)
    if len(drawn) > 1 and len({one.num_windows for one in drawn}) > 1:
        numbers = ", ".join(str(one.num_windows) for one in drawn)
        notes.append(f"{each} windows of each text are used, as many as the shortest one gives (of {numbers})")
    tokens = torch.stack([one.tokens[:each] for one in drawn], dim=1).flatten(0, 1)
    if text.num_windows is not None and text.num_windows > len(tokens):
        names = " and ".join(map(repr, text.calibration))
        verb = "gives" if len(drawn) == 1 else "give"
        notes.append(f"{names} {verb} {len(tokens)} windows, fewer than the {text.num_windows} requested")
    made_of = text.part(Calibration).replace(bos=bos)
    return Windows(tokens[: text.num_windows], sum(one.num_rows for one in drawn), tuple(notes), made_of)


def _drawn(source: str, text: Calibration, tokenizer: PreTrainedTokenizerBase, bos: Bos) -> Windows:
    rows = rows_of(source, text.text_column, train=True)
    notes = []
    if text.num_samples > len(rows):
        notes.append(
            f"{source!r} has {len(rows)} rows, fewer than the {text.num_samples} samples requested; all are used"
        )
    order = rows.draw(text.num_samples, text.seed)
    texts, more = as_texts(rows, order, tokenizer, text.chat_template)
    tokens = cut_windows("\n\n".join(texts), tokenizer, text.seq_len, repr(source), bos)
    return Windows(tokens, len(order), (*more, *notes))


def evaluation_windows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    text_column: str = "text",
    chat_template: ChatTemplate = ChatTemplate.AUTO,
    bos: Bos = Bos.AUTO,
    model_type: str | None = None,
) -> Windows:
    """Cut a test text into windows. `wikitext2` means its test split. A .txt or .raw file is used unchanged; the rows
    of other files are joined with blank lines. bos, model_type: as for `calibration_windows`."""
    whole = plain_text(source)
    rows = Rows(source, [whole]) if whole is not None else rows_of(source, text_column, train=False)
    texts, notes = as_texts(rows, range(len(rows)), tokenizer, chat_template)
    bos = resolve_bos(bos, tokenizer, model_type)
    notes += bos_notes(bos, tokenizer, model_type)
    return Windows(cut_windows("\n\n".join(texts), tokenizer, seq_len, repr(source), bos), len(rows), notes)


def read_rows(source: str, text_column: str, *, train: bool) -> Sequence[str]:
    """Return the texts of a named data set or a local file. `train` selects the split that calibration may use."""
    rows = rows_of(source, text_column, train=train)
    if rows.are_chat:
        raise UserError(f"expected texts in column {rows.column!r} of {rows.source!r}, got conversations.")
    return rows.values  # type: ignore[return-value]
