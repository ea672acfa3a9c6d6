"""Remove blocks from a model in memory. The pruned model shares the dense model's weights and lacks removed modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from blockpruner.engine.blocks import Kind, Mask
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.architectures import PRUNED_PREFIX, architecture_of
from blockpruner.engine.model.classes.pruned import WIDTHS, pruned_classes
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.few_layers import cut, per_layer_values, with_layers
from blockpruner.engine.model.narrowing import channels_of, check_narrowed
from blockpruner.engine.model.outputs import failures_told
from blockpruner.engine.model.ties import is_tied

Group = dict[str, Any]
HALF_PRECISION = 0.25
"""Share of the spread of logits by which those with a cache may differ from those without in bfloat16 or float16. On a
processor with AMX, 0.02 was seen for SmolLM2 without 3 to 12 layers (0.38 on special tokens), in float32 nothing."""
CACHES = ("past_key_values", "cache_params")
"""Names of a model's cache: of most, and of those without attention."""


def group_blocks(mask: Mask, num_layers: int, *, has_rest: bool = False) -> list[Group]:
    """Group the remaining blocks by kept mixer. An MLP whose own mixer is removed joins the group of the previous mixer
    (`post`), or of the first one if none precedes it (`pre`). Layers without blocks disappear, unless layers do
    something beside their blocks (has_rest): then they stay where an MLP would (`empty`).

    Raises UserError if no mixer is left, because caches and positions need one.
    """
    groups: list[Group] = []
    early: list[int] = []
    for layer in range(num_layers):
        mlp = mask.keeps(Kind.MLP, layer)
        if mask.keeps(Kind.MHA, layer):
            groups.append({"pre": early, "attention": layer, "mlp": mlp, "post": []})
            early = []
        elif mlp or has_rest:
            (groups[-1]["post"] if groups else early).append(layer)
    if not groups:
        raise UserError(f"expected a mask that keeps at least one of the {num_layers} attention blocks, got {mask}.")
    for group in groups:
        if empty := [layer for layer in (*group["pre"], *group["post"]) if not mask.keeps(Kind.MLP, layer)]:
            group["empty"] = empty
    return groups


def prune(model: PreTrainedModel, mask: Mask, order: ChannelOrder | None = None) -> PreTrainedModel:
    """Return a model without the mask's blocks. Its weights are the dense model's own tensors, not copies, but for
    those of blocks that lack some of their groups.

    order: which channels and heads the groups of a mask are, if it has some.
    """
    num_layers = model.config.num_hidden_layers
    too_deep = [str(block) for block in mask.absent if block.layer >= num_layers]
    if too_deep:
        raise UserError(f"expected blocks of a model with {num_layers} layers, got {', '.join(sorted(too_deep))}.")
    decoder = Decoder(model)
    check_narrowed(mask, decoder.narrow, model.config.model_type)
    groups = group_blocks(decoder.shape.without(mask), num_layers, has_rest=decoder.architecture.has_rest)
    if mask.absent.issuperset(last := decoder.shape.last_mixers):
        raise UserError(
            f"expected a mask that keeps at least one of {', '.join(map(str, last))}, got {mask}: a cache of "
            f"this model counts positions in them alone."
        )
    name = f"model type {model.config.model_type!r}"
    with failures_told(f"{name} cannot be pruned: making its pruned form fails with"):
        return _without_blocks(decoder, groups, kept_channels(decoder, mask, order))


def kept_channels(decoder: Decoder, mask: Mask, order: ChannelOrder | None) -> ChannelOrder:
    """Return the channels that the narrower blocks of a mask keep, in their order. Raises UserError if the order is not
    one of this model."""
    found = {}
    for block, number in mask.lacking.items():
        width = decoder.shape.width(block, number)
        found[block] = channels_of(order, block, decoder.narrow[block].num_channels, width)
    return ChannelOrder(found)


