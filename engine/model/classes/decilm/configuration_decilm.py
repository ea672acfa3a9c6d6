"""Config of a Llama-like decoder from which single attention or MLP blocks were removed.

The layout is that of NVIDIA's Nemotron-NAS models, which vLLM, SGLang, TensorRT-LLM, mlx-lm and exllamav3 know.
"""

from dataclasses import is_dataclass

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


class Fields(dict):
    """A JSON object whose values are attributes, too: engines read block configs either way."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def checked(cls):
    """Let transformers 5 check the types of this class's fields, too. Configs of transformers 4 are not checked."""
    return strict(cls) if is_dataclass(cls) else cls


@checked
class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"
    num_key_value_heads: int | list | None = None

    def __init__(self, block_configs=None, qkv_bias=False, **kwargs):
        """
        block_configs: one a layer: {"attention": {"no_op", "n_heads_in_group"}, "ffn": {"no_op", "ffn_mult"}}.
        qkv_bias: whether query, key and value have a bias; `attention_bias` then says it of the output alone.
        """
        super().__init__(**kwargs)
        self.qkv_bias = qkv_bias
        self.block_configs = [
            Fields({name: Fields(values) for name, values in block.items()}) for block in block_configs or []
        ]
        if rope := getattr(self, "rope_parameters", None):  # some engines look for it here, as transformers 4 does
            self.rope_theta = rope["rope_theta"]

    def intermediate_size_of(self, layer):
        """Width of a layer's MLP: 2/3 x ffn_mult x hidden size, rounded up to a multiple of 256."""
        width = int(2 * self.block_configs[layer].ffn.ffn_mult * self.hidden_size / 3)
        return -(-width // 256) * 256
