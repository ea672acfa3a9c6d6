"""Orders of channels: the saliencies are the losses that they stand for, and the benchmark runs as a whole."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import channel_orders
from benchmarks.channel_orders import _in_rounds, _saliency
from tests.conftest import TEXT


def example() -> tuple[Tensor, Tensor]:
    """A weight [hidden, channels] and a Gram whose channels are correlated."""
    torch.manual_seed(0)
    inputs = torch.randn(40, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    return torch.randn(5, 8, dtype=torch.float64), inputs.T @ inputs


def loss_without(weight: Tensor, gram: Tensor, gone: list[int]) -> float:
    """What is lost of the output without some channels, when the others are fitted by least squares."""
    kept = [number for number in range(len(gram)) if number not in gone]
    factor = torch.linalg.cholesky(gram).T  # inputs with this Gram
    target = factor @ weight.T
    fitted = torch.linalg.lstsq(factor[:, kept], target).solution
    return float((target - factor[:, kept] @ fitted).square().sum())


def test_the_saliency_of_a_channel_is_what_is_lost_when_the_others_are_refitted() -> None:
    weight, gram = example()
    expected = [loss_without(weight, gram, [number]) for number in range(8)]
    assert _saliency(weight, gram).tolist() == pytest.approx(expected, rel=1e-9)


def test_in_rounds_of_one_channel_the_one_goes_that_costs_least_beside_those_that_are_gone() -> None:
    weight, gram = example()
    gone: list[int] = []
    while len(gone) < 8:
        left = [number for number in range(8) if number not in gone]
        gone.append(min(left, key=lambda number: loss_without(weight, gram, [*gone, number]) if len(left) > 1 else 0.0))
    assert _in_rounds(weight, gram).argsort().tolist() == gone


def test_all_orders_are_judged_before_and_after_a_refit(
    trained_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    channel_orders.main(
        [str(text)], str(text), tmp_path, model=str(trained_folder), num_samples=1, seq_len=16, num_windows=32,
        held_out_windows=8, dtype="float32",
    )  # fmt: skip
    rows = json.loads((tmp_path / "channel_orders.json").read_text())["rows"]
    assert len(rows) == 3 * (6 + channel_orders.NUM_SEEDS)
    costs = {(row["order"], row["removed"]): row for row in rows}
    used = costs["norm of the activations x norm of the column of down (used)", "half of every MLP"]
    at_random = costs["random", "half of every MLP"]
    assert used["pruned"] < at_random["pruned"]
    assert at_random["refitted"] < at_random["pruned"]
