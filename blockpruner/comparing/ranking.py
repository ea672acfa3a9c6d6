"""The methods that order blocks by a statistic: one pass over the text, or one a removal, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psutil

from blockpruner.cluster.preflight import device_bytes
from blockpruner.comparing.alone import alone
from blockpruner.comparing.methods import Ranked
from blockpruner.engine.blocks import Mask
from blockpruner.engine.methods.ranking import rank
from blockpruner.engine.model.holding import devices_of, load_decoder
from blockpruner.engine.work.memory import Placement, resolve_placement, smallest_sweep_bytes
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.resolving import Job
from blockpruner.showing.console import Reporter


def rank_blocks(
    how: Ranked, config: SearchConfig, reporter: Reporter, loaded: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """The removals, with the ratio that each leads to and the work until it was known. loaded: called before the first
    pass over the text."""
    with alone(str(how.statistic), config, reporter) as job:
        decoder = load_decoder(job.model, job.dtype, _placement(config, job), devices_of(job.device, 1))
        decoder.check()
        space, mask = config.space(job.shape), Mask()
        loaded()
        num_windows = job.windows.num_windows
        with reporter.bar(str(how.statistic), num_windows * (space.num_steps_left(mask) if how.again else 1)):
            order = rank(
                decoder,
                job.windows.tokens,
                space,
                how.statistic,
                again=how.again,
                on_window=lambda: reporter.advance(1),
            )
            for removal in order:
                mask = mask.without(removal.block)
                if how.again:  # how many it takes to a ratio is known at the end only
                    reporter.expect(reporter.done + num_windows * space.num_steps_left(mask))
                yield {
                    "block": removal.block.to_json(),
                    "ratio": job.shape.ratio(mask),
                    "work_flops": removal.work_flops,
                }


def _placement(config: SearchConfig, job: Job) -> Placement:
    """One pass needs one device: what does not fit it is streamed."""
    working_bytes = smallest_sweep_bytes(job.shape, seq_len=job.windows.seq_len, bytes_per_value=job.bytes_per_value)
    placement, _ = resolve_placement(
        config.placement,
        job.sizes,
        device_bytes(job.device) or psutil.virtual_memory().available,
        on_gpu=job.device == "cuda",
        gpus_per_replica=1 if job.device == "cuda" else None,
        gpus_per_node=1,
        working_bytes=working_bytes,
    )
    return placement
