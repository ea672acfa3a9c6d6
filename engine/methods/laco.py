"""LaCo (arXiv 2402.11187): merge neighbouring layers into one, from the top down, while the output stays similar.

- Merge (RDSC, section 2.2): theta*_l = theta_l + sum_k (theta_{l+k} - theta_l), k = 1..C-1, over all parameters of a
  layer including its norms. This is not an average: the weights of the differences add up to C - 1.
- Loop: start with l = H - C. Merge layer l and the next C - 1 layers (fewer at the end) into one. If the similarity of
  the candidate to the dense model exceeds T, keep it and decrease l by I; otherwise decrease l by 1. Stop below L.
- Similarity: the cosine of the two models' last hidden states, with the tokens of a sentence flattened into one vector,
  averaged over a few short sentences. As in the official notebooks, the states are `hidden_states[-1]` of transformers,
  the stream *after* the final norm.

The official notebooks differ from the paper. They compute the differences to the copy that they add to, so the sum
telescopes and layer l gets the attention and MLP weights of the last merged layer; its norms are left unchanged. The
default here is the paper's form; `Collapse.as_in_code` selects the notebooks' form. The published results are unlikely
to come from the formula, which produces gibberish when three or more layers are merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.architectures import architecture_of
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.surgery import keep_layers


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """Parameters of the loop."""

    num_merged: int = 4
    """C: number of layers to merge into one, at least 2. With 2, the result is the second layer; the first is
    dropped."""
    lowest: int = 1
    """L: the lowest layer that others may be merged into."""
    highest: int | None = None
    """H: the first merge uses only layers below this one; None means the number of layers."""
    interval: int = 2
    """I: decrease of l after a merge."""
    as_in_code: bool = False
    """Merge as in the official notebooks instead of as in the paper."""


@dataclass(frozen=True)
class Merged:
    model: PreTrainedModel
    """Model of the stock architecture with fewer layers. Unmerged layers share the dense model's weights."""
    layers: tuple[tuple[int, ...], ...]
    """For each layer, the source layers that it was merged from."""
    threshold: float
    similarity: float
    """Similarity of this model to the dense model."""
    work_flops: int
    """Matmul FLOPs of all forwards over the sentences, including those of the dense model."""

    @property
    def num_removed(self) -> int:
        return sum(len(sources) - 1 for sources in self.layers)


def laco(
    model: PreTrainedModel,
    sentences: Iterable[Tensor],
    *,
    num_remove: int,
    collapse: Collapse | None = None,
    on_candidate: Callable[[], None] = lambda: None,
) -> Merged:
    """Find the threshold that removes `num_remove` layers, or the nearest number that the bisection reaches (of two
    equally near, the smaller). `Merged.num_removed` holds the actual number. sentences: token ids, each [num_tokens].

    The run of a threshold yields the range of thresholds with the same decisions, so the bisection continues outside
    that range and ends when none is left. Each candidate is measured only once. In addition to the dense model, only
    the merged layers of one candidate are in memory. `on_candidate` is called after each measured candidate; their
    number is not known in advance. Raises UserError if the layers differ in shape, or the numbers do not fit the model.
    """
    collapser = _Collapser(model, sentences, collapse or Collapse(), on_candidate)
    if not 0 < num_remove < len(collapser.dense):
        raise UserError(
            f"expected to remove between 1 and {len(collapser.dense) - 1} layers of a model with "
            f"{len(collapser.dense)}, got {num_remove}."
        )
    low, high = -1.0, 1.0
    ranks: list[tuple[int, int, float]] = []
    while low < (threshold := (low + high) / 2) < high:
        run = collapser.run(threshold)
        ranks.append((abs(run.num_removed - num_remove), run.num_removed, -threshold))
        if run.num_removed == num_remove:
            break
        if run.num_removed > num_remove:
            low = run.same_below
        else:
            high = run.same_from
    return collapser.merged(-min(ranks)[-1])


@dataclass(frozen=True)
class _Slot:
    """One layer of a candidate."""

    sources: tuple[int, ...]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class _Run:
    slots: Sequence[_Slot]
    similarity: float
    same_from: float
    """Lower bound (inclusive) of the thresholds that lead to the same decisions."""
    same_below: float
    """Upper bound (exclusive) of the thresholds that lead to the same decisions."""

    @property
    def num_removed(self) -> int:
        return sum(len(slot.sources) - 1 for slot in self.slots)


