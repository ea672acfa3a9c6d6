from hypothesis import given
from hypothesis import strategies as st

from engine.blocks import Granularity, Mask
from engine.shape import BlockShape, ModelShape
from engine.units import KernelShape, kernel_shape, split_work

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
        num_windows=num_windows,
        seq_len=8,
        num_replicas=num_replicas,
    )
    covered = [(mask, window) for unit in units for mask in unit.masks for window in range(unit.first, unit.stop)]
    assert sorted(map(str, covered)) == sorted(str((m, w)) for m in MASKS for w in range(num_windows))
    assert all(len(unit.masks) <= masks and unit.stop - unit.first <= windows for unit in units)


def test_where_scores_depend_on_their_company_units_do_not_depend_on_the_number_of_replicas() -> None:
    cut = [
        split_work(MASKS, SHAPE, kernel(5, 2, False), num_windows=4, seq_len=8, num_replicas=number)
        for number in (1, 3, 64)
    ]
    assert cut[0] == cut[1] == cut[2]


def test_chunks_are_cut_further_only_to_feed_more_replicas_than_there_are_units() -> None:
    def num_units(num_replicas: int) -> int:
        return len(split_work(MASKS, SHAPE, kernel(20, 1, True), num_windows=4, seq_len=8, num_replicas=num_replicas))

    assert [num_units(number) for number in (1, 4, 8)] == [4, 4, 8]


def test_the_streams_of_one_sweep_fit_their_budget() -> None:
    chosen = kernel_shape(SHAPE, seq_len=2048, num_windows=3, bytes_per_value=4, threads=1)
    assert chosen.windows == 1
    assert chosen.masks * 2048 * SHAPE.hidden_size * 4 <= 256 * 2**20
