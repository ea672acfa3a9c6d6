"""The removal order in the format of the official program, `*_del_order_list.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from blockpruner.engine.blocks import Block, Mask
from blockpruner.engine.channels import CHANNELS_FILE, ChannelOrder
from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import BlockPair, read_json


def official_sequence(removed: list[Block]) -> dict[str, list[list[str | int]]]:
    """Return the content of `*_del_order_list.json`: a dict from step to all blocks removed so far, sorted by layer."""
    sequence: dict[str, list[list[str | int]]] = {}
    for step in range(1, len(removed) + 1):
        parts = sorted(Mask.of(removed[:step]).absent, key=lambda part: part.depth)
        sequence[str(step)] = [part.to_json() for part in parts]
    return sequence


def read_official_sequence(path: Path) -> list[Block]:
    """Read the removal order from a `*_del_order_list.json`, as the differences between successive steps."""
    expected = 'expected the official format {"1": [["mha", 25]], "2": ...}'
    steps = read_json(path, Annotated[dict[str, list[BlockPair]], Field(min_length=1)], expected)
    sets: list[set[Block]] = []
    for step in range(1, len(steps) + 1):
        if str(step) not in steps:
            raise UserError(f"{str(path)!r} is damaged ('{step}' is missing); {expected}.")
        listed = [Block.from_json(pair) for pair in steps[str(step)]]
        if len(Mask.of(listed).absent) < sum(len(block.parts) for block in listed):  # Mask.of checks groups of channels
            raise UserError(f"{str(path)!r} is damaged (step {step} has a block twice); {expected}.")
        sets.append(set(listed))
    order: list[Block] = []
    before: set[Block] = set()
    for step, blocks in enumerate(sets, start=1):
        new = sorted(blocks - before, key=lambda block: block.depth)
        if not new or {block for block in before - blocks if block.whole not in new}:
            raise UserError(f"expected step {step} of {str(path)!r} to add to the step before it; it does not.")
        order += new
        before = blocks
    return order


def order_beside(path: Path, removed: list[Block]) -> ChannelOrder | None:
    """Return the order of the channels from the folder of a removal order, if groups of channels are removed. Raises
    UserError if it is not there."""
    return ChannelOrder.read(path.parent / CHANNELS_FILE) if any(block.part for block in removed) else None
