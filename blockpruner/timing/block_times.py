"""Measures what the blocks of a model cost in time on this device, and writes the table that a search can go by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockpruner.cluster.nodes import local_cpus
from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge.block_times import ms_of
from blockpruner.engine.judge.latency import Generation, generate_in_turn
from blockpruner.engine.model.identity import identity
from blockpruner.engine.model.loading import load_model, materialize, resolve_device, resolve_dtype
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.work.times import UNIT, TimeOf
from blockpruner.engine.work.times_file import block_times
from blockpruner.files import check_file, write_json
from blockpruner.searching.reading import read_removals
from blockpruner.searching.tables import measure_table, setting_of
from blockpruner.showing.console import Reporter
from blockpruner.showing.tables import numbers_table
from blockpruner.timing.times_config import TimesConfig
from blockpruner.timing.timing import check_workload


def measure_times(config: TimesConfig, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Write the table to `out`, and return what `times --json` prints."""
    check_file(out)
    removals = None if config.run is None else read_removals(config.run, config.source, reporter.say)[0]
    config = config if removals is None else config.like(removals.summary.get("times_setting", {}))
    if removals is not None and not removals.order:
        raise UserError(f"expected a run with at least one removal, got {str(config.run)!r}, which has none yet.")
    place, workload = resolve_device(config.device), config.workload
    identified = identity(config.source)
    source = identified.at(config.source)
    dtype, reason = resolve_dtype(config.dtype, source, place)
    reporter.say(f"model {config.model} in {dtype} ({reason}) on {place}")
    source = materialize(source, dtype, reporter.say)
    check_workload(source, workload)
    setting = setting_of(str(place), dtype, config.threads or local_cpus(), config.repeats, workload)
    model = load_model(source, dtype, place)
    table = measure_table(model, identified, setting, reporter)
    write_json(out, table)
    reporter.say(f"the table is in {out}")
    if removals is None:
        return {**table}
    mask = Mask.of(removals.order)
    pruned = prune(model, mask, removals.channels)
    generations = [Generation(one, workload) for one in (model, pruned)]
    with reporter.bar("timing", total=2 * (config.repeats + 1)):
        rounds = generate_in_turn(generations, config.repeats, lambda: reporter.advance(1))
    measured = {of: ms_of(rounds, of, workload) for of in TimeOf}
    check = {of.value: _checked(block_times(table[of.value]).share(mask), measured[of]) for of in TimeOf}
    if (forecast := removals.expected_ms(len(removals.order))) is not None:
        of = TimeOf(forecast["for"])
        check["search"] = _checked(1 - forecast["pruned"] / forecast["dense"], measured[of])
        reporter.say(
            f"the search expected {forecast['pruned']:.4g} ms {UNIT[of]}, {forecast['dense']:.4g} for the dense model"
        )
    grid = numbers_table(f"without {len(removals.order)} removals, ms", "expected", "measured", "difference")
    for name, found in check.items():
        grid.add_row(
            f"{forecast['for']}, by the table of the search" if forecast and name == "search" else name,
            f"{found['expected']:.2f}", f"{found['measured']:.2f}",
            f"{found['measured'] / found['expected'] - 1:+.1%}",
        )  # fmt: skip
    reporter.console.print(grid)
    return {**table, "run": check}


def _checked(share: float, measured: list[float]) -> dict[str, float]:
    """Compare with the expectation, for a dense model as fast as in these rounds: machines drift. share: of its time
    that is expected to go."""
    dense, pruned = measured
    return {"expected": dense * (1 - share), "measured": pruned, "dense": dense}
