"""Whatever a model's config and files say: a format refuses, or its logits are those of the dense model without the
blocks."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from blockpruner.engine.blocks import Mask
from blockpruner.engine.checkpoint.format import Format, Pruned
from blockpruner.engine.checkpoint.formats.deci import Deci
from blockpruner.engine.checkpoint.formats.grouped import Grouped
from blockpruner.engine.checkpoint.formats.vanilla import Vanilla
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.surgery import prune
from blockpruner.engine.sections import ModelSource
from tests.conftest import TINY, load, tiny_tokenizer

NUM_LAYERS, TOLERANCE = TINY["num_hidden_layers"], 1e-3
IDS = torch.arange(3, 51)[None]
SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
}  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> transformers.PreTrainedConfig:
    family = draw(st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3"]))
    kind = draw(st.sampled_from(sorted(SCALED)))
    options: dict[str, Any] = {
        "tie_word_embeddings": draw(st.booleans()),
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "intermediate_size": draw(st.sampled_from([48, 256])),
        "rope_parameters": {"rope_type": kind, "rope_theta": draw(st.sampled_from([1e4, 5e5])), **SCALED[kind]},
        "hidden_act": draw(st.sampled_from(["silu", "gelu"])),
    }
    if family == "Llama":
        options |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    if family in ("Llama", "Mistral", "Qwen3"):
        options["head_dim"] = draw(st.sampled_from([8, 16]))
    if family == "Mistral":
        options["sliding_window"] = draw(st.sampled_from([None, 7]))
    if family in ("Qwen2", "Qwen3") and draw(st.booleans()):
        options |= {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": draw(st.integers(0, 4))}
    return getattr(transformers, f"{family}Config")(**{**TINY, "initializer_range": 0.2, **options})


def masks() -> st.SearchStrategy[Mask]:
    names = [f"{kind}.{layer}" for layer in range(NUM_LAYERS) for kind in ("mha", "mlp")]
    some = st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True)
    return some.filter(lambda blocks: sum("mha" in block for block in blocks) < NUM_LAYERS).map(
        lambda blocks: Mask.parse("+".join(blocks))
    )


def store(config: transformers.PreTrainedConfig, own_head: bool, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too, must not be trivial
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if own_head:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without(folder: Path, mask: Mask) -> torch.Tensor:
    """Logits of the dense model as transformers loads it, with zeros for what the mask's blocks add."""
    dense = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for block in mask.absent:
            layer = dense.model.layers[block.layer]
            last = layer.self_attn.o_proj if block.kind == "mha" else layer.mlp.down_proj
            for parameter in last.parameters():
                parameter.zero_()
    return logits(dense)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def check_one_line(error: UserError) -> None:
    assert "\n" not in str(error)


def check(config: transformers.PreTrainedConfig, own_head: bool, mask: Mask, forms: list[Format]) -> int:
    """Return the number of formats that could express the model."""
    num_written = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store(config, own_head, folder / "dense")
        expected = without(folder / "dense", mask)
        pruned = Pruned(prune(load(folder / "dense"), mask), ModelSource(str(folder / "dense")), "float32", {})
        for form in forms:
            out = folder / form.name
            out.mkdir()
            try:
                form.write(pruned, out)
            except UserError as error:
                check_one_line(error)
                continue
            num_written += 1
            assert (logits(load(out)) - expected).abs().max() <= TOLERANCE * expected.std(), form.name
    return num_written


@settings(derandomize=True, deadline=None, max_examples=8)
@given(configs(), st.booleans(), masks())
def test_a_format_refuses_or_gives_the_masked_models_logits(
    config: transformers.PreTrainedConfig, own_head: bool, mask: Mask
) -> None:
    assert check(config, own_head, mask, [Grouped(), Deci(), Vanilla()]) >= 1