def _without_blocks(decoder: Decoder, groups: list[Group], kept: ChannelOrder) -> PreTrainedModel:
    """kept: the channels that narrower blocks keep."""
    model = decoder.model
    architecture = decoder.architecture
    classes = pruned_classes(model, architecture, is_narrower=bool(kept.channels))
    values = {**pruned_values(model.config, groups), **_block_outputs(decoder)}
    for name, kind in WIDTHS.items():
        if blocks := [block for block in kept.blocks if block.kind is kind]:
            values[name] = {str(block.layer): len(kept.channels[block]) for block in blocks}
    config = classes.config(**{**values, "tie_word_embeddings": is_tied(model)})
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"), no_init_weights():
        pruned = classes.model(config)
    for name, value in vars(model.config).items():
        # Copy what was set on the dense config after its creation, such as the implementation of attention or experts.
        if name.startswith("_") and name.endswith("_implementation_internal"):
            setattr(pruned.config, name, value)

    def source(name: str) -> str:
        return source_name(name, architecture.layers, groups)

    weights = {**dict(model.named_buffers(remove_duplicate=False)), **model.state_dict()}
    for block, channels in kept.channels.items():
        narrow, numbers = decoder.narrow[block], torch.from_numpy(channels.astype("int64"))
        prefix = f"{architecture.layers}.{block.layer}.{narrow.name}."
        for name in [name for name in weights if name.startswith(prefix)]:
            weights[name] = narrow.taken(name.removeprefix(prefix), weights[name], numbers)
    pruned.load_state_dict({name: weights[source(name)] for name in pruned.state_dict()}, assign=True)
    pruned.tie_weights()
    copy_buffers(model, pruned, source)
    pruned.generation_config = model.generation_config
    return pruned.eval()


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Return a model of the same class with only the given layers of `model`, in the given order. Its weights are the
    dense model's own tensors, not copies. Per-layer lists of the config are cut, and layers are renumbered.

    Raises UserError if the config defines layers by position and the layers do not fit their new positions, or if
    layers do something beside their blocks, which would disappear with them.
    """
    if architecture_of(model).has_rest:
        raise UserError(
            f"expected a model whose layers are nothing but their blocks, got one of type {model.config.model_type!r}."
        )
    path = architecture_of(model).layers
    config = with_layers(model.config, layers)
    config.tie_word_embeddings = is_tied(model)

    def source(name: str) -> str:
        match = re.match(rf"{re.escape(path)}\.(\d+)\.", name)
        return f"{path}.{layers[int(match[1])]}.{name[match.end() :]}" if match else name

    with torch.device("meta"), no_init_weights():
        fewer = type(model)(config)
    weights = model.state_dict()
    for name, weight in fewer.state_dict().items():
        if source(name) not in weights or weights[source(name)].shape != weight.shape:
            raise UserError(
                f"expected a model in which any layer can be at any position, got one of type {config.model_type!r}: "
                f"with {len(layers)} layers it has a different {name!r}."
            )
    fewer.load_state_dict({name: weights[source(name)] for name in fewer.state_dict()}, assign=True)
    fewer.tie_weights()
    copy_buffers(model, fewer, source)
    fewer.generation_config = model.generation_config
    return fewer.eval()


@torch.inference_mode()
def check_cache(pruned: PreTrainedModel) -> None:
    """Check that the model gives the same logits with a cache, token by token, as without. Raises UserError if not,
    because such a checkpoint would generate nonsense."""
    vocabulary = pruned.config.vocab_size
    # Not the first tokens: they are special ones, on which rounding in half precision can change everything.
    ids = torch.linspace(0.1 * vocabulary, 0.9 * vocabulary, 8, device=pruned.device).long()[None]
    name = pruned.config.model_type.removeprefix(PRUNED_PREFIX)
    with failures_told(
        f"a pruned model of type {name!r} could not generate, so no checkpoint can be written of it: it fails with"
    ):
        whole = pruned(input_ids=ids, use_cache=False).logits
        parts = [pruned(input_ids=ids[:, :5], use_cache=True)]
        name_of_cache = next(name for name in CACHES if name in parts[0])
        for place in range(5, ids.shape[1]):
            cache = {name_of_cache: parts[-1][name_of_cache]}
            parts.append(pruned(input_ids=ids[:, place : place + 1], **cache, use_cache=True))
    difference = (torch.cat([part.logits for part in parts], dim=1) - whole).double()
    if whole.dtype.itemsize == 2:
        # In half precision single logits can differ widely by rounding; a wrong cache changes all.
        spread = whole.double() - whole.double().mean(dim=-1, keepdim=True)
        is_wrong = difference.norm() > HALF_PRECISION * spread.norm()
    else:
        is_wrong = difference.abs().max() > 0.1 * whole.std()  # rounding errors are far smaller, others far larger
    if is_wrong:
        raise UserError(
            f"a pruned model of type {name!r} gives different logits with and without a KV cache (difference "
            f"{difference.abs().max():.3g}); no checkpoint can be written of it."
        )


def _block_outputs(decoder: Decoder) -> dict[str, Any]:
    """Return what modules of blocks return, as the pruned config says it: only what is not as usual."""
    unusual: dict[str, Any] = {}
    for kind, usual in ((Kind.MHA, 2), (Kind.MLP, 0)):
        used = [decoder.architecture.modules_of(layer, kind) for layer in decoder.layers]
        for name in dict.fromkeys(name for names in used for name in names):
            lengths = [outputs.modules.get(name) or 0 for outputs in decoder.outputs]
            if any(length != usual for length, names in zip(lengths, used, strict=True) if name in names):
                unusual[name] = lengths if len(set(lengths)) > 1 else lengths[0]
    return {"block_outputs": unusual} if unusual else {}


def pruned_values(config: PreTrainedConfig, groups: list[Group]) -> dict[str, Any]:
    """Return the values of the pruned model's config. Per-layer lists are cut to the layers with a kept attention."""
    num_layers = config.num_hidden_layers
    values = config.to_dict()
    for key in ("model_type", "architectures", "_name_or_path", "transformers_version", "auto_map"):
        values.pop(key, None)
    lists = per_layer_values(values, num_layers)
    kept = [group["attention"] for group in groups]
    # Some families use another name for the number of layers, and accept both.
    own_name = (config.attribute_map or {}).get("num_hidden_layers", "num_hidden_layers")
    return {
        **values,
        **{key: cut(value, kept, num_layers) for key, value in lists.items()},
        own_name: len(groups),
        "source_num_hidden_layers": num_layers,
        "source_lists": lists,
        "block_groups": groups,
    }


def source_name(name: str, layers: str, groups: list[Group]) -> str:
    """Map the name of a tensor in the pruned model to its name in the dense model."""
    match = re.match(rf"{re.escape(layers)}\.(\d+)\.(?:(pre|post)\.(\d+)\.)?", name)
    if match is None:
        return name
    group = groups[int(match[1])]
    layer = group[match[2]][int(match[3])] if match[2] else group["attention"]
    return f"{layers}.{layer}.{name[match.end() :]}"


def copy_buffers(model: PreTrainedModel, pruned: PreTrainedModel, source: Callable[[str], str]) -> None:
    """Copy buffers that are in no checkpoint (rotary frequencies), since they are not computed on the meta device, and
    the numbers that stand beside them: dynamic RoPE notes for which length its frequencies are."""
    buffers: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    for name, buffer in list(pruned.named_buffers(remove_duplicate=False)):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            module = pruned.get_submodule(owner)
            module._buffers[leaf] = buffers[source(name)]
            if source(name) == name:  # outside of the layers, whose numbers count them
                numbers = vars(model.get_submodule(owner)).items()
                vars(module).update({key: value for key, value in numbers if type(value) in (int, float)})
