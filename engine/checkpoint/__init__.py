"""Pruned checkpoints: one format a file. Importing this package makes their classes known to transformers: then
`from_pretrained` loads them without `trust_remote_code`."""

from blockpruner.engine.checkpoint.decilm.configuration_decilm import DeciLMConfig
from blockpruner.engine.checkpoint.decilm.modeling_decilm import DeciLMForCausalLM
from blockpruner.engine.model.pruned_classes import register, register_pruned_types

register(DeciLMConfig, DeciLMForCausalLM)
register_pruned_types()
