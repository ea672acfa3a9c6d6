"""Measure what the blocks of a model cost in time: generations with and without some of them, in turn.

Blocks of one kind and size cost the same, so each kind is measured on every second one of its blocks at once.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.latency import Generation, Speeds, generate_in_turn
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.times import BlockTimes, TimeOf, rising

SHARES = (0.25, 0.5, 0.75)
"""Of a block's groups, with which it is measured. What other numbers cost lies between."""


@dataclass(frozen=True)
class Sort:
    """Blocks that cost the same."""

    name: str
    """What is told, such as `attention` or `mlp`."""
    blocks: tuple[Block, ...]
    left_out: tuple[Block, ...]
    """Those without which the model is measured; empty if none can be."""

    @property
    def first(self) -> Block:
        return self.blocks[0]


def sorts_of(shape: ModelShape) -> list[Sort]:
    """Return the blocks of a model by what they cost: their kind, the kind of mixer and their size."""
    alike: dict[tuple[str, int, int], list[Block]] = defaultdict(list)
    for block in shape.candidates(Granularity.MIX):
        of_block = shape.block(block)
        name = shape.mixer(block.layer) if block.kind is Kind.MHA else "mlp"
        alike[name, of_block.num_parameters, of_block.num_matmul_weights].append(block)
    found = []
    for (name, *_), blocks in alike.items():
        free = blocks[::2]
        if set(free) >= set(shape.last_mixers):  # a model must keep one of them
            free = free[:-1]
        found.append(Sort(name, tuple(blocks), tuple(free)))
    return found


def variants(shape: ModelShape, sorts: Sequence[Sort]) -> list[tuple[Sort, int, Mask]]:
    """Return the models to measure beside the dense one: of each sort the blocks that are left out, and the number of
    groups that they keep: none, and about a quarter, a half and three quarters."""
    found = []
    for sort in sorts:
        if not sort.left_out:
            continue
        found.append((sort, 0, Mask.of(sort.left_out)))
        number = shape.num_groups(sort.first)
        for kept in sorted({round(number * share) for share in SHARES} - {0, number}):
            gone = [group for block in sort.left_out for group in shape.groups(block)[: number - kept]]
            found.append((sort, kept, Mask.of(gone)))
    return found


def measure_block_times(
    model: PreTrainedModel, workload: Workload, repeats: int, done: Callable[[], None] = lambda: None
) -> dict[TimeOf, BlockTimes]:
    """Return what each block costs, in milliseconds, for each thing that can be timed: medians over the rounds of the
    difference between the dense model and one without some blocks.

    done: called after each generation, of which there are (repeats + 1) x (number of variants + 1). Raises UserError if
    a model without some blocks is not faster.
    """
    shape = Decoder(model).shape
    sorts = sorts_of(shape)
    others = variants(shape, sorts)
    order = _first_channels(shape)
    models = [model, *(prune(model, mask, order if mask.lacking else None) for _, _, mask in others)]
    rounds = generate_in_turn([Generation(one, workload) for one in models], repeats, done)
    times = {of: [[_ms(speeds, of, workload) for speeds in of_model] for of_model in rounds] for of in TimeOf}
    return {of: _times_of(shape, sorts, others, of_models) for of, of_models in times.items()}


def _first_channels(shape: ModelShape) -> ChannelOrder:
    """Any order does: which channels go does not change the time."""
    blocks = filter(shape.can_narrow, shape.candidates(Granularity.MIX))
    return ChannelOrder({block: np.arange(shape.block(block).num_channels, dtype=np.int32) for block in blocks})


def _ms(speeds: Speeds, of: TimeOf, workload: Workload) -> float:
    match of:
        case TimeOf.DECODE:
            return 1000 * workload.batch_size / speeds["decode_tokens_per_s"]
        case TimeOf.PREFILL:
            return 1000 * workload.batch_size * workload.prompt_len / speeds["prefill_tokens_per_s"]
    return 1000 * speeds[workload.generate_s]


def ms_of(rounds: Sequence[Sequence[Speeds]], of: TimeOf, workload: Workload) -> list[float]:
    """Return the median of each model, in milliseconds. rounds: by model and round."""
    return [statistics.median(_ms(speeds, of, workload) for speeds in of_model) for of_model in rounds]


def _times_of(
    shape: ModelShape, sorts: Sequence[Sort], others: Sequence[tuple[Sort, int, Mask]], times: Sequence[list[float]]
) -> BlockTimes:
    """times: milliseconds of the dense model and of each variant, round by round."""
    dense, *of_variants = times
    saved: dict[tuple[Block, int], float] = {}
    for (sort, kept, _), of_variant in zip(others, of_variants, strict=True):
        each = statistics.median(np.subtract(dense, of_variant)) / len(sort.left_out)
        saved[sort.first, kept] = float(each)
    costs: dict[Block, tuple[float, ...]] = {}
    for sort in sorts:
        whole = saved.get((sort.first, 0), 0.0)
        if sort.left_out and whole <= 0:
            raise UserError(
                f"expected a model without {len(sort.left_out)} of its {len(sort.blocks)} {sort.name} blocks to be "
                f"faster, but it was not; use more `repeats` or `num_tokens`, or an idle machine."
            )
        number = shape.num_groups(sort.first)
        measured = {kept: whole - saved[sort.first, kept] for kept in range(1, number) if (sort.first, kept) in saved}
        between = np.interp(range(1, number), [0, *measured, number], [0, *measured.values(), whole])
        costs |= dict.fromkeys(sort.blocks, rising([*between.tolist(), whole]) if whole else (0.0,) * number)
    layers = range(shape.num_layers)
    mha, mlp = (
        tuple(costs.get(block, (0.0,) * shape.num_groups(block)) for block in (Block(kind, n) for n in layers))
        for kind in (Kind.MHA, Kind.MLP)
    )
    return BlockTimes(statistics.median(dense), mha, mlp)


def told(times: Mapping[TimeOf, BlockTimes], sorts: Sequence[Sort]) -> list[list[str]]:
    """Return the rows of a table: each sort of blocks, their number, and what one of them costs."""
    rows = []
    for sort in sorts:
        widths = [of.widths(sort.first) for of in times.values()]
        rows.append([sort.name, str(len(sort.blocks)), *(f"{one[-1]:.3f}" for one in widths)])
        number = len(widths[0])
        for kept in range(number - 1, 0, -1):
            rows.append([f"  {kept} of {number} groups", "", *(f"{one[kept - 1]:.3f}" for one in widths)])
    return rows
