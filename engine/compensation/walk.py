"""Lead two streams through a model side by side: that of the dense model, and that of the pruned one with its changed
weights. The model's own code runs; the dense weights stay where they are.

Shapes: N sequences, T tokens, H hidden size, D input size of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.compensation.projections import Projection, Weights, applied, hooked, run_block
from blockpruner.engine.compensation.stages import Stage
from blockpruner.engine.model.decoder import Decoder

Changed = Mapping[Block, Weights]
DENSE = Mask()


@dataclass(frozen=True)
class Seen:
    """What went through a projection."""

    input: Tensor
    """[N, T, D]"""
    output: Tensor
    """[N, T, H], with the weights that the block had."""


def run_stage(
    decoder: Decoder,
    stage: Stage,
    stream: Tensor,
    projections: Mapping[Block, Projection],
    changed: Changed,
    mask: Mask = DENSE,
) -> tuple[Tensor, dict[Block, Seen]]:
    """Run some blocks that read the same stream [N, T, H]. Works only inside `decoder.selective()`.

    Returns the stream after them, and what went through those projections that are in `projections`. Blocks in
    `changed` use other weights. mask: blocks lack the groups that it lacks.
    """
    if not stage:
        return stream, {}
    stream = stream.to(decoder.layer_devices[stage[0].layer])
    seen: dict[Block, Seen] = {}
    after, lacking = stream, mask.lacking
    for block in stage:
        run = partial(run_block, decoder, block, stream, lacking.get(block, 0))
        if block in projections:
            found, seen[block] = _run_watched(run, stream, projections[block], changed.get(block))
        else:
            found = run()
        after = found if after is stream else after + (found - stream)
    return after, seen


def _run_watched(
    run: Callable[[], Tensor], stream: Tensor, projection: Projection, weights: Weights | None
) -> tuple[Tensor, Seen]:
    seen: list[Seen] = []

    def look(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if weights is not None:
            output = applied(weights, arguments[0], is_transposed=projection.is_transposed)
        shape = stream.shape[:2]  # some layers flatten sequences and tokens
        seen.append(Seen(arguments[0].view(*shape, -1), output.view(*shape, -1)))
        return output

    with hooked(projection.module, look):
        found = run()
    return found, seen[0]
