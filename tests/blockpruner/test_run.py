import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.score import Score
from blockpruner.engine.scoring.scorer import UnitResult
from blockpruner.engine.work.units import KernelShape, WorkUnit
from blockpruner.files import new_folder, replacing
from blockpruner.searching.records import RunRecord, ScoreRecord, StepRecord
from blockpruner.searching.run import RunDirectory
from blockpruner.searching.sequence import official_sequence, read_official_sequence

KERNEL = KernelShape(rows=1, head_tokens=1, masks=1, windows=1, threads=1)
MASKS = (Mask.parse("mha.1"), Mask.parse("mlp.0"))


def result(sums: list[list[float]], first: int = 0, stop: int = 2) -> UnitResult:
    return UnitResult(
        WorkUnit(MASKS, first, stop, 10, KERNEL), sums, seconds=1.0, replica="local", start_s=0.0, stop_s=1.0
    )


def header() -> RunRecord:
    kernel = KERNEL.to_json()
    windows = {"num_windows": 3, "num_tokens": 48, "fingerprint": ""}
    config = {"model": "m", "calibration": "builtin", "num_samples": 1, "seq_len": 16, "seed": 42}
    where = {"dtype": "float32", "device": "cpu", "placement": "resident", "versions": {}}
    return RunRecord.of(config=config, kernel=kernel, calibration=windows, **where)


def step(number: int) -> StepRecord:
    spent = {"work_flops": 1, "naive_work_flops": 2, "wall_s": 0.1, "num_replicas": 1, "num_lost": 0, "placement": None}
    counts = {"num_candidates": 1, "num_scored": 1, "num_exact": 1}
    return StepRecord.of(step=number, block=["mha", number], **PPL.recorded(1.0), ratio=0.1, **counts, **spent)


def test_units_are_read_back_to_the_bit(tmp_path: Path) -> None:
    sums = [[0.1 + 0.2, 1e-300], [float("nan"), 7.0]]
    with RunDirectory(tmp_path / "run") as run:
        run.append(header())
        run.append_unit(1, result(sums), wall_s=0.5)
    with RunDirectory(tmp_path / "run") as run:
        read = run.sums(1)
    assert read.sums[MASKS[0]] == {0: 0.1 + 0.2, 1: 1e-300}
    assert read.has(MASKS, 0, 2)
    assert not read.has(MASKS, 0, 3)
    assert not run.sums(2).sums


def test_a_torn_last_line_is_dropped_and_work_goes_on_behind_it(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.append(header())
        run.append(step(1))
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes() + b'{"type": "step", "st')
    with RunDirectory(tmp_path) as run:
        assert [step["step"] for step in run.steps] == [1]
        run.append(step(2))
    assert [json.loads(line)["type"] for line in ledger.read_text().splitlines()] == ["run", "step", "step"]


def test_damage_in_the_middle_of_a_ledger_is_reported_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"type": "run"}\nnot json\n{"type": "step"}\n')
    with pytest.raises(UserError, match="damaged in line 2"):
        RunDirectory(tmp_path)


def test_two_processes_cannot_share_a_run(tmp_path: Path) -> None:
    with RunDirectory(tmp_path), pytest.raises(UserError, match="another process"):
        RunDirectory(tmp_path)
    with RunDirectory(tmp_path):
        pass


def test_a_run_that_found_nothing_leaves_nothing(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_scores_lie_in_a_parquet_file_with_failed_candidates_as_null(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.append(header())
        run.append_unit(1, result([[2.0, 4.0], [float("nan"), 1.0]]), wall_s=0.5)
        sums = run.sums(1)
        for block, mask in zip(("mha.1", "mlp.0"), MASKS, strict=True):
            score = Score(mask, tuple(sums.sums[mask].values()), num_targets=2)
            record = ScoreRecord.of(
                phase=1, block=block, mask=str(mask), **PPL.recorded(score.value), num_windows=2, exact=True,
                seconds=1.0, replica="local",
            )  # fmt: skip
            run.append(record)
        run.append(step(1))
        run.write_summary({"status": "running"})
    rows = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert [(row["step"], row["block"], row["nll"]) for row in rows] == [(1, "mha.1", 1.5), (1, "mlp.0", None)]
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "running"}
    assert json.loads((tmp_path / "sequence.json").read_text()) == {"1": [["mha", 1]]}


@given(st.lists(st.builds(Block, st.sampled_from([Kind.MHA, Kind.MLP]), st.integers(0, 20)), unique=True, min_size=1))
def test_a_removal_order_survives_the_official_format(
    tmp_path_factory: pytest.TempPathFactory, order: list[Block]
) -> None:
    path = tmp_path_factory.mktemp("sequence") / "order.json"
    path.write_text(json.dumps(official_sequence(order)))
    assert read_official_sequence(path) == order


def test_the_official_programs_own_file_is_read(tmp_path: Path) -> None:
    """As it writes it: sorted by layer only, blocks of one layer in any order."""
    path = tmp_path / "Llama-2-7b_mix_alpaca_ns_64_del_order_list.json"
    path.write_text(
        '{"1": [["mha", 25]], "2": [["mha", 25], ["mha", 27]], "3": [["mlp", 25], ["mha", 25], ["mha", 27]]}'
    )
    assert [str(block) for block in read_official_sequence(path)] == ["mha.25", "mha.27", "mlp.25"]


@pytest.mark.parametrize(
    "text", ["[]", '{"1": 3}', '{"1": [["ffn", 3]]}', "not json", '{"2": [["mha", 1]]}', '{"1": [["mha", -1]]}']
)
def test_a_file_that_is_no_sequence_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "order.json"
    path.write_text(text)
    with pytest.raises(UserError):
        read_official_sequence(path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "model") as aside:
        (aside / "weights").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
