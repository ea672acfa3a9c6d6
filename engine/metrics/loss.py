"""Logits to losses.

Half-precision logits are widened before log-softmax: else the differences between candidates would be lost. That is
done for some tokens at a time: on a CPU so that the wide copies stay in cache (a copy of all logits costs as much time
as the product that made them), on a GPU so that they take little memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

CACHED_BYTES = 2 * 2**20
"""Of wide logits at a time, on a CPU."""
GPU_BYTES = 64 * 2**20
"""The same on a GPU: enough to keep it busy (not measured)."""


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, in nats.

    logits: [..., vocab] in any float type; targets: [...] token ids. Returns [...] in float32 (float64 for float64
    logits).
    """
    return _by_parts(lambda some, of: F.cross_entropy(_wide(some), of, reduction="none"), logits, targets)


def token_kl(logits: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || pruned) of each token's next-token distribution, in nats. Both [..., vocab]; returns [...]."""
    return _by_parts(_kl, logits, dense)


def token_js(logits: Tensor, dense: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each token's two next-token distributions, in nats: the mean of KL(dense || M) and
    KL(pruned || M), where M is their mean; at most ln 2. (FinerCut's code takes KL(M || .) instead, although its text
    says Jensen-Shannon.) Both [..., vocab]; returns [...]."""
    return _by_parts(_js, logits, dense)


def _by_parts(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, other: Tensor) -> Tensor:
    """`loss` of logits [..., vocab] and what belongs to each of their tokens; returns [...]. A token's loss is the same
    in any part."""
    tokens, others = logits.flatten(0, -2), other.flatten(0, logits.ndim - 2)
    wide_bytes = 4 * logits.shape[-1]
    size = max(1, (CACHED_BYTES if logits.device.type == "cpu" else GPU_BYTES) // wide_bytes)
    parts = [loss(*part) for part in zip(tokens.split(size), others.split(size), strict=True)]
    return torch.cat(parts).view(logits.shape[:-1])


def _kl(logits: Tensor, dense: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(_wide(dense), dim=-1), F.log_softmax(_wide(logits), dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def _js(logits: Tensor, dense: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(_wide(dense), dim=-1), F.log_softmax(_wide(logits), dim=-1)
    log_mean = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    return (
        sum(
            (F.kl_div(log_mean, log, reduction="none", log_target=True).sum(dim=-1) for log in (log_p, log_q)),
            start=log_p.new_zeros(()),
        )
        / 2
    )


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
