"""The file in which `times` writes what blocks cost in time, and from which a search reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from blockpruner.engine.blocks import Block, Kind
from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import read_json
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.times import BlockTimes

Ms = Annotated[float, Field(ge=0)]


class Costs(TypedDict):
    dense: Annotated[float, Field(gt=0)]
    mha: list[Annotated[list[Ms], Field(min_length=1)]]
    """By layer and number of groups."""
    mlp: list[Annotated[list[Ms], Field(min_length=1)]]


class TimesFile(TypedDict):
    model: str
    fingerprint: str | None
    setting: dict[str, Any]
    """Device, dtype, threads and workload."""
    decode: Costs
    prefill: Costs
    both: Costs


def costs_of(times: BlockTimes) -> Costs:
    return {"dense": times.dense, "mha": [*map(list, times.mha)], "mlp": [*map(list, times.mlp)]}


def block_times(costs: Costs) -> BlockTimes:
    return BlockTimes(costs["dense"], tuple(map(tuple, costs["mha"])), tuple(map(tuple, costs["mlp"])))


def read_times(file: Path) -> TimesFile:
    """Raises UserError if the file is missing or damaged."""
    if not file.is_file():
        raise UserError(f"expected a table that `blockpruner times` wrote, got {str(file)!r}, which is no file.")
    found: TimesFile = read_json(file, TimesFile, "measure again", called=f"the table of times in {str(file)!r}")
    return found


def times_of(costs: Costs, shape: ModelShape, file: Path) -> BlockTimes:
    """Return the times of a model of this shape. Raises UserError if they are of another one."""
    times = block_times(costs)
    layers = range(shape.num_layers)
    if [[shape.num_groups(Block(kind, layer)) for layer in layers] for kind in (Kind.MHA, Kind.MLP)] != [
        [len(widths) for widths in of_kind] for of_kind in (times.mha, times.mlp)
    ]:
        raise UserError(f"expected times of a model with {shape.num_layers} layers like this one in {str(file)!r}.")
    return times
