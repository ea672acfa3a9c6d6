"""`sample`: text that a model writes."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig
from typer.testing import CliRunner

import blockpruner as bp
from blockpruner import cli
from blockpruner.engine.errors import UserError
from blockpruner.engine.text.sampled import sampled_texts
from tests.conftest import TEXT, load, tiny_tokenizer


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_a_trained_model_writes_its_text_and_the_same_seed_the_same_texts(trained_folder: Path, tmp_path: Path) -> None:
    options = {"num_rows": 5, "num_tokens": 40, "batch_size": 2, "dtype": "float32"}
    found = bp.sample(trained_folder, tmp_path / "one.jsonl", **options)
    assert (found["num_rows"], found["num_tokens"]) == (5, 200)
    bp.sample(trained_folder, tmp_path / "two.jsonl", **options)
    bp.sample(trained_folder, tmp_path / "other.jsonl", **options, seed=1)
    one, two, other = (texts_of(tmp_path / f"{name}.jsonl") for name in ("one", "two", "other"))
    assert one == two != other
    assert len(one) == len(set(one)) == 5
    words = Counter(word.strip("Ġ") for text in one for word in text.split())
    assert sum(words[word] for word in set(TEXT.split())) > 0.3 * sum(words.values())
    windows = bp.calibration(tmp_path / "one.jsonl", tiny_tokenizer(), seq_len=16)
    assert windows.num_windows >= 10


def test_tokens_are_drawn_from_the_whole_distribution(trained_folder: Path) -> None:
    """The share of each first token is its probability, also for what greedy or top-k sampling would leave out,
    and whatever the model's own config of generation asks for."""
    model, tokenizer = load(trained_folder), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)  # a flat distribution
        expected = model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    own = model.generation_config = GenerationConfig(min_p=0.9, repetition_penalty=5.0, suppress_tokens=[40])
    drawn = sampled_texts(model, tokenizer, start=1, num_rows=4000, num_tokens=1, batch_size=2000, seed=0)
    pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(expected))]
    shares = Counter(drawn)
    for piece in set(pieces):
        share = float(sum(expected[token] for token in range(len(pieces)) if pieces[token] == piece))
        assert shares[piece] / 4000 == pytest.approx(share, abs=5 * (share / 4000) ** 0.5 + 1e-3)
    assert len(shares) > 60
    assert model.generation_config is own


def test_what_cannot_be_written_is_refused(trained_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected `out` to be a \.jsonl file"):
        bp.sample(trained_folder, tmp_path / "own.txt")
    (tmp_path / "there.jsonl").write_text("keep")
    with pytest.raises(UserError, match="expected a new file"):
        bp.sample(trained_folder, tmp_path / "there.jsonl")
    with pytest.raises(UserError, match=r"cannot write .*File exists; choose another `out`"):
        bp.sample("nowhere", tmp_path / "there.jsonl" / "own.jsonl")
    with pytest.raises(UserError, match="expected `start` to be one token of the tokenizer, got 'no such'"):
        bp.sample(trained_folder, tmp_path / "own.jsonl", num_tokens=8, start="no such")
    with pytest.raises(UserError, match="`num_tokens` of at most 128"):
        bp.sample(trained_folder, tmp_path / "own.jsonl", num_tokens=500)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["there.jsonl"]


def test_the_command_says_where_the_text_is(trained_folder: Path, tmp_path: Path) -> None:
    arguments = [
        "sample",
        str(trained_folder),
        "--num-rows",
        "2",
        "--num-tokens",
        "8",
        "--out",
        str(tmp_path / "a.jsonl"),
    ]
    result = CliRunner().invoke(cli.app, [*arguments, "--start", "</s>", "--json"])
    assert result.exit_code == 0, result.output
    assert "texts begin with '</s>'" in result.output
    assert json.loads(result.output.splitlines()[-1])["num_rows"] == 2
