"""What a search will cost, before it runs: counted work, and time at a given rate."""

from __future__ import annotations

from dataclasses import dataclass

from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.scoring.rate import Rate
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.units import KernelShape, WorkUnit, makespan, split_work


@dataclass(frozen=True)
class Forecast:
    num_steps: int
    num_candidates: int
    """In all steps together."""
    work_flops: int
    naive_work_flops: int
    """Of the plain loop: a full forward a candidate."""
    seconds: float
    naive_seconds: float


def forecast_greedy(
    shape: ModelShape,
    *,
    blocks: Granularity,
    budget: Budget,
    kernel: KernelShape,
    num_windows: int,
    seq_len: int,
    num_replicas: int,
    rate: Rate,
    sweep_s: float = 0.0,
) -> Forecast:
    """The units of every step are made as in a run and dealt to replicas, longest first.

    Which blocks go is not known: they are taken from all over the model, which moves the work by a few percent.
    sweep_s: the least that one unit takes, since a streamed model's weights must come by.
    """
    space, mask = SearchSpace(shape=shape, blocks=blocks, budget=budget), Mask()
    work = naive = num_candidates = num_steps = 0
    seconds = naive_seconds = 0.0
    while candidates := space.candidates(mask):
        masks = [candidate.mask for candidate in candidates]
        units = split_work(
            masks, shape, kernel, groups=[range(num_windows)], seq_len=seq_len, num_replicas=num_replicas
        )
        work += sum(unit.flops for unit in units)
        seconds += makespan([max(sweep_s, unit_seconds(unit, shape, rate, seq_len)) for unit in units], num_replicas)
        step_naive = num_windows * sum(shape.forward_flops(mask, seq_len) for mask in masks)
        head = num_windows * len(masks) * shape.head_flops(seq_len)
        naive += step_naive
        naive_s = max(rate.seconds(step_naive - head, head), sweep_s * len(masks) * num_windows)
        naive_seconds += naive_s / num_replicas
        num_candidates += len(masks)
        mask = candidates[num_steps * 7 % len(candidates)].mask
        num_steps += 1
    return Forecast(num_steps, num_candidates, work, naive, seconds, naive_seconds)


def unit_seconds(unit: WorkUnit, shape: ModelShape, rate: Rate, seq_len: int) -> float:
    head = len(set(unit.masks)) * (unit.stop - unit.first) * shape.head_flops(seq_len)
    return rate.seconds(unit.flops - head, head)
