"""Model classes that are not part of transformers: pruned models, sliced models, and NVIDIA's DeciLM layout.

Importing this package registers them with transformers, so that `from_pretrained` loads their checkpoints without
`trust_remote_code`.
"""

from blockpruner.engine.model.classes.decilm.configuration_decilm import DeciLMConfig
from blockpruner.engine.model.classes.decilm.modeling_decilm import DeciLMForCausalLM
from blockpruner.engine.model.classes.pruned import register, register_pruned_types

register(DeciLMConfig, DeciLMForCausalLM)
register_pruned_types()
