"""Probe whether a mask's score depends on which masks share its batch."""

from __future__ import annotations

from blockpruner.engine.blocks import Granularity, Mask, Units
from blockpruner.engine.scoring.scorer import OutOfMemory, Scorer
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.units import KernelShape, WorkUnit, make_unit

ALIGNED = 16
"""Kernels compute the last rows of a product in another way. Where a sequence begins among the rows depends on its
company, and with windows of 33 or 61 tokens one sum in some hundred had another last bit for it (float32, AVX-512)."""


def is_batch_invariant(
    scorer: Scorer,
    shape: ModelShape,
    kernel: KernelShape,
    *,
    num_windows: int,
    seq_len: int,
    removed: Units = Units.BLOCKS,
) -> bool | OutOfMemory[WorkUnit]:
    """Whether a mask gets the same bits alone and in a batch with other masks, on any replica. removed: what one
    removal takes.

    The probe scores three masks alone, and in a chunk that fills one whole call and part of another (if a sweep takes
    that many masks). The other masks of the chunk differ in the upper half of the layers, where a stream costs least.
    Always False for models that route tokens to experts: the number of tokens per expert depends on the whole batch,
    which no probe covers. Always False for Mamba and linear attention: they sum in an order that depends on the number
    of sequences, which changes bits so seldom that the probe can miss it. Always False for windows whose length is not
    a multiple of ALIGNED. Returns OutOfMemory if a unit did not fit.
    """
    if shape.routes_tokens or shape.has_recurrence or seq_len % ALIGNED:
        return False
    num_layers = shape.num_layers
    candidates = shape.candidates(Granularity.MIX)
    upper = [Mask.of([block]) for block in candidates if block.layer >= num_layers // 2]
    probes = list(dict.fromkeys([Mask(), upper[0], upper[-1]]))
    blocks = [block for block in candidates if block.layer >= num_layers // 2]
    cut = [block for block in blocks if block.kind in removed.cut and shape.can_narrow(block)]
    upper += [Mask.of(shape.groups(block)[:1]) for block in cut]
    probes += upper[-1:] if cut else []
    stop = min(kernel.windows, num_windows)
    num_others = min(len(upper), max(8, kernel.rows // stop))
    others = [upper[index * len(upper) // num_others] for index in range(num_others)]
    batch = list(dict.fromkeys([*probes, *others]))[: kernel.masks]
    probes = [mask for mask in probes if mask in batch]
    units = [make_unit(masks, 0, stop, shape, kernel, seq_len) for masks in (batch, *([mask] for mask in probes))]
    sums: dict[WorkUnit, list[list[float]]] = {}
    failed: OutOfMemory[WorkUnit] | None = None
    for result in scorer.run(units):
        if isinstance(result, OutOfMemory):
            failed = result
        else:
            sums[result.unit] = result.value
    if failed is not None:
        return failed
    together = sums[units[0]]
    # Compare as text, because NaN must count as equal to NaN here.
    return all(repr(sums[unit]) == repr([together[batch.index(unit.masks[0])]]) for unit in units[1:])
