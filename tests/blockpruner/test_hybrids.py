"""A model that mixes tokens by convolutions, too: searched, pruned, exported, and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from blockpruner.engine.blocks import Mixers
from blockpruner.engine.errors import UserError
from blockpruner.pruning.config import PruneConfig
from blockpruner.pruning.pruning import prune_model
from blockpruner.reporting.recorded import read_recorded
from blockpruner.reporting.removal_order import draw_removal_order
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from tests.calls import export
from tests.conftest import OPTIONS, TINY, generate, load, tiny_tokenizer
from tests.engine.architectures import HYBRIDS, Row


@pytest.fixture(scope="module", params=["lfm2", "nemotron_h"])
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / request.param
    row = HYBRIDS[request.param]
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
