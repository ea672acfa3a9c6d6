"""Commands take the folder of a multimodal model: they are about its text decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText

import blockpruner as bp
from blockpruner.engine.blocks import Block, Mask
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from tests.conftest import OPTIONS, tiny_tokenizer
from tests.engine.multimodals import without, write_multimodal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_multimodal(tmp_path_factory.mktemp("models") / "gemma3", "gemma3")
    tiny_tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def run(folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, and a third after a pause."""
    out, reporter = tmp_path_factory.mktemp("runs") / "run", Reporter(Console(quiet=True))
    for num_remove in (2, 3):
        config = SearchConfig.of(model=str(folder), calibration=str(text_file), num_remove=num_remove, **OPTIONS)
        run_search(config, out, reporter)
    return out


def test_a_search_of_a_multimodal_folder_is_resumed_and_scores_what_the_whole_model_would(
    folder: Path, run: Path
) -> None:
    summary = json.loads((run / "run.json").read_text())
    assert len(summary["steps"]) == 3
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    windows = bp.calibration(summary["config"]["calibration"], tiny_tokenizer(), seq_len=16, num_samples=20)
    for step, scored in enumerate([summary["dense"], *summary["steps"]]):
        mask = Mask.of([Block.from_json(each["block"]) for each in summary["steps"][:step]])
        with without(whole, mask):
            assert bp.perplexity(whole, windows) == pytest.approx(scored["perplexity"], rel=1e-5)
