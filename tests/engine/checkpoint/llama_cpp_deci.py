"""What llama.cpp computes from a GGUF of architecture `deci` (src/models/deci.cpp), in numpy, with its gaps: the size
of a head is taken from the first layer, and a layer without an MLP loses what its attention gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

Array = np.ndarray[Any, Any]


def logits(file: Path, ids: torch.Tensor) -> torch.Tensor:
    """Tokens [T] to logits [T, V] in float64."""
    reader = gguf.GGUFReader(file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "deci"
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    used = set()

    def take(name: str) -> Array:
        used.add(name)
        return tensors[name].astype(np.float64)

    def norm(stream: Array, name: str) -> Array:
        scale = 1 / np.sqrt((stream**2).mean(-1, keepdims=True) + values["deci.attention.layer_norm_rms_epsilon"])
        return stream * scale * take(f"{name}.weight")

    def linear(stream: Array, name: str) -> Array:
        output = stream @ take(f"{name}.weight").T
        return output + take(f"{name}.bias") if f"{name}.bias" in tensors else output

    heads, kv_heads = values["deci.attention.head_count"], values["deci.attention.head_count_kv"]
    assert heads[0] > 0, "llama.cpp does not load this"
    size = values["deci.attention.key_length"]
    assert size == values["deci.attention.value_length"] == values["deci.rope.dimension_count"]
    frequencies = values["deci.rope.freq_base"] ** -(np.arange(0, size, 2) / size)
    if "rope_freqs.weight" in tensors:
        frequencies /= take("rope_freqs.weight")
    angles = np.arange(len(ids))[:, None, None] * frequencies

    def rotated(states: Array) -> Array:
        """[T, heads, size]: neighbours are a pair."""
        even, odd = states[..., 0::2], states[..., 1::2]
        pair = (even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles))
        return np.stack(pair, -1).reshape(states.shape)

    stream = take("token_embd.weight")[ids.numpy()]
    for layer in range(values["deci.block_count"]):
        name = f"blk.{layer}"
        middle = stream
        if heads[layer]:
            normed = norm(stream, f"{name}.attn_norm")
            query = rotated(linear(normed, f"{name}.attn_q").reshape(len(ids), heads[layer], size))
            key = rotated(linear(normed, f"{name}.attn_k").reshape(len(ids), kv_heads[layer], size))
            value = linear(normed, f"{name}.attn_v").reshape(len(ids), kv_heads[layer], size)
            group = heads[layer] // kv_heads[layer]
            scores = np.einsum("qhd,khd->hqk", query, key.repeat(group, 1)) / np.sqrt(size)
            scores[:, np.triu(np.ones((len(ids), len(ids)), dtype=bool), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed = np.einsum("hqk,khd->qhd", weights, value.repeat(group, 1)).reshape(len(ids), -1)
            middle = stream + linear(mixed, f"{name}.attn_output")
        if values["deci.feed_forward_length"][layer] == 0:
            continue
        normed = norm(middle, f"{name}.ffn_norm")
        gate = linear(normed, f"{name}.ffn_gate")
        stream = middle + linear(gate / (1 + np.exp(-gate)) * linear(normed, f"{name}.ffn_up"), f"{name}.ffn_down")
    output = "output" if "output.weight" in tensors else "token_embd"
    result = linear(norm(stream, "output_norm"), output)
    assert used == tensors.keys(), "llama.cpp refuses a file with tensors that it does not ask for"
    return torch.from_numpy(result)
