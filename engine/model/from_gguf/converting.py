"""Converts a GGUF to a checkpoint folder in the cache, once."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.cache import cache_dir
from blockpruner.engine.model.from_gguf.families import EMBEDDING, Family, family_of
from blockpruner.engine.model.from_gguf.files import gguf_digest, parts_of, read_whole
from blockpruner.engine.model.from_gguf.header import Array, Content, Raw
from blockpruner.engine.model.from_gguf.keys import ADVICE, Keys
from blockpruner.engine.model.from_gguf.tokenizer import build_tokenizer, special_ids
from blockpruner.engine.model.tokenizer_files import write_tokenizer
from blockpruner.engine.modes import ordinary_modes

VERSION = 3
"""Counts up when another folder is made of the same file, so that older ones in a cache are not used."""


@dataclass(frozen=True)
class _Plan:
    """All that can be known of a GGUF without its weights."""

    content: Content
    family: Family
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    names: dict[str, str]
    """The tensors of the GGUF by transformers' names."""


def converted(file: Path, dtype: torch.dtype, say: Callable[[str], None]) -> Path:
    """Return the folder of the cache that holds the model of a GGUF, dequantised in float32 and cast to `dtype`.

    Raises UserError for a file that is damaged, that lacks something, or that has something which would be lost.
    """
    name = str(dtype).removeprefix("torch.")
    parent, file = cache_dir(), parts_of(file)[0]
    folder = parent / f"{file.stem}-{gguf_digest(file)[:12]}-{name}-v{VERSION}"
    if folder.is_dir():
        return folder
    plan = _plan(file)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                say(f"converting {file.name} to {name} safetensors in {folder} (once; about 20 s per 100 MB)")
                if plan.family.note:
                    say(f"note: {plan.family.note}")
                _write(plan, dtype, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the converted model to {str(parent)!r}: {first_line(error)}; make room there, or set "
            f"BLOCKPRUNER_CACHE to another folder."
        ) from error
    return folder


def _plan(file: Path) -> _Plan:
    content, name = read_whole(file), str(file)
    family, values = family_of(content, name)
    ids = special_ids(content.fields, name)
    num_tokens, num_rows = len(content.fields["tokenizer.ggml.tokens"][0]), content.tensors[EMBEDDING].shape[0]
    if num_tokens != num_rows:
        raise UserError(f"expected as many tokens as the {num_rows} rows of {EMBEDDING} in {name!r}, got {num_tokens}.")
    special = {f"{part}_token_id": ids.get(f"{part}_token") for part in ("bos", "eos", "pad")}
    title = Keys(content.fields, "general.", name).text("name")
    more = {**({"unk_token_id": ids["unk_token"]} if "unk_token" in ids else {}), "_model_name_or_path": title or ""}
    try:
        config = AutoConfig.for_model(family.model_type, **values, **special, **more)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # any sizes may be in the file, and transformers fails on them in any way
        raise UserError(
            f"expected a GGUF whose fields fit together, got {name!r}: {first_line(error)[:200]}."
        ) from error
    names = _names(model, content, family, name)
    tokenizer = build_tokenizer(content.fields, name)
    return _Plan(content, family, config, tokenizer, names)


def _names(model: PreTrainedModel, content: Content, family: Family, file: str) -> dict[str, str]:
    """Return the GGUF's name of each tensor of the model. Raises UserError unless they are the same, in the same
    shapes, and can be dequantised."""
    architecture = content.fields["general.architecture"][0]
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    known = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    tied = {name for name in model.state_dict() if model.config.tie_word_embeddings and name.startswith("lm_head.")}
    names, missing = {}, []
    for name, weight in model.state_dict().items():
        if name in tied:
            continue
        module, _, leaf = name.rpartition(".")
        theirs = f"{known.get_name(module)}.{leaf}"
        if theirs not in content.tensors:
            missing.append(theirs)
            continue
        names[name] = theirs
        shape = content.tensors[theirs].shape
        expected = tuple(reversed(weight.shape)) if theirs.endswith(family.transposed) else tuple(weight.shape)
        if shape != expected:
            raise UserError(
                f"expected the tensor {theirs} of {file!r} in the shape {list(expected)} by its fields, got "
                f"{list(shape)}."
            )
    if missing:
        raise UserError(
            f"expected all tensors in {file!r}, but {len(missing)} are missing, {missing[0]} among them; the file is "
            f"incomplete, so download or convert it again."
        )
    if unused := sorted(content.tensors.keys() - set(names.values()) - set(family.into_config)):
        raise UserError(
            f"expected only tensors that a {family.model_type} uses in {file!r}, got {len(unused)} more, {unused[0]} "
            f"among them, which may change what the model computes; {ADVICE}."
        )
    _check_types(content, file)
    return names


def _check_types(content: Content, file: str) -> None:
    """Raise UserError if a tensor is of a type that cannot be dequantised."""
    for kind, name in {raw.type: name for name, raw in content.tensors.items()}.items():
        raw = content.tensors[name]
        try:
            gguf.quants.dequantize(raw.data.reshape(-1, raw.data.shape[-1])[:1], kind)
        except NotImplementedError as error:
            raise UserError(
                f"expected tensors of types that the `gguf` package can dequantise in {file!r}, got {name} of type "
                f"{kind.name}; quantise the model in another way."
            ) from error


def _value(raw: Raw, name: str, family: Family, config: PreTrainedConfig) -> Array:
    """Return a tensor in float32, as transformers keeps it."""
    values = raw.values
    if family.norms_plus_one and name.endswith("norm.weight"):
        return values - 1
    if name.endswith(family.transposed):
        return np.ascontiguousarray(values.T)
    if family.permuted and (match := re.search(r"\.attn_([qk])\.", name)):
        heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
        return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return values


def _write(plan: _Plan, dtype: torch.dtype, folder: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plan.config, dtype=dtype)
    state: dict[str, Tensor] = {}
    for name, theirs in plan.names.items():
        values = _value(plan.content.tensors[theirs], theirs, plan.family, plan.config)
        state[name] = torch.from_numpy(np.array(values, dtype=np.float32)).to(dtype)
    model.load_state_dict(state, strict=False, assign=True)  # all names have been compared; tied ones are left
    model.tie_weights()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as aside, _no_progress_bars():
        complete = Path(aside) / "model"
        model.save_pretrained(complete)
        write_tokenizer(plan.tokenizer, complete)
        ordinary_modes(complete)
        complete.rename(folder)


@contextmanager
def _no_progress_bars() -> Iterator[Any]:
    """transformers draws a bar while it writes."""
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()
