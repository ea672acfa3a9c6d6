"""A Llama-like decoder from which single attention or MLP blocks were removed: a layer has one or both of them."""

import copy

from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from .configuration_decilm import DeciLMConfig


class DeciLMAttention(LlamaAttention):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if config.qkv_bias and not config.attention_bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                linear = getattr(self, name)
                setattr(self, name, nn.Linear(linear.in_features, linear.out_features, bias=True))


class DeciLMLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer, slot):
        """slot: this layer's place among those with attention, and so in the KV cache: no slot before the last used
        one is empty."""
        super().__init__()
        block = config.block_configs[layer]
        self.self_attn = self.mlp = None
        if not block.attention.no_op:
            self.self_attn = DeciLMAttention(config, slot)
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        if not block.ffn.no_op:
            own = copy.copy(config)
            own.intermediate_size = config.intermediate_size_of(layer)
            self.mlp = LlamaMLP(own)
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, **kwargs):
        if self.self_attn is not None:
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class DeciLMModel(LlamaModel):
    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMLayer"]
    _can_record_outputs = {"hidden_states": DeciLMLayer, "attentions": DeciLMAttention}

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList()
        num_attentions = 0
        for layer, block in enumerate(config.block_configs):
            self.layers.append(DeciLMLayer(config, layer, num_attentions))
            num_attentions += not block.attention.no_op
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM):
    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.post_init()
