"""Compute losses from logits.

Half-precision logits are converted to float32 before log-softmax; otherwise the differences between candidates would be
lost. The conversion handles a few tokens at a time. On a CPU this keeps the float32 copies in cache (copying all logits
at once takes as long as the matmul that produced them); on a GPU it saves memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

CACHED_BYTES = 2 * 2**20
"""Bytes of float32 logits per part, on a CPU."""
GPU_BYTES = 64 * 2**20
"""Bytes of float32 logits per part, on a GPU: enough to keep it busy (not measured)."""


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
    """Jensen-Shannon divergence between the two next-token distributions of each token, in nats.

    It is the mean of KL(dense || M) and KL(pruned || M), where M is the mean of the distributions, and at most ln 2.
    (FinerCut's code computes KL(M || .) instead, although its paper says Jensen-Shannon.) Both [..., vocab]; returns
    [...].
    """
    return _by_parts(_js, logits, dense)


def _by_parts(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, other: Tensor) -> Tensor:
    """Apply `loss` to logits [..., vocab] and the per-token values `other`, part by part; returns [...]. A token's loss
    does not depend on its part."""
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
