"""A model folder that brings its own code, as Baichuan2 does: fused projections, layers that return tuples."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.conftest import tiny_tokenizer

CONFIGURATION = """
from transformers import PretrainedConfig


class TinychuanConfig(PretrainedConfig):
    model_type = "tinychuan"

    def __init__(self, vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                 num_attention_heads=4, max_position_embeddings=128, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)
"""

MODELING = """
import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_tinychuan import TinychuanConfig


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden_states):
        return self.weight * hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        batch, length, size = hidden_states.shape
        packed = self.W_pack(hidden_states).view(batch, length, 3, self.num_heads, -1)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None and length > 1
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, size)), None


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, value_embedding=None, shared=None):
        normed = self.input_layernorm(hidden_states)
        if value_embedding is not None:  # tests of refusals pass one, as speed-run GPTs do
            normed = normed + value_embedding
        if shared is not None:
            shared[len(shared)] = normed
        attended, _ = self.self_attn(
            hidden_states=normed,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return (hidden_states,)


class TinychuanPreTrainedModel(PreTrainedModel):
    config_class = TinychuanConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(std=0.2)


class TinychuanModel(TinychuanPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                use_cache=None, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[None]
        hidden_states = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, past_key_values=past_key_values)[0]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class TinychuanForCausalLM(TinychuanPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = TinychuanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                use_cache=None, **kwargs):
        output = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        logits = self.lm_head(output.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)
"""

CONFIG = {
    "model_type": "tinychuan",
    "architectures": ["TinychuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_tinychuan.TinychuanConfig",
        "AutoModelForCausalLM": "modeling_tinychuan.TinychuanForCausalLM",
    },
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "dtype": "float32",
}


def write_remote_code_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "configuration_tinychuan.py").write_text(CONFIGURATION)
    (folder / "modeling_tinychuan.py").write_text(MODELING)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (160, 32),
        "model.embed_positions.weight": (128, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (160, 32),
    }
    for index in range(4):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.self_attn.W_pack.weight": (96, 32),
            f"{layer}.self_attn.o_proj.weight": (32, 32),
            f"{layer}.mlp.gate_proj.weight": (48, 32),
            f"{layer}.mlp.up_proj.weight": (48, 32),
            f"{layer}.mlp.down_proj.weight": (32, 48),
            f"{layer}.input_layernorm.weight": (32,),
            f"{layer}.post_attention_layernorm.weight": (32,),
        }
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
