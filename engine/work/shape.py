"""Parameters and FLOPs of a decoder's blocks as plain numbers, to compute ratios, budgets and work without the
model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from blockpruner.engine.blocks import NUM_GROUPS, Block, Granularity, Kind, Mask
from blockpruner.engine.errors import UserError

ATTENTION = "attention"
CONVOLUTION = "convolution"
AND = " and "
"""Joins the kinds of mixers that run side by side in a layer."""


@dataclass(frozen=True)
class BlockShape:
    num_parameters: int
    """Parameters that are removed with the block: its weights, biases and norm."""
    num_matmul_weights: int
    """Weights of its linear layers. Each costs 2 FLOPs per token."""
    num_channels: int = 0
    """Of a block whose groups can be removed one by one: the number of an MLP's channels, or of an attention's KV
    heads."""
    channel_parameters: int = 0
    """Parameters that are removed with one channel, or with one KV head and its query heads."""
    channel_matmul_weights: int = 0
    num_groups: int = NUM_GROUPS

    def width(self, num_groups: int) -> int:
        """Return the number of channels (or KV heads) of the first groups.

        All groups have all of them. The first j of an MLP's groups have j quarters, rounded to a multiple of 128, which
        GPUs like; of 64 if a quarter has less than 256 channels, and to a whole number if it has less than 128. A group
        of an attention is one KV head.
        """
        size = self.num_channels / self.num_groups
        multiple = 128 if size >= 256 else 64 if size >= 128 else 1
        return self.num_channels if num_groups == self.num_groups else multiple * round(size * num_groups / multiple)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder of L layers."""

    hidden_size: int
    vocab_size: int
    attention_width: int
    """Query heads x head_dim: the width of the score and value products."""
    num_parameters: int
    """All parameters of the model. Tied parameters count once."""
    mha: tuple[BlockShape, ...]
    mlp: tuple[BlockShape, ...]
    shared: tuple[int, ...]
    """For each layer, the parameters that both blocks use (a shared norm). They are removed only with both blocks."""
    num_score_heads: int = 0
    """Query heads whose score matrices (tokens x tokens) are held in memory; 0 with fused attention."""
    routes_tokens: bool = False
    """Whether the model routes tokens to experts."""
    mixers: tuple[str, ...] = ()
    """What mixes the tokens of each layer: "attention", "mamba" and so on, or "" for an MLP alone. Empty if all layers
    have attention."""

    needed: frozenset[Block] = frozenset()
    """Mixers that leave something, such as keys and values, for mixers of later layers. They cannot be removed."""
    left_width: int = 0
    """Values per token that these leave, which each row of a sweep holds beside its stream."""
    token_width: int = 0
    """Values per token that layers are given beside the stream, which each window of a sweep holds."""

    @property
    def num_layers(self) -> int:
        return len(self.mha)

    def mixer(self, layer: int) -> str:
        return self.mixers[layer] if self.mixers else ATTENTION

    def attends(self, layer: int) -> bool:
        """Whether the layer's mixer has a KV cache."""
        return ATTENTION in self.mixer(layer).split(AND)

    @property
    def has_recurrence(self) -> bool:
        """Whether some mixer carries a state from token to token: Mamba or linear attention."""
        return any({*mixer.split(AND)} - {ATTENTION, CONVOLUTION, ""} for mixer in self.mixers)

    @cached_property
    def missing(self) -> frozenset[Block]:
        """Blocks that the model does not have: some layers are a mixer or an MLP alone."""
        layers, kinds = range(self.num_layers), (Kind.MHA, Kind.MLP)
        if not self.mixers:
            return frozenset()
        blocks = (Block(kind, layer) for kind in kinds for layer in layers)
        return frozenset(block for block in blocks if not self.block(block).num_parameters)

    def candidates(self, granularity: Granularity) -> list[Block]:
        """Return all blocks of the model that can be removed, in the official order."""
        blocks = granularity.candidates(self.num_layers)
        return [block for block in blocks if block not in self.missing and not self.needed & set(block.parts)]

    @property
    def num_blocks(self) -> int:
        """Number of blocks that the model has: fewer than two a layer if some layers have one."""
        return 2 * self.num_layers - len(self.missing)

    def num_absent(self, mask: Mask) -> int:
        """Number of blocks of the model that a mask takes. One of whole layers may name blocks that it does not
        have."""
        return len(mask.absent - self.missing)

    @cached_property
    def last_mixers(self) -> tuple[Block, ...]:
        """The mixers of which one must stay: those with a KV cache, which counts positions, or all if none has one.
        Those that are needed stay anyway."""
        if self.needed:
            return tuple(sorted(self.needed, key=lambda block: block.depth))
        mixers = self.candidates(Granularity.MHA)
        return tuple(block for block in mixers if self.attends(block.layer)) or tuple(mixers)

    @property
    def note(self) -> str:
        """Which blocks of the model are no candidates, and why; empty if all are."""
        if not self.needed:
            return ""
        names = ", ".join(str(block) for block in sorted(self.needed, key=lambda block: block.depth))
        return f"{names} stay, because mixers of later layers read their keys and values"

    def without(self, mask: Mask) -> Mask:
        """Return the mask with the blocks that the model does not have. Raises UserError if it has one of them
        alone, or a mixer that later ones need."""
        self.check_needed(mask)
        for block in sorted(mask.absent & self.missing, key=lambda block: block.depth):
            partner = Block(Kind.MLP if block.kind is Kind.MHA else Kind.MHA, block.layer)
            if partner not in mask.absent:
                kind = "mixer" if block.kind is Kind.MHA else "MLP"
                raise UserError(f"expected blocks that the model has, got {block}: layer {block.layer} has no {kind}.")
        return Mask(mask.absent | self.missing)

    def check_needed(self, mask: Mask) -> None:
        """Raise UserError if a mask takes a mixer that later ones need."""
        for block in sorted(mask.absent & self.needed, key=lambda block: block.depth):
            raise UserError(
                f"expected blocks that can be removed, got {block}: mixers of later layers read its keys and values."
            )

    def block(self, block: Block) -> BlockShape:
        return (self.mha if block.kind is Kind.MHA else self.mlp)[block.layer]

    def can_narrow(self, block: Block) -> bool:
        """Whether groups of a block can be removed one by one."""
        return block.kind is not Kind.LAYER and self.block(block).num_channels >= self.block(block).num_groups

    def num_groups(self, block: Block) -> int:
        """Number of groups of a block that can go one by one; 1 if it can only go as a whole."""
        return self.block(block).num_groups if self.can_narrow(block) else 1

    def groups(self, block: Block) -> list[Block]:
        """Return the groups of a block that go before the block itself, in that order."""
        return [Block(block.kind, block.layer, part) for part in range(self.block(block).num_groups, 1, -1)]

    def width(self, block: Block, lacks: int) -> int:
        """Return the number of channels or KV heads of a block that lacks some of its groups."""
        return self.block(block).width(self.block(block).num_groups - lacks)

    def size(self, block: Block) -> int:
        """Number of parameters of a block or of a group, without a norm that two blocks share."""
        shape = self.block(block)
        if block.part is None:
            return shape.num_parameters
        return (shape.width(block.part) - shape.width(block.part - 1)) * shape.channel_parameters

    def num_removed(self, mask: Mask) -> int:
        """Number of parameters that a mask removes."""
        blocks = sum(self.size(block) for block in mask.absent)
        gone = mask.absent | self.missing
        both_gone = [n for n in range(self.num_layers) if {Block(Kind.MHA, n), Block(Kind.MLP, n)} <= gone]
        return blocks + sum(self.shared[layer] for layer in both_gone)

    def ratio(self, mask: Mask) -> float:
        """Pruning ratio as defined in the paper: removed parameters / all parameters of the dense model."""
        return self.num_removed(mask) / self.num_parameters

    def activation_bytes(self, bytes_per_value: int, seq_len: int) -> int:
        """Approximate working memory of a layer's call, in bytes per token: outputs of the linear layers (at most
        weights / hidden size), several copies of the stream, float32 copies for the norms, and the attention scores
        with their float32 softmax."""
        widest = max(block.num_matmul_weights for block in (*self.mha, *self.mlp)) // self.hidden_size
        scores = (bytes_per_value + 6) * self.num_score_heads * seq_len
        return bytes_per_value * (widest + 6 * self.hidden_size) + 8 * self.hidden_size + scores

    def logit_bytes(self, bytes_per_value: int) -> int:
        """Working memory of the head's call, in bytes per token: logits, their float32 copy, and log-softmax."""
        return self.vocab_size * (bytes_per_value + 8)

    def block_flops(self, block: Block, num_tokens: int, lacks: int = 0) -> int:
        """Matmul FLOPs of one MHA or MLP block for one row of one window: 2 per weight and token, plus, for attention,
        the causal half of the score and value products (2 x tokens^2 x width). lacks: groups that the block lacks."""
        shape, width = self.block(block), self.attention_width
        weights = shape.num_matmul_weights
        if lacks:
            weights -= (shape.num_channels - self.width(block, lacks)) * shape.channel_matmul_weights
            width = width * (shape.num_groups - lacks) // shape.num_groups
        flops = 2 * weights * num_tokens
        if block.kind is Kind.MHA and self.attends(block.layer):
            flops += 2 * num_tokens**2 * width
        return flops

    def head_flops(self, num_tokens: int) -> int:
        """Matmul FLOPs of the vocabulary head for one row of one window."""
        return 2 * self.vocab_size * self.hidden_size * num_tokens

    def forward_flops(self, mask: Mask, num_tokens: int) -> int:
        """Matmul FLOPs of one full forward over one window with the mask's blocks physically absent. This is the cost
        of one candidate in the plain loop (the naive work)."""
        return self.trunk_flops(mask, num_tokens) + self.head_flops(num_tokens)

    def trunk_flops(self, mask: Mask, num_tokens: int) -> int:
        """Like `forward_flops`, but without the head."""
        kept = (
            Block(kind, layer)
            for layer in range(self.num_layers)
            for kind in (Kind.MHA, Kind.MLP)
            if mask.keeps(kind, layer)
        )
        lacking = mask.lacking
        return sum(self.block_flops(block, num_tokens, lacking.get(block, 0)) for block in kept)
