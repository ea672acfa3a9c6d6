"""Whether groups can be removed from blocks: tried on a few tokens against the whole module with zeros for them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from blockpruner.engine.blocks import Block, Kind, Units
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import NUM_TOKENS, is_close
from blockpruner.engine.model.outputs import failures_told
from blockpruner.engine.model.selecting import RowChoice

WHAT = {Kind.MHA: "attention whose heads", Kind.MLP: "MLP whose channels"}
COUNTED = {Kind.MHA: "KV heads", Kind.MLP: "channels"}
BLOCKS = {Kind.MHA: "attention", Kind.MLP: "MLP"}


@torch.inference_mode()
def check_narrowable(decoder: Decoder, kinds: Collection[Kind] = (Kind.MLP,)) -> None:
    """Check for each block of some kinds whose groups can be removed, by the names of its linear layers, that its
    module on slices of its weights gives what the whole module gives with zeros for the other channels or heads.
    Raises UserError if not, or if there is no such block, which names the units that can be removed.

    Costs a few passes over a few tokens.
    """
    if why := _why_not(decoder, kinds):
        others = (units for units in (Units.CHANNELS, Units.HEADS) if {*units.cut} != {*kinds})
        fitting = [f"`units={units}` or " for units in others if not _why_not(decoder, units.cut)]
        raise UserError(f"{why}; use {''.join(fitting)}`units=blocks`.")


def _why_not(decoder: Decoder, kinds: Collection[Kind]) -> str:
    """Return why groups of blocks of some kinds cannot be removed; empty if they can."""
    name = f"model type {decoder.model.config.model_type!r}"
    if not any(block.kind in kinds for block in decoder.narrow):
        what = " or ".join(WHAT[kind] for kind in kinds)
        return (
            f"{name} has no {what} can be removed: they are experts, are computed by the layer itself, or their linear "
            f"layers have unknown names"
        )
    try:
        with failures_told(f"parts of blocks cannot be removed from {name}, which fails with"):
            _check(decoder, name, kinds)
    except UserError as error:
        return str(error)
    return ""


def _check(decoder: Decoder, name: str, kinds: Collection[Kind]) -> None:
    ids = torch.arange(2 * NUM_TOKENS, device=decoder.device).view(2, -1) % decoder.model.config.vocab_size
    stream = decoder.embed(ids)
    with decoder.selective():
        for layer, device in enumerate(decoder.layer_devices):
            stream = stream.to(device)
            for block in (Block(kind, layer) for kind in kinds):
                if block in decoder.narrow:
                    _check_block(decoder, block, stream, name)
            stream = decoder.run_layer(layer, stream)


def _check_block(decoder: Decoder, block: Block, stream: Tensor, name: str) -> None:
    none, narrow = RowChoice.nobody(stream), decoder.narrow[block]
    lacks = narrow.num_groups // 2
    width = decoder.shape.width(block, lacks)

    def run(choice: RowChoice | None) -> Tensor:
        of_mlp = block.kind is Kind.MLP
        return decoder.run_layer(
            block.layer, stream, attention=none if of_mlp else choice, mlp=choice if of_mlp else none
        )

    found, dense = run(RowChoice.lacking(stream, lacks)), run(None)

    def without_others(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        places = torch.arange(args[0].shape[-1], device=args[0].device)
        kept = places < width * narrow.sizes[narrow.linears.outward]
        return (torch.where(kept, args[0], torch.zeros_like(args[0])), *args[1:])

    handle = narrow.outward.register_forward_pre_hook(without_others)
    try:
        expected = run(None)
    finally:
        handle.remove()
    if not is_close(found, expected, (expected - dense).double().norm()):
        raise UserError(
            f"{name}: with {width} of the {narrow.num_channels} {COUNTED[block.kind]} of its {BLOCKS[block.kind]}, "
            f"layer {block.layer} does not give what it gives with zeros for the others, so parts of blocks cannot be "
            f"removed"
        )
