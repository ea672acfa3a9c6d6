"""Compensates a pruned model in memory, with the dense model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from blockpruner.compensating.choosing import Found, Split, fit_and_choose
from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.calibration import Windows
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.compensation.config import Fit
from blockpruner.engine.compensation.fitting import NO_COST
from blockpruner.engine.compensation.projections import Weights
from blockpruner.engine.compensation.replica import TOKENS_PER_CALL, CompensationReplica
from blockpruner.engine.compensation.stages import FittedStage
from blockpruner.engine.compensation.surgery import mask_of, put_changed, weights_of
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.scoring.scorer import LocalScorer
from blockpruner.showing.console import Reporter


def compensate_in_memory(
    pruned: PreTrainedModel,
    dense: PreTrainedModel,
    windows: Windows,
    fit: Fit,
    reporter: Reporter,
    kept: ChannelOrder | None = None,
) -> tuple[PreTrainedModel, Found]:
    """Return a compensated copy of a model from `surgery.prune`, and what was found. It shares all weights that did not
    change with `dense`. kept: the channels that its narrower MLPs have.

    Raises UserError if `pruned` was not made from `dense`, or has other weights by now.
    """
    decoder = Decoder(dense)
    mask = Mask(mask_of(pruned, decoder.shape).absent - decoder.shape.missing)
    compensated = prune(dense, mask, kept)
    _check_made_from(pruned, compensated)
    split = Split.of(windows)
    layers, tokens_per_call = decoder.architecture.layers, TOKENS_PER_CALL[decoder.device.type]
    replica = CompensationReplica(decoder, split.both, mask, tokens_per_call, kept=kept if mask.lacking else None)

    def weights(stages: Sequence[FittedStage]) -> Mapping[Block, Weights]:
        return weights_of(compensated, stages, layers)

    try:
        found = fit_and_choose(fit, LocalScorer(replica), weights, split, NO_COST, reporter)
    finally:
        replica.release()
    put_changed(compensated, found.stages, layers, found.changed)
    return compensated, found


def _check_made_from(pruned: PreTrainedModel, again: PreTrainedModel) -> None:
    """Raise UserError unless a model has the weights of one that was pruned again from the dense model."""
    weights: dict[str, Any] = again.state_dict()
    for name, weight in pruned.state_dict().items():
        if name not in weights or weight.shape != weights[name].shape or not torch.equal(weight, weights[name]):
            raise UserError(
                f"expected a model that `prune` made from `dense`, got one with another {name!r}; compensate before "
                f"other changes, and with the same dense model."
            )
