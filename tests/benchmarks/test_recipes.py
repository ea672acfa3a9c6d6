"""The comparison of recipes goes on where it was stopped, and compares only what was judged on the same windows."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recipes


@pytest.fixture
def run(tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(recipes, "SEARCH_LEN", 16)
    monkeypatch.setattr(recipes, "FIT_LEN", 16)

    def run(**options: Any) -> Any:
        defaults = {
            "out": tmp_path / "out", "calibration": [str(text_file)], "held_out": [str(text_file)],
            "model": str(tiny_folder), "search_windows": 2, "fit_windows": 8, "held_out_windows": 3,
        }  # fmt: skip
        recipes.main(**{**defaults, **options})
        return json.loads((tmp_path / "out" / "recipes.json").read_text())

    return run


def test_what_was_measured_is_not_measured_again(run: Callable[..., Any], tmp_path: Path) -> None:
    run(recipe="layers", ratio="0.1")
    first = json.loads((tmp_path / "out/42.json").read_text())
    run(recipe="layers,one-shot", ratio="0.1")
    second = json.loads((tmp_path / "out/42.json").read_text())
    assert second["rows"][:2] == first["rows"]
    assert second["orders"]["layers"] == first["orders"]["layers"]
    assert [(row["recipe"], row["at"]) for row in second["rows"]] == [
        ("dense", ""),
        ("layers", "10%"),
        ("one-shot", "10%"),
    ]
    assert "refitted" not in second["rows"][2]


def test_draws_are_averaged_and_paired_by_window(run: Callable[..., Any], text_file: Path) -> None:
    for seed in (1, 2):
        told = run(recipe="layers,shortgpt,prune-and-comp", ratio="0.2", seed=seed)
    layers, shortgpt, _ = told["figures"]
    text = text_file.stem
    assert (layers["draws"], layers[text]["difference"]) == (2, [0.0, 0.0, 0.0])
    low, middle, high = shortgpt[text]["difference"]
    assert low <= middle <= high
    means = [math.log(figure[text]["refitted"][0]) for figure in (layers, shortgpt)]
    assert middle == pytest.approx(means[1] - means[0], abs=1e-9)


def test_a_recipe_is_cut_where_it_reaches_a_speed(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "_speeds", lambda models: [1 / (model.num_parameters()) for model in models])
    (layers,) = run(recipe="layers", speed="1.2")["figures"]
    assert layers["at"] == "1.2x"
    assert layers["speeds"][0] >= 1.19
