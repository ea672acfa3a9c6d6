import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.engine.blocks import Granularity, Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.work.shape import BlockShape, ModelShape
from blockpruner.engine.work.units import KernelShape, kernel_shape, makespan, split_work, sweep_bytes

SHAPE = ModelShape(
    hidden_size=64,
    vocab_size=100,
    attention_width=64,
    num_parameters=10**6,
    mha=(BlockShape(300, 256),) * 6,
    mlp=(BlockShape(400, 384),) * 6,
    shared=(0,) * 6,
)
MASKS = [Mask().without(block) for block in Granularity.MIX.candidates(6)]


def kernel(masks: int, windows: int, batch_invariant: bool) -> KernelShape:
    return KernelShape(rows=4, head_tokens=16, masks=masks, windows=windows, threads=1, batch_invariant=batch_invariant)


@given(
    masks=st.integers(1, 20),
    windows=st.integers(1, 5),
    num_windows=st.integers(1, 9),
    num_replicas=st.integers(1, 40),
    batch_invariant=st.booleans(),
)
def test_units_cover_every_mask_and_window_once(
    masks: int, windows: int, num_windows: int, num_replicas: int, batch_invariant: bool
) -> None:
    units = split_work(
        MASKS,
        SHAPE,
        kernel(masks, windows, batch_invariant),
        groups=[range(num_windows)],
        seq_len=8,
        num_replicas=num_replicas,
    )
    covered = [(mask, window) for unit in units for mask in unit.masks for window in range(unit.first, unit.stop)]
    assert sorted(map(str, covered)) == sorted(str((m, w)) for m in MASKS for w in range(num_windows))
    assert all(len(unit.masks) <= masks and unit.stop - unit.first <= windows for unit in units)


def test_where_scores_depend_on_their_company_units_do_not_depend_on_the_number_of_replicas() -> None:
    cut = [
        split_work(MASKS, SHAPE, kernel(5, 2, False), groups=[range(4)], seq_len=8, num_replicas=number)
        for number in (1, 3, 64)
    ]
    assert cut[0] == cut[1] == cut[2]


def test_chunks_are_cut_further_only_to_feed_more_replicas_than_there_are_units() -> None:
    def num_units(num_replicas: int) -> int:
        return len(
            split_work(MASKS, SHAPE, kernel(20, 1, True), groups=[range(4)], seq_len=8, num_replicas=num_replicas)
        )

    assert [num_units(number) for number in (1, 4)] == [4, 4]
    assert num_units(8) >= 8


def test_the_streams_of_one_sweep_fit_their_budget() -> None:
    chosen = kernel_shape(SHAPE, seq_len=2048, num_windows=3, bytes_per_value=4, threads=1)
    assert chosen.windows == 1
    assert chosen.masks * 2048 * SHAPE.hidden_size * 4 <= 256 * 2**20


@given(
    masks=st.integers(1, 20),
    num_windows=st.integers(1, 9),
    num_replicas=st.integers(1, 40),
)
def test_cutting_further_never_ends_later(masks: int, num_windows: int, num_replicas: int) -> None:
    def makespan_of(batch_invariant: bool) -> float:
        shape = kernel(masks, 1, batch_invariant)
        units = split_work(MASKS, SHAPE, shape, groups=[range(num_windows)], seq_len=8, num_replicas=num_replicas)
        return makespan([unit.flops for unit in units], num_replicas)

    assert makespan_of(True) <= makespan_of(False)


def test_thirteen_windows_keep_eight_replicas_busy() -> None:
    """In whole windows two rounds would be needed, the second one with five replicas."""
    units = split_work(MASKS, SHAPE, kernel(99, 1, True), groups=[range(13)], seq_len=8, num_replicas=8)
    whole = split_work(MASKS, SHAPE, kernel(99, 1, False), groups=[range(13)], seq_len=8, num_replicas=8)
    assert makespan([unit.flops for unit in units], 8) < 0.95 * makespan([unit.flops for unit in whole], 8)


@pytest.mark.parametrize("free_gib", [4, 8, 20, 70])
def test_a_gpus_memory_holds_the_sweep(free_gib: int) -> None:
    shape = ModelShape(
        hidden_size=5120,
        vocab_size=32000,
        attention_width=5120,
        num_parameters=13 * 10**9,
        mha=(BlockShape(4 * 5120**2, 4 * 5120**2),) * 40,
        mlp=(BlockShape(3 * 5120 * 13824, 3 * 5120 * 13824),) * 40,
        shared=(0,) * 40,
    )
    found = kernel_shape(shape, seq_len=2048, num_windows=13, bytes_per_value=2, threads=1, free_bytes=free_gib * 2**30)
    needed = sweep_bytes(shape, found, seq_len=2048, bytes_per_value=2)
    assert 0.3 * free_gib * 2**30 < needed < 0.9 * free_gib * 2**30
    slightly_less = kernel_shape(
        shape, seq_len=2048, num_windows=13, bytes_per_value=2, threads=1, free_bytes=int(0.98 * free_gib * 2**30)
    )
    assert slightly_less == found


def test_a_gpu_without_room_for_a_sweep_is_refused_with_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"smallest sweep over windows of 8 tokens .* GiB more than is available"):
        kernel_shape(SHAPE, seq_len=8, num_windows=1, bytes_per_value=2, threads=1, free_bytes=1000)


def test_halving_ends_at_one_of_everything() -> None:
    found, number = kernel(9, 4, True), 0
    while (smaller := found.halved()) is not None:
        found, number = smaller, number + 1
    assert (found.rows, found.masks, found.windows, found.head_tokens, number) == (1, 1, 1, 1, 4)
