"""The subjects of an evaluation: a model as it is, some masks of it, or the removals of a run."""

from __future__ import annotations

from dataclasses import dataclass

from blockpruner.engine.blocks import Mask
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.errors import UserError
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.searching.reading import read_removals
from blockpruner.showing.console import Reporter


@dataclass(frozen=True)
class Subject:
    """One row of the results."""

    name: str
    """Name for messages."""
    mask: Mask
    num_remove: int | None = None
    """Number of removals of the run."""
    ratio: float | None = None
    """Share of the parameters that is removed."""


@dataclass(frozen=True)
class Subjects:
    rows: tuple[Subject, ...]
    revision: str | None
    """Revision of the model."""
    dtype: str | None = None
    """The dtype in which the run searched the model."""
    channels: ChannelOrder | None = None
    """The order of the channels, if the run removed groups of them."""


def subjects_of(config: EvaluationConfig, masks: tuple[Mask, ...], reporter: Reporter) -> Subjects:
    """Return what to evaluate. masks: masks to use instead of the removals of a run."""
    if config.run is None:
        named = (f"{config.model} without {mask}" if mask.absent else f"{config.model}, dense" for mask in masks)
        rows = [Subject(name, mask) for name, mask in zip(named, masks, strict=True)]
        return Subjects(tuple(rows) or (Subject(config.model, Mask()),), config.revision)
    removals, revision = read_removals(config.run, config.source, reporter.say)
    steps = removals.steps
    if not steps and not config.num_remove:
        raise UserError(
            f"expected a run that removed blocks, got {str(config.run)!r} without steps; use `num_remove=0` to "
            f"evaluate the dense model."
        )
    numbers = tuple(dict.fromkeys(config.num_remove or (len(steps),)))
    if wrong := [number for number in numbers if not 0 <= number <= len(steps)]:
        raise UserError(f"expected `num_remove` from 0 to {len(steps)} (the steps in {config.run}), got {wrong[0]}.")
    for number in numbers:
        removals.warn_if_unscored(number, reporter.say)
    found = (
        Subject(
            f"{number} removed" if number else "dense",
            Mask.of(removals.order[:number]),
            number,
            steps[number - 1]["ratio"] if number else 0.0,
        )
        for number in numbers
    )
    return Subjects(tuple(found), revision, removals.summary["dtype"], removals.channels)
