"""Which windows of one draw are for the search, for the compensation, and for judging."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from blockpruner.engine.calibration import Windows, calibration_windows
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.loading import load_config, load_tokenizer
from blockpruner.engine.sections import Calibration, ModelSource
from blockpruner.engine.text.tokens import check_ids

MOST_SEARCHED, MOST_JUDGED, JUDGED_SHARE = 16, 16, 6
"""The search scores the first windows, at most this many: more of them cost time in proportion. The last sixth of all
is kept back, and the compensation fits on the rest, those of the search among them."""
TOKENS_PER_INPUT = 16
"""The compensation fits on at most this many tokens for each input of the widest projection. Of SmolLM2, that is as
many as did best in the measurements."""


@dataclass(frozen=True)
class Split:
    all: Windows
    num_fitted: int
    num_judged: int

    @property
    def num_searched(self) -> int:
        return min(MOST_SEARCHED, self.num_fitted)

    @property
    def judged(self) -> Tensor:
        """Token ids [num_windows, seq_len]."""
        return self.all.tokens[-self.num_judged :]


def read_windows(config: Calibration, source: ModelSource) -> Split:
    """source: as `materialize` returned it. Raises UserError if the text is too short."""
    model_config = load_config(source)
    text_config = model_config.get_text_config()
    windows = calibration_windows(config, load_tokenizer(source), model_config.model_type)
    check_ids(windows.tokens, text_config.vocab_size)
    number = len(windows.tokens)
    if number < 4:
        raise UserError(
            f"expected text for at least 4 windows of {config.seq_len} tokens: to search, to fit and to judge by, got "
            f"{number}; raise `num_samples` or `num_windows`, or lower `seq_len`."
        )
    num_judged = max(1, min(MOST_JUDGED, number // JUDGED_SHARE))
    widths = getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size
    width = max(widths) if isinstance(widths, list) else widths
    enough = max(MOST_SEARCHED, TOKENS_PER_INPUT * width // config.seq_len)
    return Split(windows, min(number - num_judged, enough), num_judged)
