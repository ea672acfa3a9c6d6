"""Rotary positions of a GGUF: the parameters that give transformers the same frequencies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.from_gguf.header import Array, Content
from blockpruner.engine.model.from_gguf.keys import ADVICE, Keys

FACTORS = "rope_freqs.weight"
"""Tensor of divisors of the frequencies, which Llama 3.1 and later bring."""
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""The same for texts longer and shorter than a model was first trained with (Phi-3)."""
THETA = 10000.0
SAME = 1e-6
"""Allowed relative difference of what float32 stores."""
LLAMA3_POSITIONS = 8192
"""Positions that the models of the Llama 3 family were first trained with."""

Parameters = dict[str, Any]


def rope_parameters(keys: Keys, content: Content, context: int) -> Parameters:
    """Return transformers' rope_parameters from the fields `rope.*`. context: positions of the model."""
    theta = keys.real("rope.freq_base", THETA)
    kind = keys.text("rope.scaling.type", "linear")
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 1.0))
    keys.get("rope.scaling.finetuned")
    if FACTORS in content.tensors and factor != 1.0:
        raise UserError(f"expected either {FACTORS} or a rope.scaling.factor in {keys.file!r}, got both.")
    if LONG in content.tensors or SHORT in content.tensors:
        return _longrope(keys, content, theta, context)
    keys.only("rope.scaling.attn_factor", 1.0)
    original = keys.integer("rope.scaling.original_context_length", context)
    if kind == "yarn":
        keys.only("rope.scaling.yarn_ext_factor", 1.0)
        betas = {
            ours: keys.real(f"rope.scaling.yarn_{ours}")
            for ours in ("beta_fast", "beta_slow")
            if keys.has(f"rope.scaling.yarn_{ours}")
        }
        extended = {"factor": factor, "original_max_position_embeddings": original}
        return {"rope_type": "yarn", "rope_theta": theta, **extended, **betas}
    if kind not in ("none", "linear"):
        raise keys.refuse("rope.scaling.type", "'none', 'linear' or 'yarn'")
    if kind == "linear" and factor != 1.0:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def with_factors(parameters: Parameters, keys: Keys, content: Content, head_dim: int) -> Parameters:
    """Return the parameters of the RoPE whose frequencies the tensor FACTORS divides, if it is there.

    Raises UserError if no parameters give these very frequencies.
    """
    if FACTORS not in content.tensors:
        return parameters
    factors = content.tensors[FACTORS].values
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all() or factors.min() < 1 - SAME:
        raise UserError(f"expected {head_dim // 2} numbers of at least 1 as the tensor {FACTORS} of {keys.file!r}.")
    theta = parameters["rope_theta"]
    largest = round(float(factors.max()), 4)  # what was divided may differ in its last bit
    if np.allclose(factors, largest, rtol=SAME, atol=0.0):
        kind = {"rope_type": "default"} if largest == 1.0 else {"rope_type": "linear", "factor": largest}
        return {**kind, "rope_theta": theta}
    positions = keys.integer("rope.scaling.original_context_length", LLAMA3_POSITIONS)
    for high, original in [(4.0, positions), *_fitted(factors, largest, theta)]:
        found = {
            "rope_type": "llama3", "rope_theta": theta, "factor": largest, "low_freq_factor": 1.0,
            "high_freq_factor": high, "original_max_position_embeddings": original,
        }  # fmt: skip
        if np.allclose(_divisors(found, head_dim), factors, rtol=SAME, atol=0.0):
            return found
    raise UserError(
        f"expected frequencies of the kind of Llama 3 in the tensor {FACTORS} of {keys.file!r}, got others, which "
        f"transformers cannot compute; {ADVICE}."
    )


def _divisors(parameters: Parameters, head_dim: int) -> Array:
    """Return by what the parameters divide the plain frequencies."""
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=2**20, rope_parameters=dict(parameters))
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain, _ = ROPE_INIT_FUNCTIONS["linear"](
        LlamaConfig(
            head_dim=head_dim,
            rope_parameters={"rope_type": "linear", "factor": 1.0, "rope_theta": parameters["rope_theta"]},
        ),
        "cpu",
    )
    return (plain / frequencies).numpy()


def _fitted(factors: Array, largest: float, theta: float) -> list[tuple[float, int]]:
    """Return the high_freq_factor and the positions that two of the divisors between 1 and the largest give, as a list
    of one or none. Only ratios count, so low_freq_factor is 1."""
    wavelengths = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))
    between = np.flatnonzero((factors > 1 + SAME) & (factors < largest * (1 - SAME)))
    if len(between) < 2:
        return []
    # 1 / divisor = (1 - smooth) / factor + smooth, where smooth = (positions / wavelength - low) / (high - low)
    smooth = (1 / factors[between].astype(np.float64) - 1 / largest) / (1 - 1 / largest)
    slope, offset = np.polyfit(1 / wavelengths[between], smooth, 1)
    if not -1e6 < offset < -1e-6:
        return []
    high = round(1 - 1 / offset, 3)
    return [(high, round(slope * (high - 1)))] if slope > 0 else []


def _longrope(keys: Keys, content: Content, theta: float, context: int) -> Parameters:
    found: Parameters = {"rope_type": "longrope", "rope_theta": theta}
    for name, tensor in (("long_factor", LONG), ("short_factor", SHORT)):
        if tensor not in content.tensors:
            raise UserError(f"expected the tensor {tensor} in {keys.file!r}, which lacks it.")
        found[name] = [float(value) for value in content.tensors[tensor].values.reshape(-1)]
    original = keys.integer("rope.scaling.original_context_length", context, least=2)
    usual = math.sqrt(1 + math.log(max(context / original, 1.0)) / math.log(original))
    given = keys.real("rope.scaling.attn_factor", usual)
    found["original_max_position_embeddings"] = original
    found["attention_factor"] = usual if math.isclose(given, usual, rel_tol=SAME) else given
    return found
