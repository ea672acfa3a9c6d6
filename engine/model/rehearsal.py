"""Try on a copy whether a model can be searched and pruned, before any weights are loaded.

The copy has the model's own code and widths, but few layers and a small vocabulary. All its weights are windows into
one tensor of random numbers, so it needs the memory of one large matrix.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from blockpruner.engine.blocks import Granularity, Kind, Mask
from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.architectures import architecture_of
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.decoder_check import check_removable
from blockpruner.engine.model.few_layers import set_vocab_size, with_few_layers
from blockpruner.engine.model.narrowing_check import check_narrowable
from blockpruner.engine.model.surgery import check_cache, prune
from blockpruner.engine.sections import ModelSource

NUM_LAYERS = 4
VOCABULARY = 256
LARGEST_BYTES = 2**32
"""Memory of the largest copy that is tried."""
SPREAD = 0.02
"""Standard deviation of the weights, as most models are initialised."""
NUM_RANDOM = 1_000_003
"""Number of different weights. It is prime, so that the rows of a matrix differ."""
STEP = 64
"""Numbers between the windows of two weights and of two experts: 256 bytes, since kernels want aligned memory."""


def rehearse(skeleton: PreTrainedModel, source: ModelSource, kinds: Collection[Kind] = ()) -> str:
    """Raise UserError if a search or `prune` would refuse this model. Return why that could not be tried, or an empty
    string.

    skeleton: the model on the meta device. kinds: of the blocks that go in groups, if the model has such. Takes a few
    passes over at most four layers.
    """
    config, num_layers = skeleton.config, 2 if _layers_are_alike(skeleton) else NUM_LAYERS
    refusal, problem = None, ""
    for vocab_size in dict.fromkeys((min(VOCABULARY, config.vocab_size), config.vocab_size)):
        try:
            model = small_copy(config, num_layers, vocab_size, source)
            try:
                _search_and_prune(model, kinds)
                return ""
            except UserError as error:  # stands unless the full vocabulary makes a difference
                refusal = error
        except Exception as error:  # few layers may be too few, configs and a model's own code may do anything
            problem = f"{type(error).__name__}: {first_line(error)[:200]}"
    if refusal is not None:
        raise refusal
    return problem


def _layers_are_alike(skeleton: PreTrainedModel) -> bool:
    layers = skeleton.get_submodule(architecture_of(skeleton).layers)
    shapes = [[(name, weight.shape) for name, weight in layer.named_parameters()] for layer in layers.children()]
    return all(of_one == shapes[0] for of_one in shapes)


def _search_and_prune(model: PreTrainedModel, kinds: Collection[Kind]) -> None:
    decoder = Decoder(model)
    check_removable(decoder)
    if missing := {*kinds} - {block.kind for block in decoder.narrow}:
        raise LookupError(f"its layers have no {' and '.join(sorted(missing))} block of which parts can be removed")
    if kinds:
        check_narrowable(decoder, kinds)
    shape = decoder.shape
    mixers = [block for block in shape.candidates(Granularity.MHA) if block != shape.last_mixers[0]]
    check_cache(prune(model, Mask.of([*shape.candidates(Granularity.MLP)[:1], *mixers[-1:]])))


def small_copy(
    config: PreTrainedConfig, num_layers: int, vocab_size: int, source: ModelSource, spread: float = SPREAD
) -> PreTrainedModel:
    """Return a copy with random weights of a standard deviation. Raises MemoryError if it is too large."""
    small = with_few_layers(config, num_layers)
    set_vocab_size(small, vocab_size)
    if (getattr(small, "pad_token_id", None) or 0) >= vocab_size:  # an embedding refuses it
        small.pad_token_id = 0
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, trust_remote_code=source.trust_remote_code)
    fill(model, spread)
    model.tie_weights()
    return model


def fill(model: nn.Module, spread: float = SPREAD) -> None:
    """Give a model without weights random ones. Norms differ from 1, as trained ones do."""
    weights = list(model.parameters())
    length = max(_span(weight.shape) for weight in weights) + STEP * len(weights)
    if length * 4 > LARGEST_BYTES:
        raise MemoryError(f"a copy needs {length * 4 / 1e9:.1f} GB")
    numbers = spread * torch.randn(NUM_RANDOM, generator=torch.Generator().manual_seed(0))
    numbers = numbers.repeat(math.ceil(length / NUM_RANDOM))
    place = 0
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                window = _window(numbers[place:], weight.shape)
                is_scale = weight.ndim < 2 and not name.endswith("bias")
                module._parameters[name] = nn.Parameter(1 + window if is_scale else window, requires_grad=False)
                place += STEP


def _window(numbers: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) == 3:  # experts: each is a window of its own, or they would need far more memory than a layer
        return numbers.as_strided(shape, (STEP, shape[2], 1), numbers.storage_offset())
    return numbers[: shape.numel()].view(shape)


def _span(shape: torch.Size) -> int:
    return STEP * shape[0] + shape[1] * shape[2] if len(shape) == 3 else shape.numel()