class _Collapser:
    def __init__(
        self,
        model: PreTrainedModel,
        sentences: Iterable[Tensor],
        collapse: Collapse,
        on_candidate: Callable[[], None],
    ) -> None:
        self._model = model
        names = architecture_of(model)
        self._layers, self._norms = names.layers, {*names.mixer_norms, *names.mlp_norms}
        layers = list(model.get_submodule(self._layers))
        check_mergeable(model, collapse)
        self._highest = len(layers) if collapse.highest is None else collapse.highest
        self._collapse = collapse
        self._on_candidate = on_candidate
        self._sentences = [sentence.to(model.device) for sentence in sentences]
        if not self._sentences:
            raise UserError("expected at least one sentence to compare the models on, got none.")
        self.dense = [
            _Slot((index,), {name: weight.detach() for name, weight in layer.named_parameters()})
            for index, layer in enumerate(layers)
        ]
        self._shape = Decoder(model).shape
        self.work_flops = 0
        self._dense_states = self._last_states(model)
        self._known: dict[tuple[int, ...], float] = {}
        """Similarity of each candidate, by the layers at which it was merged, in order."""

    def run(self, threshold: float) -> _Run:
        slots = self.dense
        merges: tuple[int, ...] = ()
        similarity, same_from, same_below = 1.0, -1.0, 1.0
        base = self._highest - self._collapse.num_merged
        while base >= self._collapse.lowest:
            merges = (*merges, base)
            if merges not in self._known:
                self._known[merges] = self._similarity(self._merged_at(base, slots))
                self._on_candidate()
            value = self._known[merges]
            if value > threshold:
                slots = self._merged_at(base, slots)
                similarity, same_below = value, min(same_below, value)
                base -= self._collapse.interval
            else:  # also if the output is not finite
                merges = merges[:-1]
                same_from = same_from if math.isnan(value) else max(same_from, value)
                base -= 1
        return _Run(slots, similarity, same_from, same_below)

    def merged(self, threshold: float) -> Merged:
        run = self.run(threshold)
        layers = tuple(slot.sources for slot in run.slots)
        return Merged(self._build(run.slots), layers, threshold, run.similarity, self.work_flops)

    def _merged_at(self, base: int, slots: Sequence[_Slot]) -> list[_Slot]:
        end = base + self._collapse.num_merged
        some = slots[base:end]
        merged = _replaced(some, self._norms) if self._collapse.as_in_code else _merge(some)
        return [*slots[:base], merged, *slots[end:]]

    def _similarity(self, slots: Sequence[_Slot]) -> float:
        states = self._last_states(self._build(slots))
        cosines = [F.cosine_similarity(x, y, dim=0).item() for x, y in zip(self._dense_states, states, strict=True)]
        return math.fsum(cosines) / len(cosines)

    @torch.inference_mode()
    def _last_states(self, model: PreTrainedModel) -> list[Tensor]:
        """Return the flattened output of the final norm for each sentence, float64 [num_tokens x hidden]."""
        trunk_flops = sum(self._shape.trunk_flops(Mask(), len(sentence)) for sentence in self._sentences)
        num_layers = len(model.get_submodule(self._layers))  # all of the same shape
        self.work_flops += trunk_flops // self._shape.num_layers * num_layers
        return [
            model.base_model(input_ids=sentence[None], use_cache=False)[0].double().flatten()
            for sentence in self._sentences
        ]

    def _build(self, slots: Sequence[_Slot]) -> PreTrainedModel:
        model = keep_layers(self._model, [slot.sources[0] for slot in slots])
        for layer, slot in zip(model.get_submodule(self._layers), slots, strict=True):
            if len(slot.sources) > 1:
                layer.load_state_dict(slot.weights, strict=False, assign=True)  # keeps the buffers of the first layer
        return model


def _merge(slots: Sequence[_Slot]) -> _Slot:
    """Merge layers by RDSC in float32 (float64 for float64 weights), rounded once."""
    base, *others = slots
    weights = {}
    for name, weight in base.weights.items():
        wide = torch.promote_types(weight.dtype, torch.float32)
        theta = weight.to(wide)
        total = theta.clone()
        for other in others:
            total += other.weights[name].to(wide) - theta
        weights[name] = total.to(weight.dtype)
    return _Slot(_sources(slots), weights)


def _replaced(slots: Sequence[_Slot], norms: set[str]) -> _Slot:
    """Merge layers as in the notebooks: the weights of the last layer with the norms of the first."""
    base, last = slots[0].weights, slots[-1].weights
    weights = {name: base[name] if name.rpartition(".")[0] in norms else last[name] for name in base}
    return _Slot(_sources(slots), weights)


def _sources(slots: Sequence[_Slot]) -> tuple[int, ...]:
    return tuple(source for slot in slots for source in slot.sources)


def most_removed(num_layers: int, collapse: Collapse) -> int:
    """Number of layers that are removed if every candidate is similar enough."""
    left, base = num_layers, (num_layers if collapse.highest is None else collapse.highest) - collapse.num_merged
    while base >= collapse.lowest:
        left -= min(collapse.num_merged, left - base) - 1
        base -= collapse.interval
    return num_layers - left


def check_mergeable(model: PreTrainedModel, collapse: Collapse) -> None:
    """Raise UserError if the model's layers differ in shape or are too few. The model may be on the meta device."""
    layers = list(model.get_submodule(architecture_of(model).layers))
    _check_equal_shapes(layers, model.config.model_type)
    _check_fits(collapse, len(layers) if collapse.highest is None else collapse.highest, len(layers))


def _check_equal_shapes(layers: Sequence[nn.Module], model_type: str) -> None:
    first, *others = ({name: weight.shape for name, weight in layer.named_parameters()} for layer in layers)
    for index, shapes in enumerate(others, start=1):
        if shapes != first:
            name = next(name for name in [*first, *shapes] if first.get(name) != shapes.get(name))
            raise UserError(
                f"expected layers of equal shapes to merge, got a model of type {model_type!r} in which {name!r} is "
                f"{_text(first.get(name))} in layer 0 and {_text(shapes.get(name))} in layer {index}."
            )


def _text(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))


def _check_fits(collapse: Collapse, highest: int, num_layers: int) -> None:
    if collapse.interval < 1:
        raise UserError(f"expected an interval of at least 1, got {collapse.interval}.")
    if not 2 <= collapse.num_merged <= num_layers:
        raise UserError(f"expected to merge between 2 and {num_layers} layers at a time, got {collapse.num_merged}.")
    if not 0 <= collapse.lowest <= highest - collapse.num_merged <= num_layers - collapse.num_merged:
        raise UserError(
            f"expected 0 <= lowest <= highest - {collapse.num_merged} and highest <= {num_layers} (the model's "
            f"layers), got lowest {collapse.lowest} and highest {highest}."
        )
