"""Where to find the blocks of an architecture: one row a family. Other families are guessed by common names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedConfig

from blockpruner.engine.blocks import Kind
from blockpruner.engine.errors import UserError


@dataclass(frozen=True)
class Linears:
    """The linear layers of a block whose groups can be removed, by their names within the module."""

    inward: tuple[str, ...]
    """Of an MLP: their outputs are the channels, or what channels are made of one by one, as gate and up. Of an
    attention: those of queries, keys and values."""
    outward: str
    """Its inputs are the channels, or the outputs of the heads."""
    is_fused: bool = False
    """Whether the only inward one gives two values for each channel: first the one of all channels, then the other."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How mixers leave something, such as keys and values, for those of later layers."""

    argument: str
    """Named argument of a layer: a mapping that its mixer writes to or reads from."""
    leaves: str
    """Attribute of a mixer that is true if it writes to the mapping."""
    reads: str
    """Attribute of a mixer that is true if it reads from the mapping. Such a mixer has no cache of its own."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The names of a decoder's layers, blocks and norms, and its special features. A layer has those of which it has a
    module."""

    layers: str = "model.layers"
    """Path of the list of layers, starting from the causal language model."""
    mixers: tuple[str, ...] = ("self_attn",)
    """Modules that mix tokens. If a layer has several of them, they run side by side and are one block."""
    mlps: tuple[str, ...] = ("mlp",)
    """If a layer has several of them, as shared experts beside routed ones, they run side by side and are one block."""
    inline_mlp: tuple[str, str] | None = None
    """The first and the last module of an MLP that the layer's own code computes."""
    mlp_linears: tuple[Linears, ...] = (
        Linears(("gate_proj", "up_proj"), "down_proj"),
        Linears(("up_proj",), "down_proj"),
        Linears(("gate_up_proj",), "down_proj", is_fused=True),
        Linears(("input_linear",), "output_linear", is_fused=True),
        Linears(("w1", "w3"), "w2"),
        Linears(("c_fc",), "c_proj"),
        Linears(("fc1",), "fc2"),
        Linears(("fc_in",), "fc_out"),
        Linears(("dense_h_to_4h",), "dense_4h_to_h"),
    )
    """Names to look for, the first that fits. `narrowing_check` verifies them by running."""
    head_linears: tuple[Linears, ...] = (
        Linears(("q_proj", "k_proj", "v_proj"), "o_proj"),
        Linears(("q_proj", "k_proj", "v_proj"), "out_proj"),
        Linears(("q_proj", "k_proj", "v_proj"), "dense"),
    )
    """The same for attentions."""
    mixer_norms: tuple[str, ...] = ()
    """Norms of the layer that belong to its mixer; empty if mixer and MLP share one."""
    mlp_norms: tuple[str, ...] = ()
    """Norms of the layer that belong to its MLP; empty if mixer and MLP share one."""
    residual_in: frozenset[Kind] = frozenset()
    """Blocks that take the residual as their second argument and add it themselves."""
    batched_arguments: tuple[str, ...] = ()
    """Arguments that the layer passes to its attention and that are repeated along dimension 0 for each sequence."""
    by_token: tuple[int, ...] = ()
    """Places of the arguments of a layer that hold a value for each token [sequences, tokens, ...]. The stream has
    place 0."""
    by_layer: tuple[str, ...] = ()
    """Modules beside the layers whose widths are multiples of the number of layers, since they make what is
    `by_token`."""
    by_layer_methods: tuple[str, ...] = ()
    """Methods that use these modules. The last one returns the values [sequences, tokens, layers, ...]."""
    sharing: Sharing | None = None
    """How mixers leave something for those of later layers, if they do."""
    has_rest: bool = False
    """Whether a layer does something to its stream beside its blocks, as Gemma 4's scale it. That stays when both
    blocks are removed."""
    only_mlp: frozenset[str] = frozenset()
    """Values of a layer's `block_type` for which its mixer module is an MLP."""

    layer_arguments: tuple[str, ...] = ()
    """Per-layer lists of the config whose value the constructor of a layer takes after the layer's number."""

    def modules_of(self, layer: nn.Module, kind: Kind) -> tuple[str, ...]:
        """Return the names of the modules that a block of this layer consists of; none if the layer has no such
        block."""
        names = self.mixers if kind is Kind.MHA else (self.inline_mlp or self.mlps)
        if self.only_mlp:
            is_mlp = getattr(layer, "block_type", None) in self.only_mlp
            names = self.mixers if is_mlp == (kind is Kind.MLP) else ()
        return _present(layer, names)

    def by_layer_of(self, model: nn.Module) -> list[str]:
        """Return the names of those modules `by_layer` that a model has. Without them nothing is `by_token`."""
        base = model.get_submodule(self.layers.rpartition(".")[0])
        return [name for name in self.by_layer if _has(base, name)]

    def gives_more(self, model: nn.Module) -> bool:
        """Whether layers of a model are given more than their stream that differs from sequence to sequence."""
        layers = model.get_submodule(self.layers).children()
        return bool(self.by_layer_of(model)) or any(self.leaves_something(layer) for layer in layers)

    def leaves_something(self, layer: nn.Module) -> bool:
        """Whether mixers of later layers read what the mixer of this one leaves."""
        return self._mixer_is(layer, self.sharing.leaves) if self.sharing else False

    def reads_something(self, layer: nn.Module) -> bool:
        """Whether the mixer of this layer reads what those of earlier ones left, and has no cache of its own."""
        return self._mixer_is(layer, self.sharing.reads) if self.sharing else False

    def _mixer_is(self, layer: nn.Module, attribute: str) -> bool:
        names = self.modules_of(layer, Kind.MHA)
        return any(bool(getattr(layer.get_submodule(name), attribute, False)) for name in names)

    def norms_of(self, layer: nn.Module, kind: Kind) -> tuple[str, ...]:
        """Return the names of the layer's norms that are removed with one of its blocks."""
        if not self.modules_of(layer, kind):
            return ()
        names = self.mixer_norms if kind is Kind.MHA or self.only_mlp else self.mlp_norms
        return _present(layer, names)


