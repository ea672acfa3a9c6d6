"""Compare the output of another program with that of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

NUM_TOP = 20
"""Number of log-probabilities to compare at each step: those of the most likely tokens."""
CLOSE_SHARE, CLOSE_DIFFERENCE = 0.9, 0.2
"""Quantisation keeps at least this share of the tokens, and changes log-probabilities by at most this many nats on
average. A larger difference means an error."""

Top = Sequence[Sequence[Sequence[tuple[int, float]]]]
"""For each prompt and step, pairs of token id and log-probability, most likely first."""


@dataclass(frozen=True)
class Agreement:
    num_tokens: int
    num_same: int
    """Number of tokens that the model would also choose greedily, given the program's earlier tokens."""
    largest_difference: float
    """Largest difference of a log-probability, in nats."""
    mean_difference: float
    """Mean difference of the log-probabilities, in nats."""

    @property
    def verdict(self) -> str:
        """`same` if every token is the same, `close` if quantisation explains the difference, else `differs`."""
        if self.num_same == self.num_tokens and self.mean_difference <= CLOSE_DIFFERENCE:
            return "same"
        share = self.num_same / self.num_tokens
        return "close" if share >= CLOSE_SHARE and self.mean_difference <= CLOSE_DIFFERENCE else "differs"


@torch.inference_mode()
def agreement(model: PreTrainedModel, prompts: Sequence[list[int]], tokens: Sequence[list[int]], top: Top) -> Agreement:
    """Compare a program's greedy tokens and log-probabilities with those of `model` on the same texts."""
    num_same, differences = 0, []
    for prompt, generated, steps in zip(prompts, tokens, top, strict=True):
        ids = torch.tensor([prompt + generated], device=model.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1).cpu()
        num_same += int((expected.argmax(-1) == torch.tensor(generated)).sum())
        for row, pairs in zip(expected, steps, strict=True):
            differences += [abs(row[token].item() - value) for token, value in pairs]
    values = torch.tensor(differences, dtype=torch.float64)
    return Agreement(sum(map(len, tokens)), num_same, values.max().item(), values.mean().item())
