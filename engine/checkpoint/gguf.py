"""GGUF for llama.cpp, with its `deci` architecture, which allows layers without attention or without MLP.

The tensors come from a GGUF of the dense model, copied unchanged in any quantisation, or from the weights of the pruned
checkpoint. llama.cpp (src/models/deci.cpp) has two restrictions, which are met with stubs of zeros. It takes the head
size from the first layer, so that layer needs an attention. It skips the residual of a layer without an MLP, so such a
layer gets a narrow MLP.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import GGUFValueType as Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blockpruner.engine.blocks import Block, Kind
from blockpruner.engine.checkpoint.deci import check_dense
from blockpruner.engine.checkpoint.gguf_metadata import head_dim_of, metadata, rope_factors
from blockpruner.engine.checkpoint.remainder import Remainder
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.from_gguf.families import family_of
from blockpruner.engine.model.from_gguf.files import read_whole
from blockpruner.engine.model.from_gguf.header import Content, Raw

TYPES = {"f32": Type.F32, "f16": Type.F16, "q8_0": Type.Q8_0}
"""Types in which a checkpoint's own weights can be written."""
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
"""llama.cpp's numbers for files whose tensors are mostly of one type (llama_ftype)."""
STUB_WIDTH = 32
"""Width of an MLP of zeros: the minimum that every backend accepts."""
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PROJECTIONS = {Kind.MHA: "attn_output", Kind.MLP: "ffn_down"}
UNQUANTISED = {Type.F32: "f32", Type.F16: "f16"}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
SAME_NORM, SAME_WEIGHTS = 2.0**-7, 0.5
"""Allowed relative difference to the same tensor in a GGUF: of a norm (rounded to bfloat16), and of a weight matrix
(2-bit)."""


def read_base(file: Path, remainder: Remainder, changed: Collection[Block] = ()) -> Content:
    """Read a GGUF of the dense model that `remainder` was made from. Raises UserError if it holds another model.

    changed: blocks whose output projections a compensation has changed. They are taken from `remainder`: in Q8_0, or
    unquantised in the type of the file, if its projections are not quantised.
    """
    content = read_whole(file)
    projections = {f"blk.{block.layer}.{PROJECTIONS[block.kind]}.": block for block in changed}
    narrower = [f"blk.{layer}.ffn_" for layer in remainder.widths]
    narrower += [f"blk.{layer}.attn_" for layer in remainder.kv_heads]
    _check_base(content, remainder, str(file), (*projections, *narrower))
    for block in remainder.blocks:
        for name, weight in remainder.parts(block.source).items():
            key = f"blk.{block.source}.{_gguf_name(name)}"
            if key.startswith(tuple(projections)):
                plain = UNQUANTISED.get(content.tensors[key].type)
                content.tensors[key] = _stored(weight.float().numpy(), plain or "q8_0")
    if content.fields["general.architecture"][0] == "qwen2":  # qwen2 rotates halves, `deci` rotates neighbours
        dense = replace(remainder, kv_heads={})
        for name, raw in content.tensors.items():
            for part, heads in _rotated(dense, 0):
                if f".{part}." in name:
                    content.tensors[name] = Raw(raw.data[_neighbours(heads, len(raw.data))], raw.type)
    return content