def _present(layer: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if _has(layer, name))


def _has(layer: nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True


_PRE_NORM = Architecture(mixer_norms=("input_layernorm",), mlp_norms=("post_attention_layernorm",))
_SHARED_NORM = Architecture()
_SANDWICH = Architecture(
    mixer_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_GEMMA4 = Architecture(
    mlps=("mlp", "experts"),
    mixer_norms=_SANDWICH.mixer_norms,
    mlp_norms=(
        *_SANDWICH.mlp_norms,
        "post_feedforward_layernorm_1",
        "pre_feedforward_layernorm_2",
        "post_feedforward_layernorm_2",
    ),
    has_rest=True,
    by_token=(1,),
    by_layer=("embed_tokens_per_layer", "per_layer_model_projection"),
    by_layer_methods=("get_per_layer_inputs", "project_per_layer_inputs"),
    sharing=Sharing(argument="shared_kv_states", leaves="store_full_length_kv", reads="is_kv_shared_layer"),
)
"""The layer's own code routes tokens to the experts: the router stays, as the experts are given what it says."""
_POST_NORM_IN_BRANCH = Architecture(
    mixer_norms=("post_attention_layernorm",), mlp_norms=("post_feedforward_layernorm",)
)
_MAMBA = Architecture(layers="backbone.layers", mixers=("mixer",), mlps=(), mixer_norms=("norm",))
_OPT_NAMES = Architecture(
    inline_mlp=("fc1", "fc2"), mixer_norms=("self_attn_layer_norm",), mlp_norms=("final_layer_norm",)
)


def _stablelm(config: PreTrainedConfig) -> Architecture:
    return _SHARED_NORM if config.use_parallel_residual else _PRE_NORM


def _falcon(config: PreTrainedConfig) -> Architecture:
    mixer_norms: tuple[str, ...] = ()
    mlp_norms: tuple[str, ...] = ()
    if not config.parallel_attn and not config.new_decoder_architecture:
        mixer_norms, mlp_norms = ("input_layernorm",), ("post_attention_layernorm",)
    elif config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        mixer_norms, mlp_norms = ("ln_attn",), ("ln_mlp",)
    return Architecture(
        layers="transformer.h", mixers=("self_attention",), mixer_norms=mixer_norms, mlp_norms=mlp_norms
    )


def _opt(config: PreTrainedConfig) -> Architecture:
    if not config.do_layer_norm_before:
        raise UserError(
            "expected a decoder with norms inside its branches, got an OPT model with do_layer_norm_before=False: its "
            "norms act on the residual stream itself, so removing a block is ambiguous."
        )
    return replace(_OPT_NAMES, layers="model.decoder.layers")


def _bloom(config: PreTrainedConfig) -> Architecture:
    if config.apply_residual_connection_post_layernorm:
        raise UserError(
            "expected a decoder whose residual is the stream itself, got a BLOOM model with "
            "apply_residual_connection_post_layernorm=True: its residual is normalised, so a block cannot simply be "
            "removed."
        )
    return Architecture(
        layers="transformer.h",
        mixers=("self_attention",),
        mixer_norms=("input_layernorm",),
        mlp_norms=("post_attention_layernorm",),
        residual_in=frozenset({Kind.MHA, Kind.MLP}),
        batched_arguments=("alibi",),
    )


ARCHITECTURES: dict[str, Architecture | Callable[[PreTrainedConfig], Architecture]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "starcoder2", "mixtral", "qwen3_moe", "gemma"),
        _PRE_NORM,
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), _SANDWICH),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GEMMA4),
    "doge": replace(_PRE_NORM, has_rest=True),
    "olmo2": _POST_NORM_IN_BRANCH,
    "cohere": _SHARED_NORM,
    "stablelm": _stablelm,
    "gpt2": Architecture(layers="transformer.h", mixers=("attn",), mixer_norms=("ln_1",), mlp_norms=("ln_2",)),
    "gpt_neox": Architecture(
        layers="gpt_neox.layers",
        mixers=("attention",),
        mixer_norms=("input_layernorm",),
        mlp_norms=("post_attention_layernorm",),
    ),
    "opt": _opt,
    "bamba": Architecture(
        mixers=("self_attn", "mamba"),
        mlps=("feed_forward",),
        mixer_norms=("input_layernorm",),
        mlp_norms=("pre_ff_layernorm",),
        layer_arguments=("layers_block_type",),
    ),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), _MAMBA),
    "nemotron_h": replace(_MAMBA, layers="model.layers", only_mlp=frozenset({"mlp", "moe"})),
    "recurrent_gemma": Architecture(
        mixers=("temporal_block",),
        mlps=("mlp_block",),
        mixer_norms=("temporal_pre_norm",),
        mlp_norms=("channel_pre_norm",),
    ),
    "biogpt": replace(_OPT_NAMES, layers="biogpt.layers"),
    "dbrx": Architecture(
        layers="transformer.blocks",
        mixers=("norm_attn_norm.attn",),
        mlps=("ffn",),
        mixer_norms=("norm_attn_norm.norm_1",),
        mlp_norms=("norm_attn_norm.norm_2",),
    ),
    "falcon": _falcon,
    "bloom": _bloom,
    "mpt": Architecture(
        layers="transformer.blocks",
        mixers=("attn",),
        mlps=("ffn",),
        mixer_norms=("norm_1",),
        mlp_norms=("norm_2",),
        residual_in=frozenset({Kind.MLP}),
    ),
}
