"""Sums that a benchmark keeps are used again for the same model, dtype, metric and windows, and for nothing else."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.memory import Memory
from blockpruner.engine.blocks import Mask
from blockpruner.engine.calibration import Windows
from blockpruner.engine.errors import UserError
from blockpruner.engine.metrics.kl import Kl
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from tests.conftest import random_windows, tiny_llama

MADE_OF = {"model": "0123", "dtype": "float64"}
MASKS = [Mask(), Mask.parse("mha.1"), Mask.parse("mha.1+mlp.2")]
WINDOWS = random_windows()


class CountingPass(ForkedPass):
    num_calls = 0

    def window_sums(self, masks: list[Mask], windows: torch.Tensor, metric: Metric) -> torch.Tensor:
        self.num_calls += 1
        return super().window_sums(masks, windows, metric)


@pytest.fixture
def forked() -> CountingPass:
    return CountingPass(Decoder(tiny_llama()), CallShape(sequences_per_call=8, tokens_per_head_call=512))


def memory(
    forked: ForkedPass,
    file: Path | None,
    windows: torch.Tensor = WINDOWS,
    metric: Metric = PPL,
    made_of: dict[str, str] = MADE_OF,
) -> Memory:
    return Memory(forked, Decoder(tiny_llama()).shape, windows, metric, file, made_of)


def test_kept_sums_are_not_computed_again(forked: CountingPass, tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    first = memory(forked, file).score(MASKS)
    calls = forked.num_calls
    again = memory(forked, file).score(MASKS)
    assert again == first == memory(forked, None).score(MASKS)
    assert calls > 0
    assert forked.num_calls == 2 * calls  # those of the last one, which has no file


def test_the_first_line_says_what_the_sums_come_from(forked: CountingPass, tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    memory(forked, file).score(MASKS[:1])
    memory(forked, file).score(MASKS)
    header, *lines = map(json.loads, file.read_text().splitlines())
    assert header == {**MADE_OF, "metric": "ppl", "windows": Windows(WINDOWS, 0).fingerprint}
    assert {mask for mask, _ in lines} == set(map(str, MASKS))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"windows": random_windows(seed=2)}, "windows"),
        ({"windows": WINDOWS[:2]}, "windows"),
        ({"metric": Kl()}, "metric 'kl', got 'ppl'"),
        ({"made_of": {**MADE_OF, "model": "4567"}}, "model '4567', got '0123'"),
        ({"made_of": {**MADE_OF, "dtype": "float32"}}, "dtype 'float32', got 'float64'"),
    ],
)
def test_sums_of_something_else_are_refused(
    forked: CountingPass, tmp_path: Path, other: dict[str, object], named: str
) -> None:
    file = tmp_path / "sums.jsonl"
    memory(forked, file).score(MASKS)
    before = file.read_bytes()
    with pytest.raises(UserError, match=f"expected {named}.*choose another --out") as raised:
        memory(forked, file, **other)
    assert "\n" not in str(raised.value)
    assert file.read_bytes() == before


def test_sums_of_unknown_origin_are_refused_until_a_header_is_put_before_them(
    forked: CountingPass, tmp_path: Path
) -> None:
    file = tmp_path / "sums.jsonl"
    memory(forked, file).score(MASKS)
    header, _, sums = file.read_text().partition("\n")
    file.write_text(sums)
    with pytest.raises(UserError, match="choose another --out") as raised:
        memory(forked, file)
    assert header in str(raised.value)
    file.write_text(f"{header}\n{sums}")
    calls = forked.num_calls
    memory(forked, file).score(MASKS)
    assert forked.num_calls == calls


def test_a_torn_last_line_is_computed_again(forked: CountingPass, tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    first = memory(forked, file).score(MASKS)
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert memory(forked, file).score(MASKS) == first
    assert file.read_bytes() == whole
