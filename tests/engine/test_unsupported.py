"""Families in which removing a block has no clear meaning yet are refused by name and by what they do."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GPTNeoXJapaneseConfig,
    PreTrainedConfig,
)

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from tests.conftest import TINY, tiny_llama
from tests.engine.architectures import ROWS

SHARED = {**TINY, "head_dim": 16, "sliding_window": 32}
PER_LAYER = {"vocab_size_per_layer_input": 160, "num_kv_shared_layers": 0}
ALTUP = {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2}
CASES: dict[str, tuple[PreTrainedConfig, str]] = {
    "gemma3n": (
        Gemma3nTextConfig(**SHARED, **PER_LAYER, **ALTUP, activation_sparsity_pattern=[0.0] * 4),
        "'gemma3n_text' is not supported yet: its layers pass on 4 dimensions",
    ),
    "gpt_neox_japanese": (
        GPTNeoXJapaneseConfig(**TINY),
        "'gpt_neox_japanese' is not supported yet: 'attention' of its layer 3 returns weights that the layer adds",
    ),
}


@pytest.mark.parametrize("family", CASES)
def test_a_family_that_is_not_supported_is_refused_by_what_it_does(family: str) -> None:
    config, message = CASES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError) as error:
        decoder = Decoder(model)
        decoder.shape  # noqa: B018 - where a search looks first
        check_removable(decoder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_with_which_a_known_family_cannot_run_is_refused() -> None:
    model = tiny_llama(torch.float32)
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(7, 7)
    with pytest.raises(
        UserError, match="cannot run with the values of its config: its forward fails with RuntimeError"
    ):
        check_removable(Decoder(model))


def test_a_full_memory_says_nothing_about_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ROWS["phi (no row in the engine)"].model()

    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", full)
    with pytest.raises(RuntimeError, match="can't allocate memory") as error:
        check_removable(Decoder(model))
    assert not isinstance(error.value, UserError)
