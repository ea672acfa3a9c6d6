"""Measures what the blocks of a model cost in time on this device, and writes the table that a search can go by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from blockpruner.cluster.nodes import local_cpus
from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.block_times import measure_block_times, ms_of, sorts_of, told, variants
from blockpruner.engine.judge.latency import Generation, generate_in_turn
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.identity import identity
from blockpruner.engine.model.loading import load_model, materialize, resolve_device, resolve_dtype
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.work.times import BlockTimes
from blockpruner.engine.work.times_file import costs_of
from blockpruner.files import write_json
from blockpruner.searching.reading import read_removals
from blockpruner.showing.console import Reporter
from blockpruner.showing.tables import numbers_table
from blockpruner.timing.times_config import TimesConfig
from blockpruner.timing.timing import check_workload


def measure_times(config: TimesConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Write the table to `out`, and return what `times --json` prints."""
    if not out.parent.is_dir():
        raise UserError(f"expected a folder for `out`, got {str(out)!r}, whose folder does not exist.")
    removals = None if config.run is None else read_removals(config.run, config.source, reporter.say)[0]
    place, workload = resolve_device(config.device), config.part(Workload)
    dtype, reason = resolve_dtype(config.dtype, config.source, place)
    source = materialize(config.source, dtype, reporter.say)
    check_workload(source, workload)
    threads = config.threads or local_cpus()
    torch.set_num_threads(threads)
    model = load_model(source, dtype, place)
    decoder = Decoder(model)
    check_removable(decoder)  # as a search does
    shape = decoder.shape
    sorts = sorts_of(shape)
    number = len(variants(shape, sorts)) + 1
    reporter.say(
        f"{config.model} on {place} in {dtype} ({reason}), {threads} CPU threads: {workload.num_tokens} tokens after a "
        f"prompt of {workload.prompt_len}, batch size {workload.batch_size}; {number} models in turn, "
        f"{config.repeats} repeats after a warm-up"
    )
    with reporter.bar("generating", total=(config.repeats + 1) * number):
        times = measure_block_times(model, workload, config.repeats, lambda: reporter.advance(1))
    grid = numbers_table("milliseconds", "number", *(f"{of}" for of in times))
    grid.add_row("dense model", "", *(f"{one.dense:.2f}" for one in times.values()))
    for row in told(times, sorts):
        grid.add_row(*row)
    reporter.console.print(grid)
    named = identity(config.source)
    setting = {
        "device": str(place),
        "dtype": dtype,
        "threads": threads,
        "repeats": config.repeats,
        **workload.to_json(),
    }
    table = {
        "model": named.name, "fingerprint": named.fingerprint, "setting": {**setting, **workload.to_json()},
        **{of.value: costs_of(one) for of, one in times.items()},
    }  # fmt: skip
    write_json(out, table)
    reporter.say(f"the table is in {out}")
    if removals is None:
        return table
    mask = Mask.of(removals.order)
    pruned = prune(model, mask, removals.channels)
    generations = [Generation(one, workload) for one in (model, pruned)]
    with reporter.bar("generating", total=2 * (config.repeats + 1)):
        rounds = generate_in_turn(generations, config.repeats, lambda: reporter.advance(1))
    check = {of.value: _checked(one, ms_of(rounds, of, workload), mask) for of, one in times.items()}
    grid = numbers_table(f"without {len(removals.order)} removals, ms", "expected", "measured", "difference")
    for name, found in check.items():
        grid.add_row(
            name, f"{found['expected']:.2f}", f"{found['measured']:.2f}",
            f"{found['measured'] / found['expected'] - 1:+.1%}",
        )  # fmt: skip
    reporter.console.print(grid)
    return {**table, "run": check}


def _checked(times: BlockTimes, measured: list[float], mask: Mask) -> dict[str, float]:
    """Compare with the expectation, for a dense model as fast as in these rounds: machines drift."""
    dense, pruned = measured
    return {"expected": dense * (1 - times.share(mask)), "measured": pruned, "dense": dense}
