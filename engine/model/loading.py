"""Load a model and a tokenizer from a hub id, a local folder, a GGUF file, or `smollm2`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import find_adapter_config_file

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.classes.pruned import register_checkpoint
from blockpruner.engine.model.classes.sliced import register_sliced
from blockpruner.engine.model.config_file import check_config, check_decoder, why_unread
from blockpruner.engine.model.folder import check_described, check_folder
from blockpruner.engine.model.from_gguf.converting import converted
from blockpruner.engine.model.from_gguf.files import gguf_file, is_gguf
from blockpruner.engine.model.full_memory import is_out_of_memory
from blockpruner.engine.model.hub import code_arguments, commit_of, fetch_weights, local_folder, why_unreachable
from blockpruner.engine.model.loading_report import check_names, check_report, left_out_by_class
from blockpruner.engine.model.multimodal import is_multimodal, text_decoder
from blockpruner.engine.model.multimodal_check import checked_text_config
from blockpruner.engine.model.remote_code import remote_code_told
from blockpruner.engine.model.repository import check_repository
from blockpruner.engine.model.ties import has_own_head, record_tie, tie_as_stored
from blockpruner.engine.model.tokenizer import load_tokenizer as load_tokenizer
from blockpruner.engine.model.weight_files import Stored, has_weights, most_common_dtype, stored_tensors
from blockpruner.engine.sections import ModelSource

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(requested: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("expected a CUDA device for `device=cuda`, but torch finds none; use `device=cpu` or auto.")
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(requested)


def resolve_dtype(requested: str, source: ModelSource, device: torch.device) -> tuple[str, str]:
    """Return the name of the dtype and the reason for it. `auto` is the checkpoint's dtype on a GPU; on a CPU it is
    bfloat16 if the processor has instructions for it, else float32."""
    if requested != "auto":
        return str(requested), "as asked"  # plain text, because it is recorded and shown in messages
    if device.type != "cpu":
        if is_gguf(source.name):
            return "bfloat16", "GGUF on a GPU"
        dtype = load_config(source).dtype or torch.float32
        return str(dtype).removeprefix("torch."), "the checkpoint's own"
    if cpu_has_bfloat16():
        return "bfloat16", "this processor has bfloat16 instructions"
    return "float32", "this processor has no bfloat16 instructions"


def cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def dtype_to_write(requested: str, source: ModelSource, searched: str | None) -> tuple[str, str]:
    """Return the dtype in which to write a model without some of its blocks, and the reason. `auto` is that in which
    the checkpoint stores its weights; a GGUF has none of its own, so for one it is the search's."""
    if requested != "auto":
        return str(requested), "as asked"
    if gguf_file(source.name) is None:
        return stored_dtype(source), "as the checkpoint stores it"
    return (searched, "the search's") if searched else resolve_dtype("auto", source, torch.device("cpu"))


def materialize(
    source: ModelSource, dtype: str, say: Callable[[str], None] = lambda text: None, *, needs_weights: bool = True
) -> ModelSource:
    """Return a source that `load_model` can map: a folder, a cache folder for GGUF, or a hub id with the commit of its
    revision, which all replicas load, whenever they start. The weights of a hub id are then in the hub's cache. Raises
    UserError for what is no model, as far as its files (of a hub id, their names) tell.

    The cache folder holds the exact float32 dequantisation, cast to `dtype`. It is made once, after a message to `say`.
    """
    path, file = Path(source.name), gguf_file(source.name)
    if file is not None:
        path = converted(file, DTYPES[dtype], say)
    if _is_folder(str(path)):
        for note in check_folder(path, needs_weights=needs_weights):
            say(f"note: {note}")
        # Use an absolute path, because replicas may run in another working directory.
        source = replace(source, name=str(path.resolve()))
    else:
        load_config(source)  # reports what cannot be used before weights are fetched
        source = replace(source, revision=commit_of(source) or source.revision)
        check_repository(source, needs_weights=needs_weights)
        if needs_weights:
            fetch_weights(source)
    if (whole_type := multimodal_type(source)) is not None:
        say(f"note: {source.name!r} is a multimodal model of type {whole_type!r}; this is about its text decoder")
    return source


