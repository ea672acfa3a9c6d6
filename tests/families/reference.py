"""A reference of its own for the sweep over all families: the model's own full forward, with hooks that take the
outputs of blocks away. It shares no code with what it checks, and finds blocks by their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MIXERS = (
    "self_attn", "self_attention", "attn", "attention", "linear_attn", "mamba", "conv", "mixer", "temporal_block",
    "norm_attn_norm.attn",
)  # fmt: skip
MLPS = (
    "mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp", "mlp_block", "fc2", "experts",
)  # fmt: skip
ADDS_RESIDUAL = {"bloom": ("self_attention", "mlp"), "mpt": ("ffn",)}
"""Modules that take the residual as their second argument and add it themselves."""
Blocks = frozenset[tuple[str, int]]
"""("mha" or "mlp", layer)"""


class Reference:
    def __init__(self, model: PreTrainedModel, layers: list[nn.Module]) -> None:
        self.model = model
        self.layers = layers
        self._adds_residual = ADDS_RESIDUAL.get(model.config.model_type, ())

    def modules(self, kind: str, layer: int) -> list[str]:
        module = self.layers[layer]
        if getattr(module, "block_type", None) in ("mlp", "moe"):  # of Nemotron-H, whose layers are one block each
            return ["mixer"] if kind == "mlp" else []
        inside = dict(module.named_modules())
        return [name for name in (MIXERS if kind == "mha" else MLPS) if name in inside]

    def logits(self, absent: Blocks, window: Tensor) -> Tensor:
        with torch.inference_mode(), self._without(absent):
            return self.model(input_ids=window[None], use_cache=False).logits[0]

    def sums(self, absent: Blocks, windows: Tensor) -> list[float]:
        """The summed token losses of each window, in nats."""
        found = []
        for window in windows:
            logits = self.logits(absent, window)[:-1].double()
            found.append(-torch.log_softmax(logits, -1).gather(1, window[1:, None]).sum().item())
        return found

    @contextmanager
    def _without(self, absent: Blocks) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, layer in absent:
                for name in self.modules(kind, layer):
                    module = self.layers[layer].get_submodule(name)
                    hook = _adding_nothing if name in self._adds_residual else _nothing
                    stack.callback(module.register_forward_hook(hook).remove)
            yield


def _nothing(module: nn.Module, args: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def _adding_nothing(module: nn.Module, args: Any, output: Any) -> Any:
    return (args[1], *output[1:]) if isinstance(output, tuple) else args[1]