def _check_base(content: Content, remainder: Remainder, file: str, changed: tuple[str, ...]) -> None:
    """changed: beginnings of the names of tensors that need not be equal."""
    config, what = remainder.config, f"the GGUF of the model that was pruned, got {file!r}"
    check_dense(config, "gguf")  # numbers of heads may differ between its layers
    family, found = family_of(content, file)
    expected = "qwen2" if config.model_type == "qwen2" else "llama"
    if family.model_type != expected:
        raise UserError(f"expected {what} of architecture {family.model_type!r} where {expected!r} is needed.")
    for name, value in found.items():
        own = head_dim_of(config) if name == "head_dim" else getattr(config, name, value)
        # an embedding of its own or a tied one is the file's matter; the positions are only a limit
        if name not in ("tie_word_embeddings", "max_position_embeddings") and not _is_same(value, own):
            raise UserError(f"expected {what} with {name} {value} where {own} is needed.")
    for block in remainder.blocks:
        for name, weight in remainder.parts(block.source).items():
            if remainder.is_of(name, "attention" if block.mlp is None else "mlp"):
                key = f"blk.{block.source}.{_gguf_name(name)}"
                _check_tensor(content, key, weight, what, is_changed=key.startswith(changed))
    _check_tensor(content, "output_norm.weight", remainder.weights["model.norm.weight"], what)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values of configs are the same, up to what float32 loses."""
    if isinstance(one, dict) and isinstance(other, dict):
        known = one.keys() & other.keys() - {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        return all(_is_same(one[name], other[name]) for name in known)
    if isinstance(one, float) or isinstance(other, float):
        return bool(np.isclose(one, other, rtol=1e-6, atol=0.0))
    return bool(one == other)


def _check_tensor(content: Content, name: str, weight: Tensor, what: str, *, is_changed: bool = False) -> None:
    """Raise UserError unless a tensor equals the checkpoint's. Of a matrix, which may be quantised, only a few rows are
    compared, with a large tolerance."""
    raw = content.tensors.get(name)
    if raw is None:
        raise UserError(f"expected {what} without the tensor {name}.")
    if is_changed or "attn_q" in name or "attn_k" in name:  # the rows of these two are in another order
        return
    # Read only the first rows of a matrix, because a whole one takes seconds in large models.
    rows = slice(None) if weight.ndim == 1 else slice(0, 4)
    try:
        found = Raw(raw.data[rows], raw.type).values
    except NotImplementedError:
        return
    ours = weight[rows].float().numpy()
    tolerance = SAME_NORM if weight.ndim == 1 else SAME_WEIGHTS
    if found.shape != ours.shape or np.linalg.norm(found - ours) > tolerance * np.linalg.norm(ours):
        raise UserError(f"expected {what}, whose tensor {name} differs from the checkpoint's.")


def from_checkpoint(
    remainder: Remainder, tokenizer: PreTrainedTokenizerBase | None, kind: str, base: Content | None = None
) -> Content:
    """Convert the checkpoint's own weights to one of TYPES. Metadata and tokenizer come from `base` if it is given."""
    config = remainder.config
    check_dense(config, "gguf")  # numbers of heads may differ between its layers
    tensors: dict[str, Raw] = {}
    for name, weight in remainder.outside.items():
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            tensors[OUTSIDE[name]] = _stored(weight.float().numpy(), kind)
    for block in remainder.blocks:
        for name, weight in remainder.parts(block.source).items():
            if remainder.is_of(name, "attention" if block.mlp is None else "mlp"):
                values = weight.float().numpy()
                for part, heads in _rotated(remainder, block.source):
                    if _gguf_name(name).startswith(f"{part}."):
                        values = values[_neighbours(heads, len(values))]
                tensors[f"blk.{block.source}.{_gguf_name(name)}"] = _stored(values, kind)
    factors = rope_factors(config)
    if factors is not None:
        tensors["rope_freqs.weight"] = Raw(factors, Type.F32)
    fields = dict(base.fields) if base is not None else metadata(config, tokenizer)
    fields["general.file_type"] = (FILE_TYPES[kind], Value.UINT32, None)
    return Content(fields, tensors)


