"""The order of channels and heads in a run directory: computed once, before the first score, and found there again."""

from __future__ import annotations

import time
from pathlib import Path

from blockpruner.engine.blocks import Mask, OrderedBy
from blockpruner.engine.channels import CHANNELS_FILE, ChannelOrder
from blockpruner.engine.errors import UserError
from blockpruner.engine.scoring.narrowing import channel_order
from blockpruner.engine.scoring.scorer import Scorer
from blockpruner.files import replacing
from blockpruner.searching.records import ChannelsRecord
from blockpruner.searching.resolving import Job
from blockpruner.searching.run import RunDirectory
from blockpruner.searching.telling import Telling


def order_of_run(job: Job, run: RunDirectory, telling: Telling, scorer: Scorer, by: OrderedBy) -> ChannelOrder:
    """Return the recorded order, or compute it and record it. Raises UserError if it can no longer be had."""
    recorded, path = next(iter(run.all(ChannelsRecord)), None), run.path / CHANNELS_FILE
    if recorded is not None:
        if (kept := _read(path, recorded)) is not None:
            return kept
        telling.note("the order of the channels is not there; computing it again")
    start, windows = time.perf_counter(), job.windows
    flops = job.shape.forward_flops(Mask(), windows.seq_len)
    order = channel_order(scorer, windows.num_windows, flops, job.space.units.cut, by)
    if recorded is not None and order.digest != recorded.digest:
        raise UserError(
            f"the channels come in another order than when {str(run.path)!r} was written: the model, the library "
            f"versions or the processor have changed. Restore {CHANNELS_FILE}, or choose another `out`."
        )
    with replacing(path) as aside:
        order.write(aside)
    if recorded is None:
        wall_s = time.perf_counter() - start
        num_tokens = 0 if by is OrderedBy.WEIGHTS else windows.tokens.numel()
        run.append(ChannelsRecord.of(digest=order.digest, num_tokens=num_tokens, wall_s=wall_s))
        telling.note(f"ordered the groups of {len(order.channels)} blocks by importance ({wall_s:.1f} s)")
    return order


def has_lost_order(run: RunDirectory) -> bool:
    """Whether the file with the order that a run recorded is missing or damaged."""
    return any(_read(run.path / CHANNELS_FILE, recorded) is None for recorded in run.all(ChannelsRecord))


def _read(path: Path, recorded: ChannelsRecord) -> ChannelOrder | None:
    try:
        order = ChannelOrder.read(path)
    except UserError:  # missing or damaged
        return None
    return order if order.digest == recorded.digest else None
