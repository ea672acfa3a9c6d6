"""Logits to token NLL."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, in nats.

    logits: [..., vocab] in any float type; targets: [...] token ids. Returns [...] in float32 (float64 for float64
    logits): half-precision log-softmax would lose the differences between candidates.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return nll.view(targets.shape)
