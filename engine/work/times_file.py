"""The file in which `times` writes what blocks cost in time, and from which a search reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from blockpruner.engine.blocks import NUM_GROUPS, Block, Kind
from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import read_json
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.times import BlockTimes, TimeOf

Ms = Annotated[float, Field(ge=0)]


class Costs(TypedDict):
    dense: Annotated[float, Field(gt=0)]
    mha: list[Ms]
    mlp: list[Annotated[list[Ms], Field(min_length=1, max_length=NUM_GROUPS)]]


class TimesFile(TypedDict):
    model: str
    fingerprint: str | None
    setting: dict[str, Any]
    """Device, dtype, threads and workload."""
    decode: Costs
    prefill: Costs
    both: Costs


def costs_of(times: BlockTimes) -> Costs:
    return {"dense": times.dense, "mha": list(times.mha), "mlp": [list(widths) for widths in times.mlp]}


def read_times(file: Path) -> TimesFile:
    """Raises UserError if the file is missing or damaged."""
    if not file.is_file():
        raise UserError(f"expected a table that `blockpruner times` wrote, got {str(file)!r}, which is no file.")
    found: TimesFile = read_json(file, TimesFile, "measure again", called=f"the table of times in {str(file)!r}")
    return found


def times_in(found: TimesFile, of: TimeOf, shape: ModelShape, file: Path) -> BlockTimes:
    """Return the times of a model of this shape. Raises UserError if they are of another one."""
    costs: Costs = found[of.value]
    numbers = [len(widths) for widths in costs["mlp"]]
    mlps = (Block(Kind.MLP, layer) for layer in range(shape.num_layers))
    fitting = [NUM_GROUPS if shape.can_narrow(block) else 1 for block in mlps]
    if len(costs["mha"]) != shape.num_layers or numbers != fitting:
        raise UserError(f"expected times of a model with {shape.num_layers} layers like this one in {str(file)!r}.")
    return BlockTimes(costs["dense"], tuple(costs["mha"]), tuple(map(tuple, costs["mlp"])))
