"""What blocks cost in time: measured by leaving blocks out, and the currency of a search."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.engine.blocks import NUM_GROUPS, Block, Granularity, Kind, Mask, Units
from blockpruner.engine.errors import UserError
from blockpruner.engine.judge import block_times
from blockpruner.engine.judge.block_times import measure_block_times, sorts_of
from blockpruner.engine.judge.latency import Generation
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.search.budget import Budget, Per
from blockpruner.engine.search.space import SearchSpace
from blockpruner.engine.strategies.greedy import Greedy
from blockpruner.engine.work.times import BlockTimes, TimeOf, rising
from blockpruner.engine.work.times_file import costs_of, read_times, times_of
from tests.conftest import tiny_llama
from tests.engine.test_search import MadeUp, names, shape_of

LAYERS = 3
TIMES = BlockTimes(100.0, ((6.0, 10.0),) * LAYERS, ((5.0, 10.0, 15.0, 20.0),) * LAYERS)
WORKLOAD = Workload(prompt_len=8, num_tokens=4)
FIXED, ATTENTION, CHANNEL = 7.0, 3.0, 0.125
"""Milliseconds of the made-up machine: of a model without blocks, of an attention, of a channel of an MLP."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """A machine that takes exactly so long for each block, times a factor that drifts from round to round."""

    def install(drift: Sequence[float]) -> None:
        def generate(generation: Generation) -> dict[str, float]:
            model = generation.model
            number = next(calls.setdefault(id(model), itertools.count()))
            ms = FIXED
            for name, module in model.named_modules():
                if name.endswith("o_proj"):
                    ms += ATTENTION * module.in_features / model.config.hidden_size
                elif name.endswith("down_proj"):
                    ms += CHANNEL * module.in_features
            ms *= drift[number % len(drift)]
            seconds = ms / 1000
            return {
                "prefill_tokens_per_s": WORKLOAD.prompt_len / (2 * seconds),
                "decode_tokens_per_s": 1 / seconds,
                WORKLOAD.generate_s: 5 * seconds,
            }

        calls: dict[int, Any] = {}
        monkeypatch.setattr(block_times.Generation, "__call__", generate)

    return install


def test_each_block_and_each_width_costs_what_it_saves(machine: Callable[[Sequence[float]], None]) -> None:
    machine([1.0])
    model = tiny_llama()
    found = measure_block_times(model, WORKLOAD, repeats=1)
    width, num_layers = model.config.intermediate_size, model.config.num_hidden_layers
    dense = FIXED + num_layers * (ATTENTION + CHANNEL * width)
    assert found[TimeOf.DECODE].dense == pytest.approx(dense)
    shape = Decoder(model).shape
    for of, factor in ((TimeOf.DECODE, 1), (TimeOf.PREFILL, 2), (TimeOf.BOTH, 5)):
        for of_layer in found[of].mha:
            assert of_layer == pytest.approx([factor * ATTENTION / 2, factor * ATTENTION])
        widths = [shape.mlp[0].width(groups) for groups in range(1, NUM_GROUPS + 1)]
        for of_layer in found[of].mlp:
            assert of_layer == pytest.approx([factor * CHANNEL * one for one in widths])


def test_a_machine_that_drifts_changes_no_share(machine: Callable[[Sequence[float]], None]) -> None:
    machine([9.0, 1.0, 1.3, 1.3, 1.3, 0.5])  # the first one is the warm-up
    slow = measure_block_times(tiny_llama(), WORKLOAD, repeats=5)[TimeOf.DECODE]
    machine([1.0])
    even = measure_block_times(tiny_llama(), WORKLOAD, repeats=1)[TimeOf.DECODE]
    mask = Mask.parse("mha.1+mlp.2")
    assert slow.share(mask) == pytest.approx(even.share(mask))


def test_a_block_that_costs_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 1.0, WORKLOAD.generate_s: 1.0}
    monkeypatch.setattr(block_times.Generation, "__call__", lambda generation: speeds)
    with pytest.raises(UserError, match="attention blocks to be faster, but it was not; use more `repeats`"):
        measure_block_times(tiny_llama(), WORKLOAD, repeats=1)


def test_every_block_is_of_one_sort() -> None:
    shape = Decoder(tiny_llama()).shape
    blocks = [block for sort in sorts_of(shape) for block in sort.blocks]
    assert sorted(map(str, blocks)) == sorted(map(str, shape.candidates(Granularity.MIX)))


@given(st.lists(st.floats(-5, 50), min_size=NUM_GROUPS - 1, max_size=NUM_GROUPS - 1), st.floats(0.1, 40))
def test_wider_mlps_never_cost_less(narrower: list[float], whole: float) -> None:
    found = rising([*narrower, whole])
    assert found[-1] == whole
    assert all(low < high for low, high in itertools.pairwise((0.0, *found)))


def space(ms: float | None = None, **options: Any) -> SearchSpace:
    budget = Budget(budget_ms=ms) if ms else Budget(num_remove=2)
    return SearchSpace(shape=shape_of(LAYERS), blocks=Granularity.MIX, budget=budget, times=whole(), **options)


def whole() -> BlockTimes:
    """Of MLPs that go as a whole."""
    return BlockTimes(100.0, ((10.0,),) * LAYERS, ((20.0,),) * LAYERS)


def test_a_search_ends_when_the_time_is_saved() -> None:
    oracle = MadeUp(lambda mask, window: 1.0 + sum(0.1 * (3 - b.layer) for b in mask.absent))
    found = Greedy().run(space(75.0), oracle)
    assert whole().without(found.mask) <= 75.0
    assert whole().without(Mask.of(found.blocks[:-1])) > 75.0


def test_losses_are_ranked_by_the_time_that_they_save() -> None:
    losses = {"mha.0": 0.11, "mlp.0": 0.2}
    oracle = MadeUp(lambda mask, window: 1.0 + sum(losses.get(str(b), 9.0) for b in mask.absent))
    assert names(Greedy().run(space(), oracle))[0] == "mha.0"
    assert names(Greedy().run(space(per=Per.MS), oracle))[0] == "mlp.0"


@pytest.mark.parametrize("ms", [100.0, 120.0, 19.9])
def test_a_time_that_cannot_be_reached_is_refused(ms: float) -> None:
    with pytest.raises(UserError, match=r"expected `budget_ms` from 20 .* to below 100, which the dense model takes"):
        space(ms)


def test_a_group_of_channels_saves_its_part() -> None:
    assert TIMES.of(Block(Kind.MLP, 1, 4)) == 5.0
    mask = Mask.parse("mlp.1/4+mlp.1/3+mha.2+mha.1/2")
    assert TIMES.without(mask) == 100.0 - 5 - 5 - 10 - 4
    shape = Decoder(tiny_llama()).shape
    times = BlockTimes(100.0, ((2.0, 5.0),) * shape.num_layers, ((1.0, 3.0, 6.0, 10.0),) * shape.num_layers)
    cut = SearchSpace(
        shape=shape, blocks=Granularity.MIX, budget=Budget(num_remove=1), times=times, per=Per.MS, units=Units.CHANNELS
    )
    weights = [cut.weight(block) for block in (*(Block(Kind.MLP, 0, part) for part in (4, 3, 2)), Block(Kind.MLP, 0))]
    assert weights == pytest.approx([0.04, 0.03, 0.02, 0.01])


def test_the_table_is_read_as_it_was_written_and_only_for_its_model(tmp_path: Path) -> None:
    shape, file = Decoder(tiny_llama()).shape, tmp_path / "times.json"
    times = BlockTimes(9.0, ((0.6, 1.0),) * shape.num_layers, ((0.1, 0.2, 0.3, 0.4),) * shape.num_layers)
    costs = {of.value: costs_of(times) for of in TimeOf}
    file.write_text(json.dumps({"model": "m", "fingerprint": None, "setting": {}, **costs}))
    assert times_of(read_times(file)["prefill"], shape, file) == times
    costs["decode"]["mha"].pop()
    file.write_text(json.dumps({"model": "m", "fingerprint": None, "setting": {}, **costs}))
    with pytest.raises(UserError, match=f"expected times of a model with {shape.num_layers} layers"):
        times_of(read_times(file)["decode"], shape, file)
    file.write_text("{}")
    with pytest.raises(UserError, match=r"the table of times .* is damaged .*'model' is missing.*; measure again"):
        read_times(file)
    with pytest.raises(UserError, match="which is no file"):
        read_times(tmp_path / "nowhere.json")
