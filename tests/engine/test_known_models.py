"""The built-in shapes have the published numbers of parameters."""

import pytest

from blockpruner.engine.model.architectures import ARCHITECTURES
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.known_models import KNOWN_MODELS, known_config
from blockpruner.engine.model.loading import meta_from_config
from blockpruner.engine.sections import ModelSource

PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen1.5-7b": 7_721_324_544,
    "qwen1.5-14b": 14_167_290_880,
    "baichuan2-7b": 7_505_973_248,
    "baichuan2-13b": 13_896_668_160,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_known_model_has_its_published_number_of_parameters(name: str) -> None:
    config = known_config(name)
    assert config is not None
    shape = Decoder(meta_from_config(config, "bfloat16", ModelSource(name))).shape
    assert shape.num_parameters == PARAMETERS[name]


def test_every_known_model_is_of_a_supported_family() -> None:
    """So a plan need not try them."""
    for make in KNOWN_MODELS.values():
        assert make().model_type in ARCHITECTURES


def test_known_models_go_by_hub_id_and_by_its_last_part() -> None:
    assert len(PARAMETERS) == len(KNOWN_MODELS)
    for name in ("meta-llama/Llama-2-7b-hf", "Llama-2-7b-hf", "llama-2-7b", "LLAMA-2-7B", "Llama2-7B"):
        assert known_config(name) is not None
    assert known_config("somebody/llama-2-7b-pruned") is None
