"""Post-training: only what it may change changes, merged weights are the adapters, and a stop costs nothing."""

import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import RecoveryFailed, UserError
from blockpruner.engine.losses import token_kl
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.recovery import training as recovery
from blockpruner.engine.recovery.checkpoints import latest_checkpoint
from blockpruner.engine.recovery.config import Loss, RecoveryConfig
from blockpruner.engine.recovery.trained.adapters import Adapters
from blockpruner.engine.recovery.training import (
    draw_rows,
    recorded_losses,
    recovered_share,
    train,
)
from blockpruner.engine.scoring.reference import plain_window_sum
from tests.conftest import tiny_tokenizer
from tests.engine.architectures import ROWS

ADAPTER = Path("adapter") / "adapter_model.safetensors"


def pruned(name: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """With an MLP before the first attention, and one that joined the attention before it."""
    return prune(ROWS[name].model(), Mask.parse("mha.0+mlp.1+mha.2")).to(dtype)


def some_rows(num_rows: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 20, (num_rows,), generator=generator).tolist()
    return [torch.randint(3, 100, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("name", ["llama tied", "gpt2", "phi3", "mixtral"])
def test_a_text_is_learnt_by_the_linear_layers_of_the_blocks_alone(
    tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    ids = torch.arange(3, 40)
    train(pruned(name), [ids] * 4, RecoveryConfig.of(lr=0.02, epochs=8), tmp_path)
    losses = recorded_losses(tmp_path)
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5
    merged = Adapters().merge(pruned(name), tmp_path)
    assert [str(warning.message) for warning in recwarn] == []
    assert type(merged) is type(pruned(name))
    before = pruned(name).state_dict()
    changed = {key for key, weight in merged.state_dict().items() if not torch.equal(weight, before[key])}
    in_layers = {key for key in before if ".h." in key or ".layers." in key}
    linear = {key for key in in_layers if before[key].ndim == 2 and not key.endswith("mlp.gate.weight")}
    assert changed == linear
    expected = PeftModel.from_pretrained(pruned(name), tmp_path / "adapter").eval()(input_ids=ids[None]).logits
    torch.testing.assert_close(merged(input_ids=ids[None]).logits, expected, rtol=1e-4, atol=1e-4)


def test_merged_bfloat16_weights_are_rounded_once(tmp_path: Path) -> None:
    train(pruned(dtype=torch.bfloat16), some_rows(), RecoveryConfig.of(lr=0.02), tmp_path)
    assert {weight.dtype for weight in load_file(tmp_path / ADAPTER).values()} == {torch.float32}
    merged = Adapters().merge(pruned(dtype=torch.bfloat16), tmp_path)
    wide = Adapters().merge(pruned(dtype=torch.bfloat16).float(), tmp_path)
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, wide.state_dict()[name].bfloat16()), name


def test_rows_of_a_batch_count_as_rows_one_by_one(tmp_path: Path) -> None:
    """Before the first step the adapters are zero, so the loss is the model's: over tokens, and padding is none."""
    rows = some_rows(4)
    model = pruned("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    sums = [plain_window_sum(model, row) for row in rows]
    expected = sum(sums) / sum(len(row) - 1 for row in rows)
    train(pruned("llama"), rows, RecoveryConfig(), tmp_path / "llama")
    train(model, rows, RecoveryConfig(batch_size=2, accumulation=2), tmp_path / "gpt2")
    assert recorded_losses(tmp_path / "gpt2") == [pytest.approx(expected, rel=1e-5)]
    sums = [plain_window_sum(pruned("llama"), row) for row in rows]
    expected = sum(sums) / sum(len(row) - 1 for row in rows)
    assert recorded_losses(tmp_path / "llama") == [pytest.approx(expected, rel=1e-5)]


def test_a_training_that_was_stopped_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "SAVE_STEPS", 2)
    config = RecoveryConfig.of(lr=0.01, epochs=3)

    def stop(step: int, num_steps: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    train(pruned(), some_rows(), config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(pruned(), some_rows(), config, tmp_path / "parts", stop)
    assert not (tmp_path / "parts" / "adapter").exists()
    (tmp_path / "parts" / "checkpoint-3").mkdir()  # as a crash in the middle of writing leaves it
    steps: list[int] = []
    train(pruned(), some_rows(), config, tmp_path / "parts", lambda step, num_steps, loss: steps.append(step))
    assert steps == [3, 4, 5, 6]
    assert (tmp_path / "parts" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    assert recorded_losses(tmp_path / "parts") == recorded_losses(tmp_path / "whole")
    train(pruned(), some_rows(), config, tmp_path / "parts", stop)  # nothing is left to do
    assert (tmp_path / "parts" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_distillation_leads_the_distributions_to_those_of_the_dense_model(tmp_path: Path) -> None:
    dense, rows = ROWS["llama"].model().float(), some_rows(4)
    config = RecoveryConfig.of(lr=0.02, epochs=12, loss=Loss.DISTILL)
    train(pruned(), rows, config, tmp_path, teacher=dense)
    losses = recorded_losses(tmp_path)

    def divergence(model: PreTrainedModel) -> float:
        with torch.no_grad():
            found = [token_kl(*(one(input_ids=row[None]).logits[0, :-1] for one in (model, dense))) for row in rows]
        return float(torch.cat(found).mean())

    assert losses[0] == pytest.approx(divergence(pruned()), rel=1e-5), "the adapters are zero before the first step"
    assert divergence(Adapters().merge(pruned(), tmp_path)) < 0.7 * losses[0]


def test_a_distillation_with_padded_rows_counts_each_token_once(tmp_path: Path) -> None:
    dense, rows = ROWS["llama"].model().float(), some_rows(4)
    one, two = RecoveryConfig(loss=Loss.DISTILL), RecoveryConfig(loss=Loss.DISTILL, batch_size=2, accumulation=2)
    train(pruned(), rows, one, tmp_path / "one", teacher=dense)
    train(pruned(), rows, two, tmp_path / "two", teacher=dense)
    assert recorded_losses(tmp_path / "one") == pytest.approx(recorded_losses(tmp_path / "two"), rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(RecoveryFailed, match=r"the loss of training step \d is not finite; use a lower `lr`"):
        train(pruned(), some_rows(16), RecoveryConfig.of(lr=1e30), tmp_path)
    assert latest_checkpoint(tmp_path) is None


BAD_CONFIGS = [{"rank": 0}, {"epochs": 0}, {"batch_size": 0}, {"accumulation": -1}, {"seq_len": 1}, {"lr": 0.0}]


@pytest.mark.parametrize("options", [*BAD_CONFIGS, {"alpha": -1.0}, {"lr": float("nan")}], ids=str)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(UserError, match=f"expected `{name}` "):
        RecoveryConfig.of(**options)  # type: ignore[arg-type]


def draw(path: Path, **options: object) -> recovery.TrainingRows:
    return draw_rows(str(path), tiny_tokenizer(), **{"num_rows": 5, "seq_len": 8, "seed": 3, **options})  # type: ignore[arg-type]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = ["quick brown fox " * (1 + number % 3) + f"birds {number}" for number in range(9)]
    path.write_text("".join(json.dumps({"text": text, "n": number}) + "\n" for number, text in enumerate(texts)))
    return path


def test_rows_are_drawn_by_the_seed_and_the_others_are_held_out(data: Path) -> None:
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    found, tokenizer = draw(data, seq_len=100), tiny_tokenizer()
    drawn = random.Random(3).sample(range(9), 5)
    assert [row.tolist() for row in found.tokens] == [tokenizer(texts[index])["input_ids"] for index in drawn]
    assert found.rest == [text for index, text in enumerate(texts) if index not in drawn]
    assert draw(data, seq_len=100).fingerprint == found.fingerprint
    assert draw(data, seq_len=100, seed=4).fingerprint != found.fingerprint
    assert found.notes == ()


def test_what_is_cut_off_or_missing_is_said(data: Path) -> None:
    found = draw(data, num_rows=20, seq_len=4)
    assert all(len(row) <= 4 for row in found.tokens)
    assert found.rest == []
    assert "9 rows, fewer than the 20 requested; all are used, none held out" in found.notes[0]
    assert "are longer than 4 tokens and were cut off" in found.notes[1]


def test_rows_without_a_token_to_predict_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": ""}\n{"text": "the quick fox"}\n')
    found = draw(path, num_rows=2)
    assert len(found.tokens) == 1
    assert found.notes == ("1 of 2 rows have no token to predict and were left out",)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"text_column": "words"}, "expected a column 'words'"), ({"num_rows": 0}, "expected `num_rows` of at least 1")],
)
def test_rows_that_are_not_there_are_refused(data: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(data, **options)


def test_each_of_several_sources_gives_a_row(data: Path) -> None:
    with pytest.raises(UserError, match="expected `num_rows` of at least 2, one of each `data`, got 1"):
        recovery.draw_mixed_rows([str(data), str(data)], tiny_tokenizer(), num_rows=1, seq_len=8, seed=3)


def test_the_recovered_share_is_of_what_was_lost() -> None:
    assert recovered_share(10, 30, 30) == 0
    assert recovered_share(10, 30, 15) == 0.75
    assert recovered_share(10, 30, 35) == -0.25
    assert recovered_share(10, 10, 9) is None
    assert recovered_share(10, float("inf"), 9) is None
