"""Whether another program generates what a model does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

NUM_TOP = 20
"""Log-probabilities that are compared at each step: of the likeliest tokens."""
CLOSE_SHARE, CLOSE_DIFFERENCE = 0.9, 0.2
"""At least so many of the tokens, and log-probabilities that differ by so much (nats) in the mean, are what
quantisation does; more is a mistake."""

Top = Sequence[Sequence[Sequence[tuple[int, float]]]]
"""For each prompt and step, pairs of token id and log-probability, the likeliest first."""


@dataclass(frozen=True)
class Agreement:
    num_tokens: int
    num_same: int
    """Tokens that are the model's own greedy choice after what the program generated before them."""
    largest_difference: float
    """Of a log-probability, in nats."""
    mean_difference: float

    @property
    def verdict(self) -> str:
        """`same`: every token is; `close`: as much as quantisation explains; else `differs`."""
        if self.num_same == self.num_tokens and self.mean_difference <= CLOSE_DIFFERENCE:
            return "same"
        share = self.num_same / self.num_tokens
        return "close" if share >= CLOSE_SHARE and self.mean_difference <= CLOSE_DIFFERENCE else "differs"


@torch.inference_mode()
def agreement(model: PreTrainedModel, prompts: Sequence[list[int]], tokens: Sequence[list[int]], top: Top) -> Agreement:
    """Compare a program's greedy tokens and log-probabilities with those that `model` gives to the same texts."""
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
