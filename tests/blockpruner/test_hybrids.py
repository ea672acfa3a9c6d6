"""A model that mixes tokens by convolutions, too: searched, pruned, exported, and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from blockpruner.engine.blocks import Granularity, Mask, Mixers
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.search.budget import Budget
from blockpruner.engine.search.space import SearchSpace
from blockpruner.pruning.config import PruneConfig
from blockpruner.pruning.pruning import prune_model
from blockpruner.reporting.recorded import read_recorded
from blockpruner.reporting.removal_order import draw_removal_order
from blockpruner.reporting.tables import tabulate_overview
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from tests.calls import export
from tests.conftest import OPTIONS, TINY, generate, load, tiny_tokenizer
from tests.engine.architectures import HYBRIDS, Row


@pytest.fixture(scope="module", params=["lfm2", "nemotron_h"])
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp("models") / request.param)


def saved(name: str, folder: Path) -> Path:
    row = HYBRIDS[name]
    model = Row(row.config, {**row.options, "vocab_size": TINY["vocab_size"]}, torch.float32).model()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_hybrid_is_searched_pruned_exported_and_shown(
    hybrid: Path, text_file: Path, tmp_path: Path, reporter: Reporter
) -> None:
    kinds = {
        "lfm2": ["convolution", "attention", "convolution", "attention"],
        "nemotron_h": ["mamba", "", "attention", "attention"],
    }[hybrid.name]
    config = SearchConfig.of(model=str(hybrid), calibration=str(text_file), num_remove=2, blocks="mha", **OPTIONS)
    summary = run_search(config, tmp_path / "run", reporter)
    assert summary["mixers"] == kinds
    assert json.loads((tmp_path / "run" / "run.json").read_text())["mixers"] == kinds
    removed = [step["block"][1] for step in summary["steps"]]
    assert len(removed) == 2
    assert any(kind == "attention" and layer not in removed for layer, kind in enumerate(kinds))
    assert all(kinds[layer] for layer in removed)
    prune_model(PruneConfig(model=str(hybrid), run=tmp_path / "run"), tmp_path / "pruned", reporter)
    export(tmp_path / "pruned", tmp_path / "out", reporter, format="grouped")
    card = (tmp_path / "out" / "README.md").read_text()
    for layer in removed:
        assert f"| {kinds[layer]} removed in layers |" in card
    assert generate(load(tmp_path / "out")) == generate(load(tmp_path / "pruned"), use_cache=False)
    for options in ({"format": "deci"}, {"format": "gguf", "gguf_type": "f16"}):
        with pytest.raises(UserError, match=hybrid.name):
            export(tmp_path / "pruned", tmp_path / "other", reporter, **options)
    labels = [
        text.get_text() for text in draw_removal_order(read_recorded([tmp_path / "run"])).axes[0].get_yticklabels()
    ]
    assert labels == ["mixer", "MLP"]


def test_attention_alone_is_searched_where_that_is_asked(
    hybrid: Path, text_file: Path, tmp_path: Path, reporter: Reporter
) -> None:
    config = SearchConfig.of(
        model=str(hybrid), calibration=str(text_file), num_remove=1, blocks="mha", mixers="attention", **OPTIONS
    )
    assert config.mixers is Mixers.ATTENTION
    summary = run_search(config, tmp_path / "run", reporter)
    (step,) = summary["steps"]
    assert summary["mixers"][step["block"][1]] == "attention"
    assert step["num_candidates"] == 2


@pytest.mark.parametrize(
    ("name", "blocks", "num_remove", "told", "nouns"),
    [
        ("nemotron_h", "mix", 2, "2 of 4", {"mamba", "MLP", "attention"}),
        ("nemotron_h", "mha", 1, "1 of 3 mha", {"mamba", "attention"}),
        ("mamba2", "layer", 2, "2 of 4 layer", {"mamba"}),
    ],
)
def test_the_blocks_that_a_model_has_are_counted(
    name: str,
    blocks: str,
    num_remove: int,
    told: str,
    nouns: set[str],
    text_file: Path,
    tmp_path: Path,
    reporter: Reporter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = saved(name, tmp_path / "model")
    config = SearchConfig.of(
        model=str(model), calibration=str(text_file), num_remove=num_remove, blocks=blocks, **OPTIONS
    )
    run_search(config, tmp_path / "run", reporter)
    assert "\n4 blocks, " in capsys.readouterr().out
    (recorded,) = read_recorded([tmp_path / "run"])
    cells = {row[0]: row[1] for row in tabulate_overview([recorded]).rows}
    assert cells["blocks removed"] == told
    (drawn,) = draw_removal_order([recorded]).axes
    assert len(drawn.patches) == 4
    prune_model(PruneConfig(model=str(model), run=tmp_path / "run"), tmp_path / "pruned", reporter)
    assert f"removed, {num_remove} blocks)" in capsys.readouterr().out.replace("\n", " ")
    export(tmp_path / "pruned", tmp_path / "out", reporter, format="grouped")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"without {num_remove} of its blocks" in card
    said = {
        line.split(" removed in layers")[0].removeprefix("| ") for line in card.splitlines() if "removed in" in line
    }
    assert said <= nouns
    assert said


def test_whole_layers_with_one_block_count_once_in_masks() -> None:
    shape = Decoder(HYBRIDS["mamba2"].model()).shape
    layers = Mask.parse("layer.0+layer.2")
    assert (shape.num_blocks, shape.num_absent(layers)) == (4, 2)
    space = SearchSpace(shape=shape, blocks=Granularity.LAYER, budget=Budget(num_remove=3))
    assert (space.num_removed(layers), space.num_steps_left(layers)) == (2, 1)
    assert space.greedy_flops_left(layers, 16) > 0


def test_evolution_removes_as_many_blocks_as_asked_where_layers_have_one(
    text_file: Path, tmp_path: Path, reporter: Reporter
) -> None:
    config = SearchConfig.of(
        model=str(saved("mamba2", tmp_path / "model")), calibration=str(text_file), num_remove=2,
        strategy="evolution", generations=1, offspring=2, **OPTIONS,
    )  # fmt: skip
    steps = run_search(config, tmp_path / "run", reporter)["steps"]
    assert len(steps) == 2
    assert all(kind == "mha" for kind, _ in (step["block"] for step in steps))
