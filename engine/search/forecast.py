"""Forecast the cost of a search before it runs: FLOPs, and time at a given rate."""

from __future__ import annotations

from dataclasses import dataclass

from blockpruner.engine.blocks import Mask
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.scoring.rate import Rate
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.units import KernelShape, WorkUnit, makespan, split_work


@dataclass(frozen=True)
class Forecast:
    num_steps: int
    num_candidates: int
    """Total over all steps."""
    work_flops: int
    naive_work_flops: int
    """FLOPs of the plain loop, which runs one full forward per candidate."""
    seconds: float
    naive_seconds: float


def forecast_greedy(
    space: SearchSpace,
    *,
    metric: Metric = PPL,
    kernel: KernelShape,
    num_windows: int,
    seq_len: int,
    num_replicas: int,
    rate: Rate,
    sweep_s: float = 0.0,
) -> Forecast:
    """Forecast a greedy search: split every step into units as a run does, and assign them to replicas longest first.

    Which blocks a search will remove is unknown, so the forecast removes blocks from all over the model. This changes
    the work by a few percent.
    sweep_s: minimum seconds per unit, for a streamed model, whose weights must be copied to the device in every sweep.
    """
    shape, mask = space.shape, Mask()
    work = naive = num_candidates = num_steps = 0
    seconds = naive_seconds = 0.0
    while candidates := space.candidates(mask):
        masks = [candidate.mask for candidate in candidates]
        units = split_work(
            masks, shape, kernel, groups=[range(num_windows)], seq_len=seq_len, num_replicas=num_replicas, metric=metric
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
