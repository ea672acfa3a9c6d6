"""SliceGPT (arXiv 2401.15024): rotate the residual stream to its principal axes and remove the last axes.

Norm scales are moved into the linear layers that read from the norms, because RMSNorm without scales commutes with
rotations. The input of each norm gets its own axes Q: the eigenvectors of x^T x summed over the calibration tokens,
largest eigenvalue first, where x is the output of the norm without its scale (section 3.3). The first `width` columns
of Q are kept. Weights that read the stream are multiplied by Q, weights that write it by Q^T, and the residual by
Q_before^T Q_after, which is one extra matrix per block (`attn_shortcut_Q`, `mlp_shortcut_Q`).

Layers are calibrated in order, each on the output of the sliced layers before it. A sliced layer does the same to its
stream as the dense layer does to the stream projected on the kept axes. The dense model's own code therefore computes
everything, in the dense model's axes.

Differences from the official code (microsoft/TransformerCompression):
- It takes x before the norm, so tokens with a large norm weigh more. This file follows the paper.
- It rotates the kept axes randomly by default (`final_orientation`), which changes the weights but the results only by
  rounding. This file keeps the principal axes.
- Neither slices the output of the last layer. The official code rotates that output and the head, and the two rotations
  cancel. This file keeps the dense axes there, so the final norm and the head are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Kind, Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.architectures import architecture_of
from blockpruner.engine.model.classes.sliced import FAMILIES, empty_sliced
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.selecting import RowChoice
from blockpruner.engine.model.surgery import copy_buffers
from blockpruner.engine.work.shape import ModelShape

DAMPING = 0.01
"""Value added to the diagonal before computing eigenvectors, as a multiple of its mean. It only shifts eigenvalues."""
MULTIPLE = 8
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
READERS = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ATTENTION_NORM),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), MLP_NORM),
}
"""Linear layers that read the stream, and the norm before them."""
ATTENTION_OUT, MLP_OUT = "self_attn.o_proj", "mlp.down_proj"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Sliced:
    model: PreTrainedModel
    width: int
    """Width of the stream between the embedding and the last layer."""
    work_flops: int
    """Matmul FLOPs of the passes over the text, the projections, x^T x and the rotation of the weights. The
    eigenvectors are not included, because their cost depends on the algorithm."""


def width_of(sparsity: float, hidden_size: int) -> int:
    """Width after slicing: int((1 - sparsity) x hidden_size), rounded down to a multiple of 8, as in the official code
    (whose result is 8 lower if (1 - sparsity) x hidden_size is below a whole number only because of rounding)."""
    width = int(round((1 - sparsity) * hidden_size, 6)) // MULTIPLE * MULTIPLE if 0 <= sparsity < 1 else 0
    if width < MULTIPLE:
        raise UserError(
            f"expected a sparsity of at least 0 that leaves {MULTIPLE} or more of {hidden_size} axes, got {sparsity:g}."
        )
    return width


def num_parameters_at(model: PreTrainedModel, width: int) -> int:
    """Number of parameters of the sliced model, from the shape of the dense model (which may be on the meta device)."""
    check_sliceable(model)
    head = model.get_output_embeddings().weight
    total = head.numel() + model.model.norm.weight.numel() + head.shape[0] * width
    hidden_size, num_layers = model.config.hidden_size, len(model.model.layers)
    for index, layer in enumerate(model.model.layers):
        leaving = hidden_size if index == num_layers - 1 else width
        total += width * (width + leaving)
        for name, weight in layer.named_parameters():
            owner = name.rpartition(".")[0]
            if owner in READERS and weight.ndim == 2:
                total += weight.shape[0] * width
            elif owner in (ATTENTION_OUT, MLP_OUT):
                total += weight.numel() // hidden_size * (width if owner == ATTENTION_OUT else leaving)
            elif owner not in READERS.values():
                total += weight.numel()
    return total


def ratio_at(model: PreTrainedModel, width: int) -> float:
    """Share of the dense model's parameters that slicing removes, from its shape. Tied parameters count once.

    The sliced model gains the shortcut matrices and an untied head, so the ratio is below the sparsity, and negative
    for a small sparsity.
    """
    return 1 - num_parameters_at(model, width) / sum(parameter.numel() for parameter in model.parameters())


def sparsity_for_ratio(model: PreTrainedModel, ratio: float) -> float:
    """Return the sparsity whose width has the parameter ratio (removed / all) nearest to `ratio`; of two equally near,
    the one with the larger width. Uses only shapes. `ratio_at(model, width_of(sparsity, hidden_size))` is the actual
    ratio."""
    hidden_size = model.config.hidden_size
    widths = range(width_of(0, hidden_size), 0, -MULTIPLE)
    return 1 - min(widths, key=lambda width: abs(ratio_at(model, width) - ratio)) / hidden_size


def check_sliceable(model: PreTrainedModel) -> None:
    """Raise UserError, with the reason, if this model cannot be sliced."""
    model_type = model.config.model_type
    if model_type in FAMILIES:
        return
    names = architecture_of(model)
    layer = model.get_submodule(names.layers)[0]
    norms = [layer.get_submodule(name) for name in (*names.norms_of(layer, Kind.MHA), *names.norms_of(layer, Kind.MLP))]
    if any(isinstance(norm, nn.LayerNorm) for norm in layer.modules()):
        reason = "its LayerNorms subtract the mean and may add a bias, which does not commute with a rotation"
    elif any(hasattr(layer, name) for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm")):
        reason = "it has norms after its blocks, whose scales do not commute with a rotation"
    elif len(norms) < 2:
        reason = "its attention and its MLP do not each read the stream through their own norm"
    else:
        reason = "its layers are not known to have the structure of Llama's"
    raise UserError(f"expected a model of type {', '.join(FAMILIES)} to slice, got {model_type!r}: {reason}.")


@torch.no_grad()
def slicegpt(
    model: PreTrainedModel, windows: Tensor, *, sparsity: float, on_layer: Callable[[], None] = lambda: None
) -> Sliced:
    """Slice a model, in the dtype of the dense model. windows: calibration token ids [num_windows, seq_len].

    `on_layer` is called after each layer. Memory holds the dense and the sliced model, the streams of all windows at
    one layer (num_windows x seq_len x hidden values of the model's dtype), and a few hidden x hidden matrices in
    float64. The model must be on one device. Raises UserError for unsupported architectures and an invalid sparsity.
    """
    check_sliceable(model)
    hidden_size = model.config.hidden_size
    width = width_of(sparsity, hidden_size)
    decoder = Decoder(model)
    streams = torch.cat([decoder.embed(window[None]) for window in windows.to(decoder.device)])
    axes = _axes(streams, decoder.layers[0].get_submodule(ATTENTION_NORM), width)
    embedding = model.model.embed_tokens.weight
    weights = {
        "model.embed_tokens.weight": (embedding.double() @ axes).to(embedding.dtype),
        "model.norm.weight": model.model.norm.weight.clone(),
        HEAD: model.get_output_embeddings().weight.clone(),
    }
    with decoder.selective():
        for index, layer in enumerate(decoder.layers):
            for window in streams.split(1):
                window.copy_(decoder.run_layer(index, _projected(window, axes), mlp=RowChoice.nobody(window)))
            middle = _axes(streams, layer.get_submodule(MLP_NORM), width)
            for window in streams.split(1):
                window.copy_(decoder.run_layer(index, _projected(window, middle), attention=RowChoice.nobody(window)))
            if index + 1 < len(decoder.layers):
                after = _axes(streams, decoder.layers[index + 1].get_submodule(ATTENTION_NORM), width)
            else:
                after = torch.eye(hidden_size, dtype=torch.float64, device=streams.device)
            sliced = _sliced_layer(layer, axes, middle, after)
            weights |= {f"model.layers.{index}.{name}": weight for name, weight in sliced.items()}
            axes = after
            on_layer()
    result = _assembled(model, width, weights)
    return Sliced(result, width, _work_flops(decoder.shape, windows, width, weights))


def principal_axes(gram: Tensor) -> Tensor:
    """Return the eigenvectors of `gram` as columns, largest eigenvalue first. gram: sum of x^T x, float64 [H, H]."""
    damping = DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.eigh(gram + damping).eigenvectors.flip(1)


def _axes(streams: Tensor, norm: nn.Module, width: int) -> Tensor:
    """Return the first principal axes [H, width] of the streams [N, T, H] after the norm without its scale."""
    gram = torch.zeros(streams.shape[-1], streams.shape[-1], dtype=torch.float64, device=streams.device)
    for window in streams:
        x = window.double()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        gram += x.T @ x
    return principal_axes(gram)[:, :width]


def _projected(stream: Tensor, axes: Tensor) -> Tensor:
    """Project the stream on the axes, in the dense model's coordinates."""
    return (stream.double() @ axes @ axes.T).to(stream.dtype)


def _sliced_layer(layer: nn.Module, before: Tensor, middle: Tensor, after: Tensor) -> dict[str, Tensor]:
    """Return the weights of a sliced layer. before, middle, after: axes of the stream before the layer, after its
    attention, and after the layer."""
    weights = {}
    for name, weight in layer.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in READERS and weight.ndim == 2:
            scale = layer.get_parameter(f"{READERS[owner]}.weight")
            axes = before if READERS[owner] == ATTENTION_NORM else middle
            weights[name] = (weight.double() * scale.double() @ axes).to(weight.dtype)
        elif owner in (ATTENTION_OUT, MLP_OUT):  # weights [H, in] and biases [H]
            axes = middle if owner == ATTENTION_OUT else after
            weights[name] = (axes.T @ weight.double()).to(weight.dtype)
        elif owner not in READERS.values():
            weights[name] = weight.clone()
    dtype = layer.get_parameter(f"{MLP_OUT}.weight").dtype
    weights["attn_shortcut_Q"] = (before.T @ middle).to(dtype)
    weights["mlp_shortcut_Q"] = (middle.T @ after).to(dtype)
    return weights


def _assembled(model: PreTrainedModel, width: int, weights: dict[str, Tensor]) -> PreTrainedModel:
    sliced = empty_sliced(model, width)
    sliced.load_state_dict(weights, assign=True)
    copy_buffers(model, sliced, lambda name: name)
    sliced.generation_config = model.generation_config
    return sliced.eval()


def _work_flops(shape: ModelShape, windows: Tensor, width: int, weights: dict[str, Tensor]) -> int:
    num_windows, seq_len = windows.shape
    num_blocks = shape.num_blocks
    passes = shape.trunk_flops(Mask(), seq_len)
    projections = num_blocks * 4 * seq_len * shape.hidden_size * width
    grams = num_blocks * 2 * seq_len * shape.hidden_size**2
    rotated = sum(weight.numel() for name, weight in weights.items() if weight.ndim == 2 and name != HEAD)
    return num_windows * (passes + projections + grams) + 2 * shape.hidden_size * rotated