def load_config(source: ModelSource) -> PreTrainedConfig:
    """Return the config of the decoder language model of a hub id or folder: of a multimodal model, that of its text
    decoder. Raises UserError with a one-line message, also for a folder whose files say that it holds none in floating
    point."""
    return _decoder_config(whole_config(source), source)


def _decoder_config(whole: PreTrainedConfig, source: ModelSource) -> PreTrainedConfig:
    config = whole
    if is_multimodal(whole):
        config = checked_text_config(whole, source.name)
        of_whole = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(whole)]
        if config.tie_word_embeddings:
            tied = of_whole._tied_weights_keys
            config.tie_word_embeddings = not has_own_head(tied, of_whole.base_model_prefix, source)
    check_decoder(config, source.name)
    return config


@remote_code_told
def whole_config(source: ModelSource) -> PreTrainedConfig:
    """Return the config of all that a hub id or folder holds, as transformers reads it."""
    path, is_folder = Path(source.name), _is_folder(source.name)
    if is_folder:
        check_described(path)
    elif os.path.isfile(source.name):
        raise UserError(f"expected a model folder or a .gguf file, got the file {source.name!r}.")
    elif source.name.startswith((".", "/", "~")) or source.name.count("/") > 1:
        raise UserError(f"expected a model folder, got {source.name!r}, which does not exist.")
    try:
        if is_folder:
            register_checkpoint(path, trust_remote_code=source.trust_remote_code)
            register_sliced(path)
        else:
            values, _ = PreTrainedConfig.get_config_dict(source.name, revision=source.revision or "main")
            if not values:  # transformers says nothing of a config that is not there
                check_repository(source, needs_weights=False)
            check_config(values, source.name)
        return AutoConfig.from_pretrained(source.name, **source.arguments)
    except UserError:
        raise
    except Exception as error:  # transformers reads values that may be anything, and a model's own code may do anything
        of_hub = None if is_folder else why_unreachable(source, error)
        raise UserError(of_hub or why_unread(source.name, error, is_folder=is_folder)) from error


def multimodal_type(source: ModelSource) -> str | None:
    """Return the type of a hub id or folder that holds a multimodal model, or None for a language model."""
    if gguf_file(source.name) is not None:
        return None
    whole = whole_config(source)
    return str(whole.model_type) if is_multimodal(whole) else None


def _is_folder(name: str) -> bool:
    return os.path.isdir(name)  # unlike Path.is_dir, it also answers for names that are too long


def check_positions(config: PreTrainedConfig, seq_len: int, option: str = "`seq_len`") -> None:
    """Raise UserError if `seq_len` exceeds the number of positions of the model."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise UserError(f"expected {option} of at most {longest} (the model's positions), got {seq_len}.")


def meta_model(source: ModelSource, dtype: str) -> PreTrainedModel:
    """Build the model without weights: shapes and module names from the config."""
    return meta_from_config(load_config(source), dtype, source)


@remote_code_told
def meta_from_config(config: PreTrainedConfig, dtype: str, source: ModelSource) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(
                config,
                dtype=DTYPES[dtype],
                trust_remote_code=source.trust_remote_code,
                **code_arguments(config, source),
            )
    except Exception as error:  # transformers builds modules from values that may be anything
        if "Unrecognized configuration class" in str(error):
            raise UserError(
                f"expected a decoder language model, got {source.name!r} of type {config.model_type!r}, for which "
                f"transformers has no causal language model."
            ) from error
        raise UserError(
            f"expected a config of which a model can be built, but transformers cannot for {source.name!r} of type "
            f"{config.model_type!r} ({type(error).__name__}: {first_line(error)[:200]})."
        ) from error
    return tie_as_stored(empty, source)


def stored_dtype(source: ModelSource) -> str:
    """Return the dtype in which most bytes of the weights are stored, or else that of the config. The weights of a hub
    id are fetched for this."""
    if not _is_folder(source.name):
        load_config(source)  # brings the config, too
        fetch_weights(source)
    folder = local_folder(source)
    if folder is not None and has_weights(folder) and (found := most_common_dtype(stored_tensors(folder).values())):
        return found
    return str(load_config(source).dtype or torch.float32).removeprefix("torch.")


def load_model(source: ModelSource, dtype: str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a causal language model for scoring; of a multimodal model, its text decoder. On a CPU and in the
    checkpoint's own dtype, the weights are mapped from the file and shared between processes.

    Raises UserError for pickled weights, for a checkpoint that lacks a tensor, which transformers would fill with
    random numbers, and for one that has tensors which the model does not use.
    """
    loaded = load_whole(source, dtype)
    if is_multimodal(loaded.config):
        loaded = text_of(loaded, source)
    return record_tie(loaded).to(device).eval()


