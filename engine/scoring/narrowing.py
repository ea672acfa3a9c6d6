"""The replica of a search that removes groups of channels or heads: it measures how important they are, brings them
into their order, and scores masks.

Shapes: D channels of an MLP, or KV heads of an attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blockpruner.engine.blocks import Block, Kind, OrderedBy
from blockpruner.engine.channels import ChannelOrder
from blockpruner.engine.errors import SearchFailed
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.metrics.ppl import PPL
from blockpruner.engine.model.decoder import Decoder
from blockpruner.engine.model.full_memory import within_memory
from blockpruner.engine.model.holding import devices_of, load_decoder, while_loading
from blockpruner.engine.model.narrowing import Narrow
from blockpruner.engine.model.narrowing_check import check_narrowable
from blockpruner.engine.scoring.scorer import OutOfMemory, Scorer, UnitResult
from blockpruner.engine.scoring.scoring import ScoringReplica, ScoringSpec
from blockpruner.engine.scoring.sharing import SharingUnit, run_wrapped
from blockpruner.engine.work.units import WorkUnit, cut

NUM_PARTS = 8
"""Parts of the text whose sums are added. A fixed number, so that the order has the same bits for any number of
replicas."""
TOKENS_PER_CALL = 4096
"""Fixed, because the sums depend on it in their last bits."""
Importance = Mapping[Block, NDArray[np.float64]]


@dataclass(frozen=True)
class ImportanceUnit:
    """Sum how important channels and heads are over some windows, on the dense model. By their weights, one is
    enough."""

    first: int
    stop: int
    kinds: tuple[Kind, ...]
    flops: float
    by: OrderedBy = OrderedBy.OUTPUT

    @property
    def home(self) -> None:
        return None

    def __str__(self) -> str:
        return f"importance of groups, windows {self.first}..{self.stop - 1}"


class OrderedUnit(SharingUnit[ChannelOrder]):
    """Score masks with channels and heads in their order."""


@dataclass(frozen=True, kw_only=True)
class NarrowingSpec(ScoringSpec):
    """A replica of a search that removes groups of channels or heads."""

    kinds: tuple[Kind, ...]
    """The kinds of blocks that go in groups."""

    def open(self, data: Tensor) -> NarrowingReplica:  # type: ignore[override]
        torch.set_num_threads(self.threads)
        with while_loading(self.placement):
            decoder = load_decoder(self.model, self.dtype, self.placement, devices_of(self.device, self.num_devices))
            return NarrowingReplica(decoder, data, self.kinds, self.metric)


class NarrowingReplica:
    def __init__(self, decoder: Decoder, windows: Tensor, kinds: tuple[Kind, ...], metric: Metric = PPL) -> None:
        """windows: token ids [num_windows, seq_len]. kinds: of blocks that go in groups. Raises UserError if removing
        blocks or groups has no clear meaning in this model."""
        self._scoring = ScoringReplica(decoder, windows, metric)
        self._decoder, self._windows = decoder, windows
        check_narrowable(decoder, kinds)

    def score(self, unit: WorkUnit | OrderedUnit | ImportanceUnit) -> tuple[Any, float]:
        """Return what the unit asks for, and the seconds taken. Raises DeviceMemoryError."""
        if isinstance(unit, OrderedUnit):
            assert unit.shared is not None
            self._decoder.put_in_order(unit.shared)
            return self._scoring.score(unit.unit)
        self.release()
        if isinstance(unit, WorkUnit):
            return self._scoring.score(unit)
        start = time.perf_counter()
        measure = _size_of_weights if unit.by is OrderedBy.WEIGHTS else _importance
        windows = self._windows[unit.first : unit.stop]
        found = within_memory(partial(measure, self._decoder, windows, unit.kinds), self._decoder.device)
        return found, time.perf_counter() - start

    def free_bytes(self) -> int | None:
        return self._scoring.free_bytes()

    def release(self) -> None:
        """Bring the channels back into the order of the dense model."""
        self._decoder.put_in_order(None)


def channel_order(
    scorer: Scorer,
    num_windows: int,
    window_flops: float,
    kinds: tuple[Kind, ...],
    by: OrderedBy = OrderedBy.OUTPUT,
) -> ChannelOrder:
    """Return the order of the channels and KV heads of all blocks of some kinds by their importance: the norm of what a
    channel adds to the output of its MLP over the calibration text, which is that of its activations times that of its
    column of the output projection; of a KV head, the root of the sum of the squares of that over the outputs of its
    query heads. Or by their weights (`Narrow.row_norms`), for which the text does not matter. The first one wins ties.

    Raises SearchFailed if a device has too little memory.
    """
    parts = [(0, 1)] if by is OrderedBy.WEIGHTS else cut(num_windows, min(NUM_PARTS, num_windows))
    sums: dict[int, Importance] = {}
    for result in scorer.run(
        [ImportanceUnit(first, stop, kinds, (stop - first) * window_flops, by) for first, stop in parts]
    ):
        if isinstance(result, OutOfMemory):
            raise SearchFailed(f"the device does not have enough memory for the {result.unit}: {result.reason}")
        sums[result.unit.first] = result.value
    in_turn = [sums[first] for first, _ in parts]  # in a fixed order, whenever they arrived
    return ChannelOrder.by({block: np.sum([part[block] for part in in_turn], axis=0) for block in in_turn[0]})


def in_order(
    scorer: Scorer, units: Sequence[WorkUnit], order: ChannelOrder
) -> Iterator[UnitResult[WorkUnit] | OutOfMemory[Any]]:
    """Run the units of a search with the channels in an order."""
    yield from run_wrapped(scorer, [OrderedUnit(unit, order) for unit in units])


@torch.inference_mode()
def _size_of_weights(decoder: Decoder, windows: Tensor, kinds: tuple[Kind, ...]) -> Importance:
    """Return for each block of some kinds the L1 norms of the rows of its channels or KV heads, float64 [D]. windows:
    one is enough, with which the layers run: the weights of a streamed layer are on the device as it computes."""
    found: dict[Block, NDArray[np.float64]] = {}

    def look(block: Block, narrow: Narrow, entering: Tensor) -> None:
        found[block] = narrow.row_norms.cpu().numpy()

    _run(decoder, windows, kinds, look)
    return found


@torch.inference_mode()
def _importance(decoder: Decoder, windows: Tensor, kinds: tuple[Kind, ...]) -> Importance:
    """Return for each block of some kinds the sums over tokens of the squared inputs of its output projection, times
    the squared norms of its columns, of each channel or KV head, float64 [D]."""
    found: dict[Block, Tensor] = {}
    norms: dict[Block, Tensor] = {}

    def look(block: Block, narrow: Narrow, entering: Tensor) -> None:
        squares = entering.flatten(0, -2).double().square().sum(0)
        if block not in found:  # measured now, since the weights of a streamed layer are on the device as it computes
            norms[block] = narrow.column_norms
        found[block] = found[block] + squares if block in found else squares

    _run(decoder, windows, kinds, look)
    sums = {block: squares * norms[block].square() for block, squares in found.items()}
    return {
        block: values.view(decoder.narrow[block].num_channels, -1).sum(1).cpu().numpy()
        for block, values in sums.items()
    }


def _run(
    decoder: Decoder, windows: Tensor, kinds: tuple[Kind, ...], look: Callable[[Block, Narrow, Tensor], None]
) -> None:
    """Run the dense model on windows. look: called with what enters the output projection of each block of some kinds,
    while its layer computes."""

    def hook(block: Block, narrow: Narrow, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        look(block, narrow, args[0])

    with ExitStack() as stack:
        for block, narrow in decoder.narrow.items():
            if block.kind in kinds:
                handle = narrow.outward.register_forward_pre_hook(partial(hook, block, narrow))
                stack.callback(handle.remove)
        for some in windows.split(max(1, TOKENS_PER_CALL // windows.shape[1])):
            stream = decoder.embed(some.to(decoder.device))
            for layer, device in enumerate(decoder.layer_devices):
                stream = decoder.run_layer(layer, stream.to(device))
