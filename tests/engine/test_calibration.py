import json
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from blockpruner.engine.calibration import calibration_windows, evaluation_windows, read_rows
from blockpruner.engine.errors import UserError
from blockpruner.engine.sections import Calibration
from blockpruner.engine.text import rows
from tests.conftest import tiny_tokenizer

ROWS = [f"row number {index} runs over the quick brown fox and the lazy dog" for index in range(30)]


def write_rows(path: Path, column: str = "text") -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({column: ROWS}), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps([{column: row} for row in ROWS]))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: row}) + "\n" for row in ROWS))
    else:
        path.write_text("\n".join(ROWS) + "\n")
    return path


def draw(source: Path | str, **options: object) -> torch.Tensor:
    defaults = {"num_samples": 8, "seq_len": 16, "seed": 42}
    return calibration_windows(Calibration(calibration=str(source), **{**defaults, **options}), tiny_tokenizer()).tokens  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".txt", ".raw"])
def test_anyone_can_rebuild_the_windows_with_the_official_recipe(tmp_path: Path, suffix: str) -> None:
    windows = draw(write_rows(tmp_path / f"rows{suffix}"))
    random.seed(42)
    chosen = random.sample(range(len(ROWS)), 8)
    ids = tiny_tokenizer()("\n\n".join(ROWS[index] for index in chosen))["input_ids"]
    expected = [ids[start : start + 16] for start in range(0, len(ids) - 15, 16)]
    assert windows.tolist() == expected
    assert len(ids) % 16, "the tail must be dropped for this test to say something"


def test_the_same_draw_has_the_same_fingerprint_and_another_draw_another(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    options = {"num_samples": 8, "seq_len": 16}
    one, same, other = (
        calibration_windows(Calibration(calibration=str(path), seed=s, **options), tiny_tokenizer()) for s in (1, 1, 2)
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_too_few_rows_are_all_used_in_a_drawn_order_and_this_is_said(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    windows = calibration_windows(
        Calibration(calibration=str(path), num_samples=100, seq_len=16, seed=42), tiny_tokenizer()
    )
    assert windows.num_rows == 30
    assert "fewer than the 100" in windows.notes[0]


def test_num_windows_keeps_the_first_windows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    assert torch.equal(draw(path, num_windows=2), draw(path)[:2])


def test_the_builtin_text_needs_no_file() -> None:
    assert draw("builtin", num_samples=2).shape[1] == 16


def test_a_text_file_is_evaluated_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "test.txt"
    path.write_text("the fox\n\nruns over the dog and the lazy river bank")
    windows = evaluation_windows(str(path), tiny_tokenizer(), seq_len=8)
    assert (
        windows.tokens.flatten().tolist() == tiny_tokenizer()(path.read_text())["input_ids"][: windows.tokens.numel()]
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "got an empty file"),
        ("rows.tsv", b"text\nhello\n", "ending in"),
        ("other.jsonl", b'{"body": "hello"}\n', "column 'text'.*which has body.*`text_column`"),
        ("numbers.jsonl", b'{"text": 3}\n', "texts in column"),
        ("broken.jsonl", b'{"text": "hel', "cannot read"),
        ("broken.parquet", b"PAR1 nothing", "cannot read"),
        ("latin.txt", "Fähre".encode("latin-1"), "UTF-8"),
        ("short.txt", b"the fox", "at least one window of 16 tokens"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        draw(path)
    assert "\n" not in str(error.value)


def test_hub_sets_that_cannot_be_reached_are_refused_with_a_way_out() -> None:
    with pytest.raises(UserError, match=r"tatsu-lab/alpaca.*give a local file"):
        draw("alpaca")


def test_rows_to_train_on_are_not_those_that_calibration_draws_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_hub_rows", lambda *arguments: datasets.Dataset.from_dict({"text": ROWS}))
    to_train, to_calibrate = rows.training_rows_of("alpaca", "text").values, read_rows("alpaca", "text", train=True)
    assert (len(to_train), len(to_calibrate)) == (24, 3)
    assert not set(to_train) & set(to_calibrate)