def write_gguf(content: Content, remainder: Remainder, file: Path) -> list[str]:
    """Write the remaining blocks to a file, and return notes for the user."""
    config, layers, notes = remainder.config, remainder.layers(), []
    size, head_dim = config.hidden_size, head_dim_of(config)
    tensors = {name: raw for name, raw in content.tensors.items() if not name.startswith("blk.")}
    heads, kv_heads, widths = [], [], []
    for number, layer in enumerate(layers):
        if number == 0 and layer.attention is None:
            tensors |= _prefixed(number, _stub_attention(size, head_dim))
            heads.append(1)
            kv_heads.append(1)
            notes.append(
                "the first layer has lost its attention, but llama.cpp needs one there; one head of zeros is added"
            )
        else:
            tensors |= _prefixed(number, _of_layer(content, layer.attention, "attn_"))
            of_layer = _heads(remainder, layer.attention)
            heads.append(of_layer[0])
            kv_heads.append(of_layer[1])
        tensors |= _prefixed(number, _of_layer(content, layer.mlp, "ffn_") or _stub_mlp(size))
        own = (
            config.intermediate_size if layer.mlp is None else remainder.widths.get(layer.mlp, config.intermediate_size)
        )
        widths.append(STUB_WIDTH if layer.mlp is None else own)
    if num_stubs := sum(layer.mlp is None for layer in layers):
        notes.append(
            f"{num_stubs} of {len(layers)} layers have lost their MLP, but llama.cpp needs one; {STUB_WIDTH} units of "
            f"zeros are added to each"
        )
    old = content.fields["general.architecture"][0]
    writer = gguf.GGUFWriter(file, "deci")
    fields = {name.replace(f"{old}.", "deci.", 1): value for name, value in content.fields.items()}
    for name, value in (("key_length", head_dim), ("value_length", head_dim)):
        fields[f"deci.attention.{name}"] = (value, Value.UINT32, None)
    fields["deci.rope.dimension_count"] = (head_dim, Value.UINT32, None)
    fields["deci.block_count"] = (len(layers), Value.UINT32, None)
    for name, numbers in (("attention.head_count", heads), ("attention.head_count_kv", kv_heads)):
        fields[f"deci.{name}"] = (numbers, Value.ARRAY, Value.INT32)
    fields["deci.feed_forward_length"] = (widths, Value.ARRAY, Value.INT32)
    for name, (value, kind, item) in fields.items():
        if name != "general.architecture":
            writer.add_key_value(name, value, kind, item)
    for name, raw in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(raw.data), raw_dtype=raw.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


def _of_layer(content: Content, layer: int | None, kind: str) -> dict[str, Raw]:
    prefix = f"blk.{layer}.{kind}"
    return {kind + name.removeprefix(prefix): raw for name, raw in content.tensors.items() if name.startswith(prefix)}


def _prefixed(number: int, parts: dict[str, Raw]) -> dict[str, Raw]:
    return {f"blk.{number}.{name}": raw for name, raw in parts.items()}


def _zeros(*shape: int) -> Raw:
    return Raw(np.zeros(shape, dtype=np.float32), Type.F32)


def _stub_attention(size: int, head_dim: int) -> dict[str, Raw]:
    inward = {f"attn_{part}.weight": _zeros(head_dim, size) for part in ("q", "k", "v")}
    return {"attn_norm.weight": _zeros(size), **inward, "attn_output.weight": _zeros(size, head_dim)}


def _stub_mlp(size: int) -> dict[str, Raw]:
    inward = {f"ffn_{part}.weight": _zeros(STUB_WIDTH, size) for part in ("gate", "up")}
    return {"ffn_norm.weight": _zeros(size), **inward, "ffn_down.weight": _zeros(size, STUB_WIDTH)}


def _heads(remainder: Remainder, layer: int | None) -> tuple[int, int]:
    """Return the numbers of query and KV heads of the attention of a source layer."""
    config: Any = remainder.config
    if layer is None:
        return 0, 0
    kv_heads = remainder.kv_heads.get(layer, config.num_key_value_heads)
    return kv_heads * config.num_attention_heads // config.num_key_value_heads, kv_heads


def _rotated(remainder: Remainder, layer: int) -> tuple[tuple[str, int], tuple[str, int]]:
    heads, kv_heads = _heads(remainder, layer)
    return ("attn_q", heads), ("attn_k", kv_heads)


def _neighbours(num_heads: int, num_rows: int) -> np.ndarray[Any, Any]:
    """Return the order of rows that converts a projection whose heads rotate halves (i with i + d/2) to one whose heads
    rotate neighbours (2i with 2i + 1)."""
    return np.arange(num_rows).reshape(num_heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _gguf_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{NAMES[module]}.{leaf}"


def _stored(values: np.ndarray[Any, Any], kind: str) -> Raw:
    """Convert a matrix to the requested type, or to F16 if blocks of Q8_0 do not fit its rows. Norms and biases become
    F32."""
    wanted = TYPES[kind]
    if values.ndim == 1:
        wanted = Type.F32
    elif wanted == Type.Q8_0 and values.shape[-1] % 32:
        wanted = Type.F16
    return Raw(gguf.quants.quantize(values, wanted), wanted)
