"""Config of a Llama-like decoder from which single attention or MLP blocks were removed.

The layout is that of NVIDIA's Nemotron-NAS models, which vLLM, SGLang, TensorRT-LLM, mlx-lm and exllamav3 know.
"""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


class Fields(dict):
    """A JSON object whose values are attributes, too: engines read block configs either way."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@strict
class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"
    num_key_value_heads: int | list | None = None
    block_configs: list | None = None
    """One a layer: {"attention": {"no_op", "n_heads_in_group", ...}, "ffn": {"no_op", "ffn_mult", ...}}."""
    qkv_bias: bool = False
    """Whether query, key and value have a bias; `attention_bias` then says it of the output alone."""

    def __post_init__(self, **kwargs):
        self.block_configs = [
            Fields({name: Fields(values) for name, values in block.items()}) for block in self.block_configs or []
        ]
        super().__post_init__(**kwargs)
        self.rope_theta = self.rope_parameters["rope_theta"]  # some engines look for it here

    def intermediate_size_of(self, layer):
        """Width of a layer's MLP: 2/3 x ffn_mult x hidden size, rounded up to a multiple of 256."""
        width = int(2 * self.block_configs[layer].ffn.ffn_mult * self.hidden_size / 3)
        return -(-width // 256) * 256
