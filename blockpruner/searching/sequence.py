"""The removal order in the format of the official program, `*_del_order_list.json`."""

from __future__ import annotations

import json
from pathlib import Path

from blockpruner.engine.blocks import Block, Kind
from blockpruner.engine.errors import UserError


def official_sequence(removed: list[Block]) -> dict[str, list[list[str | int]]]:
    """Return the content of `*_del_order_list.json`: a dict from step to all blocks removed so far, sorted by layer."""
    sequence: dict[str, list[list[str | int]]] = {}
    for step in range(1, len(removed) + 1):
        parts = [part for block in removed[:step] for part in block.parts]
        sequence[str(step)] = [part.to_json() for part in sorted(parts, key=lambda part: part.depth)]
    return sequence


def read_official_sequence(path: Path) -> list[Block]:
    """Read the removal order from a `*_del_order_list.json`, as the differences between successive steps."""
    try:
        steps = dict(json.loads(path.read_text(encoding="utf-8")))
        sets = [
            {Block(Kind(kind), int(layer)) for kind, layer in steps[str(step)]} for step in range(1, len(steps) + 1)
        ]
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'expected {str(path)!r} in the official format {{"1": [["mha", 25]], "2": ...}}; it is not ({error}).'
        ) from error
    if not sets:
        raise UserError(f"expected at least one step in {str(path)!r}, which has none.")
    if negative := [block for blocks in sets for block in blocks if block.layer < 0]:
        raise UserError(f"expected layers from 0 in {str(path)!r}, got {negative[0].layer}.")
    order: list[Block] = []
    for step, blocks in enumerate(sets, start=1):
        new = sorted(blocks - set(order), key=lambda block: block.depth)
        if not new or set(order) - blocks:
            raise UserError(f"expected step {step} of {str(path)!r} to add to the step before it; it does not.")
        order += new
    return order
