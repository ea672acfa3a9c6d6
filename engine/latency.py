"""How fast a model generates, with KV cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.inference_mode()
def decode_tokens_per_s(
    models: Sequence[PreTrainedModel], prompt: Tensor, *, num_tokens: int, repeats: int
) -> list[float]:
    """Median generated tokens per second of each model, greedily after a prompt [1, T], prefill included.

    The models are timed in turn, after one round of warm-up, so that a drift of the machine's speed meets all alike.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for round_ in range(repeats + 1):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            generated = model.generate(
                prompt.to(model.device),
                attention_mask=torch.ones_like(prompt, device=model.device),
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
            )
            generated.cpu()  # waits for the device
            if round_:
                times.append(time.perf_counter() - start)
    return [num_tokens / statistics.median(times) for times in seconds]
