"""Logits to losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, in nats.

    logits: [..., vocab] in any float type; targets: [...] token ids. Returns [...] in float32 (float64 for float64
    logits): half-precision log-softmax would lose the differences between candidates.
    """
    nll = F.cross_entropy(_wide(logits).flatten(0, -2), targets.flatten(), reduction="none")
    return nll.view(targets.shape)


def token_kl(logits: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || pruned) of each token's next-token distribution, in nats. Both [..., vocab]; returns [...]."""
    log_p, log_q = F.log_softmax(_wide(dense), dim=-1), F.log_softmax(_wide(logits), dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def token_js(logits: Tensor, dense: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each token's two next-token distributions, in nats: the mean of KL(dense || M) and
    KL(pruned || M), where M is their mean; at most ln 2. (FinerCut's code takes KL(M || .) instead, although its text
    says Jensen-Shannon.) Both [..., vocab]; returns [...]."""
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
