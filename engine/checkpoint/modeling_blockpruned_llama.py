"""A Llama-type decoder from which single attention or MLP blocks were removed.

Every decoder layer of this model holds one attention that was kept. An MLP whose own attention is gone belongs to the
layer of the attention before it (`post`), or, before the first attention, to the first layer (`pre`). So layer k uses
slot k of the KV cache, and no slot is empty. `block_groups` in config.json lists the layers of the source model that
each layer of this one is made of.
"""

from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)


class BlockPrunedLlamaConfig(LlamaConfig):
    model_type = "blockpruned_llama"
    block_groups: list | None = None
    """One a layer: {"pre": [source layers], "attention": source layer, "mlp": bool, "post": [source layers]}."""
    source_num_hidden_layers: int | None = None


class NoAttention(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states.new_zeros(()), None


class NoMlp(nn.Module):
    def forward(self, hidden_states):
        return hidden_states.new_zeros(())


class MlpLayer(LlamaDecoderLayer):
    """What is left of a layer whose attention was removed."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn = NoAttention()
        self.input_layernorm = nn.Identity()


class GroupedLayer(LlamaDecoderLayer):
    """A layer that kept its attention, with the MLP layers around it."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        group = config.block_groups[layer_idx]
        if not group["mlp"]:
            self.mlp = NoMlp()
            self.post_attention_layernorm = nn.Identity()
        self.pre = nn.ModuleList(MlpLayer(config, layer_idx) for _ in group["pre"])
        self.post = nn.ModuleList(MlpLayer(config, layer_idx) for _ in group["post"])

    def forward(self, hidden_states, **kwargs):
        for layer in self.pre:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = super().forward(hidden_states, **kwargs)
        for layer in self.post:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states


class BlockPrunedLlamaModel(LlamaModel):
    config_class = BlockPrunedLlamaConfig
    _no_split_modules = ["GroupedLayer"]
    _can_record_outputs = {"hidden_states": GroupedLayer, "attentions": LlamaAttention}

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(GroupedLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class BlockPrunedLlamaForCausalLM(LlamaForCausalLM):
    config_class = BlockPrunedLlamaConfig
    _no_split_modules = ["GroupedLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.model = BlockPrunedLlamaModel(config)
        self.post_init()
