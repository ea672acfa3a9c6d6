"""The plain loop: one full forward per candidate, with the block physically absent. Fast paths are tested against
it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Block, Granularity, Mask
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.score import Score


@torch.inference_mode()
def plain_score(model: PreTrainedModel, mask: Mask, windows: Tensor, order: ChannelOrder | None = None) -> Score:
    """Score a mask with the model's own forward, one window of `windows` [W, T] at a time, as the official code does.

    order: which channels the groups of the mask are.
    """
    pruned = prune(model, mask, order) if mask.absent else model
    return Score(mask, tuple(plain_window_sum(pruned, window) for window in windows), windows.shape[1] - 1)


@torch.inference_mode()
def plain_window_sum(model: PreTrainedModel, window: Tensor) -> float:
    """Sum the token NLLs of one window [T] from one full forward."""
    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, window[1:], reduction="none").sum(dtype=torch.float64).item()


def plain_search(
    model: PreTrainedModel, windows: Tensor, num_remove: int, blocks: Granularity = Granularity.MIX
) -> list[tuple[Block, Score]]:
    """The official search: one full forward for every remaining candidate, in order, compared with strict `<`."""
    mask, removed = Mask(), []
    candidates = blocks.candidates(model.config.num_hidden_layers)
    for _ in range(num_remove):
        best: tuple[Block, Score] | None = None
        for block in candidates:
            score = plain_score(model, mask.without(block), windows)
            if best is None or score.value < best[1].value:
                best = block, score
        assert best is not None
        removed.append(best)
        mask = mask.without(best[0])
        candidates.remove(best[0])
    return removed
