"""Load a model onto its devices: resident, streamed or sharded. All placements give the same scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from blockpruner.engine.model.architectures import architecture_of
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.full_memory import full_memory_ends
from blockpruner.engine.model.host_memory import keep_freed_memory
from blockpruner.engine.model.hub import code_arguments
from blockpruner.engine.model.loading import DTYPES, load_model, stored_dtype
from blockpruner.engine.model.sharding import shard_layers
from blockpruner.engine.model.streaming import stream_layers
from blockpruner.engine.model.weights import Casting
from blockpruner.engine.sections import ModelSource
from blockpruner.engine.work.memory import ModelBytes, Placement, split_layers


def devices_of(device: str, num_devices: int) -> list[torch.device]:
    """Return the devices of a replica. A process sees only its own devices."""
    return [torch.device(device, index) for index in range(num_devices)] if device == "cuda" else [torch.device(device)]


@contextmanager
def while_loading(placement: Placement) -> Iterator[None]:
    """Say what to do if a device is full before a model is loaded."""
    keep_freed_memory()
    with full_memory_ends(
        f"before the {placement} model is loaded",
        "other programs may be using it. Free memory, or use `placement=streamed`, more `gpus_per_replica`, or fewer "
        "`replicas`.",
    ):
        yield


def load_decoder(source: ModelSource, dtype: str, placement: Placement, devices: Sequence[torch.device]) -> Decoder:
    """Load a model for scoring.

    Streamed and sharded models are mapped from their files in the stored dtype and cast while they are moved, so no
    process holds a second copy.
    """
    if placement is Placement.RESIDENT:
        return Decoder(load_model(source, dtype, devices[0]))
    stored = stored_dtype(source)
    model = load_model(source, stored)
    casting = Casting(DTYPES[stored], DTYPES[dtype])
    if stored != dtype:
        _recompute_buffers(model, source, dtype, casting)
    layers = list(model.get_submodule(architecture_of(model).layers))
    if placement is Placement.STREAMED:
        stream = stream_layers(model, layers, devices[0], casting)
        return Decoder(model, [devices[0]] * len(layers), stream)
    sizes = ModelBytes.of(Decoder(model).shape, DTYPES[dtype].itemsize)
    layer_devices = [devices[index] for index in split_layers(sizes, len(devices))]
    shard_layers(model, layers, layer_devices, devices[0], casting)
    return Decoder(model, layer_devices)


def _recompute_buffers(model: PreTrainedModel, source: ModelSource, dtype: str, casting: Casting) -> None:
    """Recompute the constants that a model computes at construction (scales, frequencies) for `dtype`. Casting the
    rounded constants of the stored dtype would give different numbers."""
    with init_empty_weights(include_buffers=False):
        made = AutoModelForCausalLM.from_config(
            model.config,
            dtype=DTYPES[dtype],
            trust_remote_code=source.trust_remote_code,
            **code_arguments(model.config, source),
        )
    computed = dict(made.named_buffers())
    for path, owner in model.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                is_stored = name not in owner._non_persistent_buffers_set
                owner._buffers[name] = casting(buffer) if is_stored else computed[f"{path}.{name}".lstrip(".")]