def text_of(whole: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
    """Return the text decoder of a multimodal model from `load_whole`, with the same tensors."""
    return text_decoder(whole, load_config(source), source.name)


@remote_code_told
def load_whole(source: ModelSource, dtype: str) -> PreTrainedModel:
    """Load all that a hub id or folder holds: a causal language model, or a multimodal model with its other parts.
    Raises UserError as `load_model`."""
    whole = whole_config(source)
    _decoder_config(whole, source)  # raises UserError for what cannot be used, before weights are read
    if not _is_folder(source.name):
        _check_no_adapter(source)
    auto_class = AutoModelForMultimodalLM if is_multimodal(whole) else AutoModelForCausalLM
    try:
        stored = _stored(source) if _is_folder(source.name) else {}
        loaded, info = auto_class.from_pretrained(
            source.name,
            config=whole,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported by name instead, and refused
            **source.arguments,
        )
    except UserError:
        raise
    except Exception as error:  # transformers reads files that may hold anything
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        if not _is_folder(source.name) and (of_hub := why_unreachable(source, error)) is not None:
            raise UserError(of_hub) from error
        if "automatic conversion" in str(error):
            raise UserError(
                f"the weights of {source.name!r} do not fit a model of type {whole.model_type!r}: tensors that belong "
                f"together, such as the experts of a layer, are not all there or differ in shape."
            ) from error
        raise UserError(
            f"cannot load the weights of {source.name!r} as a model of type {whole.model_type!r} "
            f"({type(error).__name__}: {first_line(error)[:200]})."
        ) from error
    check_report(loaded, info, stored or _stored(source), source.name)
    return loaded


def check_tensors(model: PreTrainedModel, source: ModelSource) -> list[str]:
    """Raise UserError if the names of the tensors in a folder show that loading it will be refused. Costs their
    headers, so call it before anything slow. Returns notes about tensors that a class leaves out on purpose.

    model: with or without weights. Of a multimodal model, the tensors of all its parts are looked for.
    """
    folder = local_folder(source)
    if folder is None or not has_weights(folder):
        return []
    stored, whole = _stored(source), whole_config(source)
    if is_multimodal(whole):
        with torch.device("meta"):
            model = AutoModelForMultimodalLM.from_config(whole)
    check_names(model, stored, source.name)
    found = left_out_by_class(model, stored)
    if not found:
        return []
    return [
        f"{len(found)} tensors are left out by transformers on purpose ({found[0]!r} among them), such as layers that "
        f"predict several tokens ahead"
    ]


def _stored(source: ModelSource) -> dict[str, Stored]:
    """The tensors in a folder, or in the part of the hub's cache from which a hub id was loaded."""
    folder = local_folder(source)
    assert folder is not None, "its config has been read"
    return stored_tensors(folder)


def _check_no_adapter(source: ModelSource) -> None:
    """Raise UserError for a hub id with an adapter, which transformers would apply by itself."""
    if find_adapter_config_file(source.name, revision=source.revision or "main") is not None:
        raise UserError(
            f"expected a model, got {source.name!r} with an adapter in it (adapter_config.json); merge it first "
            f"(PeftModel.merge_and_unload)."
        )
