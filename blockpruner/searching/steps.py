"""The removals of a run, as listed in run.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.work.times_file import Costs, block_times
from blockpruner.searching.content import StepSummary
from blockpruner.searching.records import ResultRecord, RoundRecord, StepRecord

SPENT = ("work_flops", "naive_work_flops", "wall_s")


def steps_of(
    steps: Sequence[StepRecord], rounds: Sequence[RoundRecord], results: Sequence[ResultRecord]
) -> list[StepSummary]:
    """Return the steps, or those of a result record if there is one. The last step then includes the work of rounds."""
    taken: list[Any] = [step.values() for step in steps]
    if not results:
        return taken
    found: list[Any] = []
    for number, values in enumerate(results[-1].steps, start=1):
        same = taken[number - 1] if number <= len(taken) else None
        spent = {key: same[key] if same else 0 for key in (*SPENT, "num_candidates", "num_scored")}
        found.append({"step": number, **values, **spent})
    for key in SPENT:
        beyond = taken[len(found) :]
        found[-1][key] += sum(getattr(one, key) for one in rounds) + sum(step[key] for step in beyond)
    return found


def timed(steps: Sequence[StepSummary], costs: Costs) -> list[StepSummary]:
    """Return the steps with what the model is expected to take after each of them."""
    times, order = block_times(costs), [block_of(step) for step in steps]
    return [{**step, "ms": times.without(Mask.of(order[:number]))} for number, step in enumerate(steps, start=1)]


def block_of(step: StepSummary) -> Block:
    """Return the block (or layer) that a step of run.json removed."""
    return Block.from_json(step["block"])
