"""The comparison of strategies counts every draw once, and never mixes results of different models or texts."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import better_masks
from blockpruner.engine.errors import UserError


@pytest.fixture
def run(tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(better_masks, "SEQ_LEN", 16)
    monkeypatch.setattr(better_masks, "HELD_OUT_WINDOWS", 2)
    monkeypatch.setattr(better_masks, "draw", lambda *arguments: None)

    def run(**options: Any) -> None:
        defaults = {
            "calibration": str(text_file), "held_out": [str(text_file)], "out": tmp_path / "masks", "num_windows": 2,
            "model": str(tiny_folder), "dtype": "float32", "methods": "one-shot,greedy,evolution", "generations": 2,
            "offspring": 4,
        }  # fmt: skip
        better_masks.main(**{**defaults, **options})

    return run


def test_a_ratio_that_is_added_later_counts_no_draw_twice(run: Callable[..., None], tmp_path: Path) -> None:
    run(ratio=[0.1])
    run(ratio=[0.1, 0.2])
    header, *rows = map(json.loads, (tmp_path / "masks/results-1.jsonl").read_text().splitlines())
    assert "method" not in header
    done = Counter((row["method"], row["target"]) for row in rows)
    assert done == dict.fromkeys(((m, r) for m in ("one-shot", "greedy", "evolution") for r in (0.1, 0.2)), 1)
    kept = json.loads((tmp_path / "masks/better_masks.json").read_text())
    assert all(len(row["perplexity"]) == 1 for row in kept["rows"])


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("other", [{"dtype": "float64"}, {"num_windows": 3}, {"generations": 5}])
def test_results_made_otherwise_are_refused_whatever_their_seed(
    run: Callable[..., None], seed: int, other: dict[str, Any]
) -> None:
    run(ratio=[0.1], methods="one-shot")
    with pytest.raises(UserError, match=f"expected {next(iter(other))}.*choose another --out"):
        run(ratio=[0.1], methods="one-shot", seed=seed, **other)


def test_results_of_another_calibration_are_refused(run: Callable[..., None], tmp_path: Path) -> None:
    run(ratio=[0.1], methods="one-shot")
    other = tmp_path / "other.txt"
    other.write_text("birds sing away from the old river bank\n" * 40)
    with pytest.raises(UserError, match="expected windows"):
        run(ratio=[0.1], methods="one-shot", calibration=str(other))


def test_a_method_that_does_not_exist_is_refused(run: Callable[..., None]) -> None:
    with pytest.raises(UserError, match=r"expected `methods` to be .*greedy.*got 'gredy'"):
        run(ratio=[0.1], methods="greedy,gredy")
