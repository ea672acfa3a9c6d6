"""What a model's config.json must look like, judged before and after transformers has read it."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, Field, ValidationError
from transformers import PreTrainedConfig
from transformers import __version__ as transformers_version

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.classes.whole import WHOLE_PREFIX
from blockpruner.engine.model.source import NAMES
from blockpruner.engine.model.weight_files import FLOATS

DTYPES = tuple(FLOATS.values())


# The limits are far above any model, and low enough that to build its modules ends.
Layers: TypeAlias = Annotated[int, Field(strict=True, ge=1, le=10_000)]
Width: TypeAlias = Annotated[int, Field(strict=True, ge=1, le=2**24)]
Widths: TypeAlias = Width | list[Width]
"""Some families have one value for each layer."""
Count: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=2**24)]
"""Of experts; some dense models of families with experts have none."""
Vocabulary: TypeAlias = Annotated[int, Field(strict=True, ge=1, le=2**26)]
Positions: TypeAlias = Annotated[int, Field(strict=True, ge=1, le=2**40)]
Epsilon: TypeAlias = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Base: TypeAlias = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


class _Sizes(BaseModel):
    """Fields that have the same meaning in every family that has them."""

    hidden_size: Width | None = None
    n_embd: Width | None = None
    d_model: Width | None = None
    num_hidden_layers: Layers | None = None
    n_layer: Layers | None = None
    n_layers: Layers | None = None
    num_layers: Layers | None = None
    num_attention_heads: Widths | None = None
    n_head: Width | None = None
    n_heads: Width | None = None
    num_key_value_heads: Widths | None = None
    head_dim: Widths | None = None
    intermediate_size: Widths | None = None
    ffn_dim: Width | None = None
    n_inner: Width | None = None
    vocab_size: Vocabulary | None = None
    max_position_embeddings: Positions | None = None
    n_positions: Positions | None = None
    max_seq_len: Positions | None = None
    sliding_window: Positions | None = None
    num_experts: Count | None = None
    num_local_experts: Count | None = None
    n_routed_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Widths | None = None
    rms_norm_eps: Epsilon | None = None
    layer_norm_eps: Epsilon | None = None
    layer_norm_epsilon: Epsilon | None = None
    layernorm_epsilon: Epsilon | None = None
    norm_epsilon: Epsilon | None = None
    rope_theta: Base | None = None


def _is_off(key: str, values: dict[str, Any]) -> bool:
    """Whether a field says 0 because it is not used: so transformers writes the window of Qwen2-MoE."""
    unused = values.get("use_sliding_window") is False
    return key == "sliding_window" and type(values[key]) is int and values[key] == 0 and unused


def check_config(values: dict[str, Any], name: str) -> None:
    """Raise UserError for a config.json that cannot be that of a model to prune.

    name: the folder or hub id, for messages. The values are those of the file, before transformers fills in others.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UserError(f"expected a config.json with a 'model_type' in {name!r}, got {_short(model_type)}.")
    if model_type.startswith(WHOLE_PREFIX):
        raise UserError(
            f"expected a language model or a multimodal one, got {name!r}, a multimodal model whose text decoder lacks "
            f"blocks already; use the dense model and the run, or prune it with `text_only` for the text decoder "
            f"alone."
        )
    for sizes in (values, values.get("text_config")):
        if isinstance(sizes, dict):
            _check_quantisation(sizes, name)
            _check_shape(_Sizes, {key: value for key, value in sizes.items() if not _is_off(key, sizes)}, name)
    for key in ("dtype", "torch_dtype"):
        dtype = values.get(key)
        if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
            raise UserError(
                f"expected the {key!r} in config.json of {name!r} to be one of {', '.join(DTYPES)}, got "
                f"{_short(dtype)}; write the one in which the weights are stored."
            )
    if values.get("transformers_weights") is not None:
        raise UserError(
            f"expected a model whose weights have the usual names, but config.json of {name!r} names "
            f"{_short(values['transformers_weights'])} as 'transformers_weights'; load the model with transformers and "
            f"save it again."
        )


def why_unread(name: str, error: Exception, *, is_folder: bool) -> str:
    """Return the line to show when transformers could not read a config.

    name: the folder or hub id.
    """
    reason = f"{type(error).__name__}: {first_line(error)[:200]}"
    if "trust_remote_code" in str(error):
        return f"{name!r} comes with its own code; give `trust_remote_code` if you trust it."
    if not is_folder and isinstance(error, OSError):
        return f"expected {NAMES}, got {name!r} ({reason})."
    if "does not recognize this architecture" in str(error):
        return (
            f"expected a model that transformers {transformers_version} knows, got {name!r} of an unknown "
            f"'model_type'; install a newer transformers."
        )
    return (
        f"expected a config.json with sound values in {name!r}, but transformers cannot read it ({reason}); download "
        f"it again."
    )


def check_decoder(config: PreTrainedConfig, name: str) -> None:
    """Raise UserError for encoder-decoders, and for routers that cannot work."""
    if config.is_encoder_decoder:
        raise UserError(
            f"expected a decoder language model, got {name!r}, an encoder-decoder of type {config.model_type!r}."
        )
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = [getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")]
    counts = [count for count in experts if isinstance(count, int) and count]  # 0: a dense model
    if isinstance(chosen, int) and counts and chosen > max(counts):
        raise UserError(
            f"expected 'num_experts_per_tok' of at most {max(counts)} (the experts) in config.json of {name!r}, got "
            f"{chosen}; download config.json again."
        )


def _check_quantisation(values: dict[str, Any], name: str) -> None:
    for key in ("quantization_config", "compression_config", "quantization"):
        if found := values.get(key):
            how = found.get("quant_method") if isinstance(found, dict) else None
            method = how if isinstance(how, str) and how.isprintable() else f"what {key!r} in its config says"
            raise UserError(quantised(name, method))


def quantised(name: str, method: str) -> str:
    return f"expected a model in floating point, got {name!r}, quantised by {method}; give the unquantised checkpoint."


def _check_shape(shape: type[BaseModel], values: dict[str, Any], name: str) -> None:
    try:
        shape.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, value = str(first["loc"][0]), values[str(first["loc"][0])]
        raise UserError(
            f"expected a sound {key!r} in config.json of {name!r}, got {_short(value)} ({_lower(first['msg'])}); "
            f"download config.json again."
        ) from error


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].splitlines()[0]
