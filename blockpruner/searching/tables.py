"""Tables of what the blocks of a model cost in time: measured here, or read from a file that `times` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.block_times import measure_block_times, sorts_of, told, variants
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.identity import Identity
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.times import UNIT, BlockTimes, TimeOf
from blockpruner.engine.work.times_file import TimesFile, costs_of, read_times, times_of
from blockpruner.showing.console import Reporter
from blockpruner.showing.tables import numbers_table


@dataclass(frozen=True)
class Table:
    """What a search reads of a table."""

    times: BlockTimes
    setting: Mapping[str, Any]
    """Device, dtype, threads and workload with which it was measured. Empty if that is not known."""

    def tell(self, where: str, of: TimeOf, reporter: Reporter) -> None:
        shown = ("device", "dtype", "threads", "batch_size", "prompt_len", "num_tokens")
        known = ", ".join(f"{key} {self.setting[key]}" for key in shown if self.setting.get(key) is not None)
        reporter.say(
            f"{where}: the dense model takes {self.times.dense:.4g} ms ({UNIT[of]}){f' with {known}' if known else ''}"
        )


def setting_of(device: str, dtype: str, threads: int, repeats: int, workload: Workload) -> dict[str, Any]:
    """Return what a table says of how it was measured."""
    return {"device": device, "dtype": dtype, "threads": threads, "repeats": repeats, **workload.to_json()}


def read_table(file: Path, model: Identity, of: TimeOf, shape: ModelShape) -> Table:
    """Raises UserError if the file is missing or damaged, or the table of another model."""
    found = read_times(file)
    measured = Identity(found["model"], found["fingerprint"])
    if not measured.is_same(model):
        raise UserError(f"expected the times of {model} in {str(file)!r}, got those of {measured}; measure them.")
    return Table(times_of(found[of.value], shape, file), found["setting"])


def measure_table(model: PreTrainedModel, named: Identity, setting: Mapping[str, Any], reporter: Reporter) -> TimesFile:
    """Measure a model where it is, show the table, and return it. setting: from `setting_of`.

    Raises UserError if removing blocks has no clear meaning for the model, or if a model without some of them is not
    faster.
    """
    workload = Workload(**{name: setting[name] for name in Workload.model_fields})
    torch.set_num_threads(setting["threads"])
    decoder = Decoder(model)
    check_removable(decoder)
    sorts = sorts_of(decoder.shape)
    threads, of_cpu = setting["threads"], "CPU thread" + "s" * (setting["threads"] > 1)
    number, repeats = len(variants(decoder.shape, sorts)) + 1, setting["repeats"]
    reporter.say(
        f"timing {workload.num_tokens} tokens after a prompt of {workload.prompt_len}, batch size "
        f"{workload.batch_size}, on {setting['device']} in {setting['dtype']}, {threads} {of_cpu}: "
        f"{number} models in turn, {repeats} repeats after a warm-up"
    )
    with reporter.bar("timing", total=(repeats + 1) * number):

        def tell() -> None:
            reporter.advance(1)
            if reporter.done == number:
                reporter.say(f"warmed up; about {reporter.eta} left")

        times = measure_block_times(model, workload, repeats, tell)
    grid = numbers_table("milliseconds", "number", *(f"{of}" for of in times))
    grid.add_row("dense model", "", *(f"{one.dense:.2f}" for one in times.values()))
    for row in told(times, sorts):
        grid.add_row(*row)
    reporter.console.print(grid)
    return {
        "model": named.name,
        "fingerprint": named.fingerprint,
        "setting": dict(setting),
        "decode": costs_of(times[TimeOf.DECODE]),
        "prefill": costs_of(times[TimeOf.PREFILL]),
        "both": costs_of(times[TimeOf.BOTH]),
    }
