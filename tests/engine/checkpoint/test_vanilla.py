"""The stock architecture: the same logits without code, in every architecture; refused where that cannot be."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Mask
from blockpruner.engine.checkpoint.assembled import check_same
from blockpruner.engine.checkpoint.remainder import what_is_left
from blockpruner.engine.checkpoint.vanilla import vanilla_model
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.surgery import prune
from tests.conftest import generate, load
from tests.engine.architectures import ROWS, SOME_ROWS

SIDE_BY_SIDE = {
    "stablelm parallel", "cohere", "gpt_neox parallel", "falcon parallel", "falcon two norms",
    "phi (no row in the engine)", "gptj (no row in the engine)",
}  # fmt: skip
"""Attention and MLP read the same stream: blocks of two layers cannot become one."""
BY_INDEX = {"gpt2 scaled by layer", "qwen3_moe", "llama4"}
"""What a layer is hangs on its index: it cannot be moved."""


def save(name: str, text: str, folder: Path, *, sequential: bool) -> tuple[PreTrainedModel, PreTrainedModel, str]:
    """The pruned model, what was written and loaded again, and what is said about it."""
    pruned = prune(ROWS[name].model().float(), Mask.parse(text))
    model, notes = vanilla_model(what_is_left(pruned), sequential=sequential)
    model.generation_config = pruned.generation_config
    model.save_pretrained(folder)
    loaded = load(folder, "float32")
    check_same(loaded, pruned, 1e-3)
    return pruned, loaded, notes[0]


@pytest.mark.parametrize("name", SOME_ROWS)
def test_any_architecture_loads_without_code_and_generates_the_same(name: str, tmp_path: Path) -> None:
    sequential = name not in SIDE_BY_SIDE | BY_INDEX
    pruned, loaded, note = save(name, "mha.0+mlp.1+mha.2", tmp_path, sequential=sequential)
    assert loaded.config.model_type == ROWS[name].make_config().model_type
    assert not list(tmp_path.glob("*.py"))
    assert generate(loaded) == generate(pruned, use_cache=False)
    assert note.startswith("3 full layers of 4: of the 3 removed blocks 2 are gone" if sequential else "4 full layers")


@pytest.mark.parametrize("name", sorted(SIDE_BY_SIDE | BY_INDEX))
def test_a_wrong_pairing_is_noticed(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`format=grouped`"):
        save(name, "mha.0+mlp.1+mha.2", tmp_path, sequential=True)


def test_what_hangs_on_an_index_is_refused_when_layers_go(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got different ones"):
        save("gpt2 scaled by layer", "mha.1+mlp.1+mlp.2", tmp_path, sequential=False)


def test_zeros_stand_for_what_is_missing_and_are_counted(tmp_path: Path) -> None:
    _, loaded, note = save("llama", "mha.2", tmp_path, sequential=True)
    layer = loaded.model.layers[2]
    zeros = [*layer.self_attn.parameters(), layer.input_layernorm.weight]
    assert not any(weight.any() for weight in zeros)
    assert f"({sum(weight.numel() for weight in zeros):,} parameters)" in note
    assert torch.isfinite(loaded(input_ids=torch.tensor([[3, 4, 5]])).logits).all()
