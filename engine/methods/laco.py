"""LaCo (arXiv 2402.11187): neighbouring layers collapse into one, from the top down, while the output stays similar.

- Merge (RDSC, section 2.2): theta*_l = theta_l + sum_k (theta_{l+k} - theta_l), k = 1..C-1, over all parameters of a
  layer, its norms included. It is no average: the weights of the differences add up to C - 1.
- Loop: l = H - C. Layer l and the C - 1 after it, fewer at the end, become one. Where the candidate is similar enough
  to the dense model (> T) it is kept and l falls by I, else l falls by 1. It ends below L.
- Similarity: the mean over a few short sentences of the cosine of the two models' last hidden states, each sentence's
  tokens flattened into one vector. As in the official notebooks these are `hidden_states[-1]` of transformers, the
  stream *after* the final norm.

The official notebooks do something else than the paper: they take the differences to the copy that they add to, so that
the sum telescopes and layer l gets the attention and MLP weights of the last of the merged layers, and they leave its
norms as they were. Here the paper's form is the default, and `Collapse.as_in_code` the other: the published results can
hardly be those of the formula, which leaves gibberish where three or more layers are merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from blockpruner.engine.blocks import Block, Kind, Mask
from blockpruner.engine.errors import UserError
from blockpruner.engine.model.architectures import architecture_of
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.surgery import keep_layers
from blockpruner.engine.work.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """How the loop moves."""

    num_merged: int = 4
    """C: layers that become one, at least 2. With 2 the merge is the second layer: the first one is dropped."""
    lowest: int = 1
    """L: the lowest layer that others may be merged into."""
    highest: int | None = None
    """H: layers from this one on are in no first merge; None: the number of layers."""
    interval: int = 2
    """I: how far l falls after a merge."""
    as_in_code: bool = False
    """Merge as the notebooks do, not as the paper says."""


@dataclass(frozen=True)
class Merged:
    model: PreTrainedModel
    """Of the stock architecture, with fewer layers. Those that were not merged share the dense model's weights."""
    layers: tuple[tuple[int, ...], ...]
    """For each layer the source layers that it is made of."""
    threshold: float
    similarity: float
    """Of this model to the dense one."""
    work_flops: int
    """Of the matmuls of all forwards over the sentences, the dense model's included."""

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
    """Find the threshold that removes `num_remove` layers, or the nearest number that the bisection meets (of two as
    near, the smaller): `Merged.num_removed` tells. sentences: token ids, each [num_tokens].

    Each threshold's run gives the range of thresholds that would decide the same, so the bisection goes on outside of
    it and ends when nothing is left. Candidates are measured once for all thresholds. Beside the dense model only the
    merged layers of one candidate are held. `on_candidate` is called after each measured candidate; how many there
    will be is not known before. Raises UserError if the layers differ in shape, or the numbers do not fit the model.
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


def laco_at(
    model: PreTrainedModel,
    sentences: Iterable[Tensor],
    *,
    threshold: float,
    collapse: Collapse | None = None,
    on_candidate: Callable[[], None] = lambda: None,
) -> Merged:
    """The paper's loop at a given threshold T; otherwise as `laco`."""
    return _Collapser(model, sentences, collapse or Collapse(), on_candidate).merged(threshold)


@dataclass(frozen=True)
class _Slot:
    """A layer of a candidate."""

    sources: tuple[int, ...]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class _Run:
    slots: Sequence[_Slot]
    similarity: float
    same_from: float
    """Thresholds from this one on ..."""
    same_below: float
    """... and below this one decide the same."""

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
        self._layers, self._norms = names.layers, {*names.attention_norms, *names.mlp_norms}
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
        """Similarity of the candidate whose merges happened at these layers, in this order."""

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
            else:  # also where the merged weights give no finite numbers
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
        """Of each sentence what leaves the final norm, flattened: float64 [num_tokens x hidden]."""
        trunk_flops = sum(self._shape.trunk_flops(Mask(), len(sentence)) for sentence in self._sentences)
        num_layers = len(model.get_submodule(self._layers))  # of equal shapes: which ones they were does not matter
        self.work_flops += trunk_flops // self._shape.num_layers * num_layers
        return [
            model.base_model(input_ids=sentence[None], use_cache=False)[0].double().flatten()
            for sentence in self._sentences
        ]

    def _build(self, slots: Sequence[_Slot]) -> PreTrainedModel:
        model = keep_layers(self._model, [slot.sources[0] for slot in slots])
        for layer, slot in zip(model.get_submodule(self._layers), slots, strict=True):
            if len(slot.sources) > 1:
                layer.load_state_dict(slot.weights, strict=False, assign=True)  # buffers stay the first layer's
        return model


def _merge(slots: Sequence[_Slot]) -> _Slot:
    """RDSC in float32 (float64 for float64 weights), rounded once."""
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
    """The notebooks' form: the last layer's weights between the first one's norms."""
    base, last = slots[0].weights, slots[-1].weights
    weights = {name: base[name] if name.rpartition(".")[0] in norms else last[name] for name in base}
    return _Slot(_sources(slots), weights)


def _sources(slots: Sequence[_Slot]) -> tuple[int, ...]:
    return tuple(source for slot in slots for source in slot.sources)


def most_removed(num_layers: int, collapse: Collapse) -> int:
    """Layers that go if every candidate is similar enough."""
    left, base = num_layers, (num_layers if collapse.highest is None else collapse.highest) - collapse.num_merged
    while base >= collapse.lowest:
        left -= min(collapse.num_merged, left - base) - 1
        base -= collapse.interval
    return num_layers - left


def ratio_of(shape: ModelShape, num_layers: int) -> float:
    """Share of the parameters that so many of a model's layers, all of one shape, hold."""
    layers = Mask.of(Block(Kind.LAYER, layer) for layer in range(shape.num_layers))
    return shape.ratio(layers) * num_layers / shape.num_layers


def num_layers_for_ratio(shape: ModelShape, ratio: float, collapse: Collapse) -> int:
    """Layers to remove, at least one, by which the share of the parameters comes nearest to `ratio`."""
    numbers = range(1, most_removed(shape.num_layers, collapse) + 1)
    return min(numbers, key=lambda number: abs(ratio_of(shape, number) - ratio))


def check_mergeable(model: PreTrainedModel, collapse: Collapse) -> None:
    """Raise UserError if the model's layers differ in shape, or are too few. The model may be on the meta device."""
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
