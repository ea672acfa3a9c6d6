"""`train=projections`: exactly the output projections change, and what is written is what was trained."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blockpruner.engine.compensation.names import projection_names
from blockpruner.engine.errors import UserError
from blockpruner.engine.losses import token_kl
from blockpruner.engine.recovery import training
from blockpruner.engine.recovery.changed_weights import ChangedWeights
from blockpruner.engine.recovery.config import Loss, RecoveryConfig
from blockpruner.engine.recovery.trained.projections import Projections
from blockpruner.engine.recovery.training import recorded_losses, train
from blockpruner.engine.sections import ModelSource
from tests.engine.architectures import ROWS
from tests.engine.test_recovery import pruned, some_rows

LLAMA = frozenset({"self_attn.o_proj", "mlp.down_proj"})
NAMES = {
    "llama": LLAMA,
    "gpt2": frozenset({"attn.c_proj", "mlp.c_proj"}),
    "mixtral": frozenset({"self_attn.o_proj"}),  # experts are no single linear layer
    "gemma2": LLAMA,
}


def config(**options: object) -> RecoveryConfig:
    return RecoveryConfig.of(train="projections", **options)


@pytest.mark.parametrize("name", NAMES)
def test_output_projections_are_found_without_the_models_weights(tmp_path: Path, name: str) -> None:
    ROWS[name].model().config.save_pretrained(tmp_path)
    assert projection_names(ModelSource(str(tmp_path))) == NAMES[name]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_text_is_learnt_by_the_output_projections_alone(tmp_path: Path, name: str) -> None:
    ids = torch.arange(3, 40)
    train(pruned(name), [ids] * 4, config(lr=0.01, epochs=8), tmp_path, projections=NAMES[name])
    losses = recorded_losses(tmp_path)
    assert losses[-1] < losses[0] - 0.5
    merged, before = Projections().merge(pruned(name), tmp_path), pruned(name).state_dict()
    changed = {key for key, weight in merged.state_dict().items() if not torch.equal(weight, before[key])}
    ends = tuple(f".{one}.weight" for one in NAMES[name])
    assert changed == {key for key in before if key.endswith(ends)}
    with torch.no_grad():
        loss = merged(input_ids=ids[None], labels=ids[None]).loss
    assert loss < losses[0] - 0.5


def test_what_runs_in_bfloat16_is_what_is_written(tmp_path: Path) -> None:
    """The changes are float32, and their sum with the weights is rounded once, in training as at the end."""
    rows = some_rows()
    train(pruned(dtype=torch.bfloat16), rows, config(lr=1e-4), tmp_path, projections=LLAMA)
    changes = load_file(tmp_path / "changes.safetensors")
    assert {change.dtype for change in changes.values()} == {torch.float32}
    merged = Projections().merge(pruned(dtype=torch.bfloat16), tmp_path)
    model = pruned(dtype=torch.bfloat16)
    running = ChangedWeights(model, list(changes))
    for parameter, change in zip(running.changes, changes.values(), strict=True):
        parameter.data = change
    mask = torch.ones_like(rows[0][None])
    assert torch.equal(running(rows[0][None], mask).logits, merged(input_ids=rows[0][None]).logits)
    before = pruned(dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items()), "the model is frozen"


def test_distillation_leads_the_projections_to_the_dense_model(tmp_path: Path) -> None:
    dense, rows = ROWS["llama"].model().float(), some_rows(4)
    train(pruned(), rows, config(lr=0.01, epochs=12, loss=Loss.DISTILL), tmp_path, projections=LLAMA, teacher=dense)
    losses = recorded_losses(tmp_path)
    merged = Projections().merge(pruned(), tmp_path)
    with torch.no_grad():
        found = [token_kl(*(one(input_ids=row[None]).logits[0, :-1] for one in (merged, dense))) for row in rows]
    assert float(torch.cat(found).mean()) < 0.7 * losses[0]


def test_a_training_that_was_stopped_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_STEPS", 2)

    def stop(step: int, num_steps: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    how = config(lr=0.01, epochs=3)
    train(pruned(), some_rows(), how, tmp_path / "whole", projections=LLAMA)
    with pytest.raises(KeyboardInterrupt):
        train(pruned(), some_rows(), how, tmp_path / "parts", stop, projections=LLAMA)
    train(pruned(), some_rows(), how, tmp_path / "parts", projections=LLAMA)
    whole, parts = ((tmp_path / name / Projections.file).read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_a_checkpoint_of_a_training_holds_the_changes_and_not_the_model(tmp_path: Path) -> None:
    train(pruned(), some_rows(), config(), tmp_path, projections=LLAMA)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    held = load_file(checkpoint / "model.safetensors")
    assert [name.split(".")[0] for name in held] == ["changes"] * 5, "two attentions and three MLPs are left"


def test_options_of_adapters_and_models_without_projections_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected `rank` with `train=adapters`, got `train=projections`"):
        config(rank=8)
    assert config().train.lr != RecoveryConfig().train.lr
    with pytest.raises(UserError, match="blocks with an output projection for `train=projections`, found none"):
        train(pruned(), some_rows(), config(), tmp_path, projections=())
