"""The comparison of recipes goes on where it was stopped, and compares only what was judged on the same windows."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import recipes
from blockpruner.engine.blocks import Mask
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.work.times import BlockTimes
from blockpruner.engine.work.times_file import costs_of
from blockpruner.files import write_json
from tests.conftest import load


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


def test_draws_are_averaged_and_paired_by_window(run: Callable[..., Any], text_file: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        told = run(recipe="layers,shortgpt,prune-and-comp", ratio="0.2", seed=seed)
    layers, shortgpt, _ = told["figures"]
    text = text_file.stem
    assert (layers["draws"], layers[text]["difference"]) == (2, [0.0, 0.0, 0.0])
    low, middle, high = shortgpt[text]["difference"]
    assert low <= middle <= high
    means = [math.log(figure[text]["refitted"][0]) for figure in (layers, shortgpt)]
    assert middle == pytest.approx(means[1] - means[0], abs=1e-9)
    reference, *others = run(report_only=True, against="shortgpt")["figures"]
    assert (reference["recipe"], others[0]["recipe"]) == ("shortgpt", "layers")
    assert others[0][text]["difference"] == pytest.approx([-high, -middle, -low])
    assert (tmp_path / "out" / "recipes.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def times(tiny_folder: Path, tmp_path: Path) -> Path:
    shape = Decoder(load(tiny_folder)).shape
    of_each = [(0.25, 0.5, 0.75, 1.0)] * shape.num_layers
    costs = costs_of(BlockTimes(10.0, ((1.0,) * 2,) * shape.num_layers, tuple(of_each)))
    table: dict[str, Any] = {
        "model": str(tiny_folder),
        "fingerprint": None,
        "setting": {},
        "decode": costs,
        "prefill": costs,
        "both": costs,
    }
    write_json(tmp_path / "times.json", table)
    return tmp_path / "times.json"


def test_a_recipe_is_cut_where_it_reaches_a_speed(
    run: Callable[..., Any], times: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    shape = Decoder(load(tiny_folder)).shape
    (layers,) = run(recipe="layers", speed="1.2", times=times, most=0.5)["figures"]
    (row,) = json.loads((tmp_path / "out/42.json").read_text())["rows"][1:]
    assert (layers["at"], row["at"]) == ("1.2x", "1.2x")
    assert row["ratio"] == pytest.approx(shape.ratio(Mask.parse("layer.0")))  # 10 ms without 2: at least 1.2 x
    assert layers["speeds"] == [row["speed"]]


def test_a_speed_that_is_not_reached_is_said(
    run: Callable[..., Any], times: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe="layers", speed="9", times=times, most=0.5)["figures"] == []
    assert "42 layers: 9.0x is not reached without 50% of the parameters" in capsys.readouterr().out


def test_narrower_blocks_are_pruned_refitted_and_saved_in_the_order_that_was_searched(
    run: Callable[..., Any], tiny_folder: Path, tmp_path: Path
) -> None:
    run(recipe="channels", ratio="0.1", save=tmp_path / "models")
    again = run(recipe="channels", ratio="0.1,0.05")
    assert [figure["recipe"] for figure in again["figures"]] == ["channels", "channels"]
    small, dense = (load(folder).num_parameters() for folder in (tmp_path / "models/42-channels-10%", tiny_folder))
    row = json.loads((tmp_path / "out/42.json").read_text())["rows"][1]
    assert row["ratio"] == pytest.approx(1 - small / dense)


def test_channels_are_searched_per_millisecond_with_times_alone(run: Callable[..., Any], times: Path) -> None:
    with pytest.raises(typer.BadParameter, match="expected --times with recipes per millisecond"):
        run(recipe="channels-per-ms", ratio="0.1")
    (figure,) = run(recipe="channels-per-ms", ratio="0.1", times=times)["figures"]
    assert figure["ratios"][0] >= 0.1
