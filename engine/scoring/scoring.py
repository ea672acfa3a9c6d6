"""From masks and windows to scores: the scorer that owns a model, and the contract that the search relies on."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from blockpruner.engine.blocks import Block, Granularity, Kind, Mask
from blockpruner.engine.errors import DeviceMemoryError, SearchFailed, first_line
from blockpruner.engine.metrics.metric import Metric
from blockpruner.engine.model.holding import devices_of, load_decoder
from blockpruner.engine.model.host_memory import keep_freed_memory
from blockpruner.engine.model.loading import ModelSource
from blockpruner.engine.scoring.forked import CallShape, ForkedPass
from blockpruner.engine.work.memory import Placement
from blockpruner.engine.work.shape import ModelShape
from blockpruner.engine.work.units import KernelShape, WorkUnit, make_unit

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says, in RuntimeErrors of several types: a GPU's allocator or driver, a CPU's, cuBLAS."""


def is_out_of_memory(error: RuntimeError) -> bool:
    return any(text in str(error) for text in OUT_OF_MEMORY)


@contextmanager
def full_memory_ends(what: str, remedy: str) -> Iterator[None]:
    """Running out of memory inside raises SearchFailed: the memory is full `what`; `remedy`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise SearchFailed(f"the memory is full {what} ({first_line(error)}); {remedy}") from error


class Work(Protocol):
    """A unit of what replicas do. As text, it says what it is."""

    @property
    def flops(self) -> float:
        """About: the longest goes first."""


WorkT = TypeVar("WorkT", bound=Work)


@dataclass(frozen=True)
class UnitResult(Generic[WorkT]):
    unit: WorkT
    value: Any
    """Of a search: loss sums [masks][windows of the unit]."""
    seconds: float
    """What the replica took."""
    replica: str
    start_s: float
    """When the replica could begin with it, as the scorer knows: seconds since the epoch."""
    stop_s: float
    """When the result was there."""


@dataclass(frozen=True)
class OutOfMemory(Generic[WorkT]):
    """A unit that did not fit the device's memory."""

    unit: WorkT
    reason: str


class Scorer(Protocol):
    """Does units of work somewhere. Results come in any order."""

    @property
    def num_replicas(self) -> int:
        """That score, or will soon."""

    @property
    def num_lost(self) -> int:
        """That died or whose node went, so far."""

    def free_bytes(self) -> int | None:
        """Device memory beside the weights; None on a CPU."""

    def run(self, units: Sequence[WorkT]) -> Iterator[UnitResult[WorkT] | OutOfMemory[WorkT]]: ...


class Worker(Protocol):
    """Lives in a replica: holds a model, and does units with it."""

    def score(self, unit: Any) -> tuple[Any, float]:
        """The result, and the seconds that it took. Raises DeviceMemoryError."""

    def free_bytes(self) -> int | None:
        """Device memory beside the weights; None on a CPU."""


class WorkerSpec(Protocol):
    """What a worker holds, and where. It travels to the replica, and opens the worker there."""

    @property
    def model(self) -> ModelSource: ...

    @property
    def device(self) -> str:
        """cpu or cuda."""

    def open(self, data: Any) -> Worker: ...


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """What a replica holds, and where."""

    model: ModelSource
    """What `loading.materialize` returned."""
    dtype: str
    device: str
    """cpu or cuda."""
    placement: Placement = Placement.RESIDENT
    num_devices: int = 1
    threads: int
    """CPU threads."""
    metric: Metric = Metric.PPL

    def open(self, data: Tensor) -> MaskScorer:
        """data: the windows' token ids [num_windows, seq_len]."""
        return MaskScorer(self, data)


class MaskScorer:
    """Owns one replica of the model and scores units on it. Knows nothing of where it runs."""

    def __init__(self, spec: ReplicaSpec, windows: Tensor) -> None:
        """windows: token ids [num_windows, seq_len]."""
        torch.set_num_threads(spec.threads)
        keep_freed_memory()
        devices = devices_of(spec.device, spec.num_devices)
        with full_memory_ends(
            f"before the {spec.placement} model is loaded",
            "other programs may use it. Free it, or use --placement streamed, more --gpus-per-replica, or fewer "
            "--replicas.",
        ):
            self._decoder = load_decoder(spec.model, spec.dtype, spec.placement, devices)
            self._decoder.check()
            self._windows = windows.to(self._decoder.device)
            self._metric = spec.metric
            self._pass: ForkedPass | None = None

    def score(self, unit: WorkUnit) -> tuple[list[list[float]], float]:
        """Loss sums [masks][windows of the unit] in nats, and the seconds that it took. Raises DeviceMemoryError."""
        start = time.perf_counter()
        call_shape = CallShape(sequences_per_call=unit.kernel.rows, tokens_per_head_call=unit.kernel.head_tokens)
        windows = self._windows[unit.first : unit.stop]
        try:
            if self._pass is None or self._pass.call_shape != call_shape:
                self._pass = ForkedPass(self._decoder, call_shape)
            sums = self._pass.window_sums(unit.masks, windows, self._metric).tolist()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        else:
            return sums, time.perf_counter() - start
        if self._decoder.device.type == "cuda":
            gc.collect()  # the error's traceback may hold the failed sweep's tensors in a cycle
            torch.cuda.empty_cache()
        raise DeviceMemoryError(reason)

    def free_bytes(self) -> int | None:
        """Memory beside the weights on the fullest of its devices; None on a CPU."""
        if self._decoder.device.type != "cuda":
            return None
        devices = {self._decoder.device, *self._decoder.layer_devices}
        return min(torch.cuda.mem_get_info(device)[0] for device in devices)


def is_batch_invariant(
    scorer: Scorer, shape: ModelShape, kernel: KernelShape, *, num_windows: int, seq_len: int
) -> bool | OutOfMemory[WorkUnit]:
    """Whether masks get the same bits alone and in company, on any replica; OutOfMemory if that was not seen. Not where
    experts share the tokens: how many each gets depends on the whole company, and no probe covers that.

    Three masks from the depth of the model are scored by themselves, and in a chunk that fills a whole call and a part
    of another, if a sweep takes as many masks. Its other masks differ in the upper half of the layers, where a stream
    costs least.
    """
    if shape.routes_tokens:
        return False
    num_layers = shape.num_layers
    candidates = Granularity.MIX.candidates(num_layers)
    upper = [Mask.of([block]) for block in candidates if block.layer >= num_layers // 2]
    probes = [Mask(), Mask.of([Block(Kind.MHA, num_layers // 2)]), Mask.of([Block(Kind.MLP, num_layers - 1)])]
    stop = min(kernel.windows, num_windows)
    num_others = min(len(upper), max(8, kernel.rows // stop))
    others = [upper[index * len(upper) // num_others] for index in range(num_others)]
    company = [*probes, *others][: kernel.masks]
    probes = [mask for mask in probes if mask in company]
    units = [make_unit(masks, 0, stop, shape, kernel, seq_len) for masks in (company, *([mask] for mask in probes))]
    sums: dict[WorkUnit, list[list[float]]] = {}
    failed: OutOfMemory[WorkUnit] | None = None
    for result in scorer.run(units):
        if isinstance(result, OutOfMemory):
            failed = result
        else:
            sums[result.unit] = result.value
    if failed is not None:
        return failed
    together = sums[units[0]]
    # As text, since NaN equals nothing, and here it is a result like any other.
    return all(repr(sums[unit]) == repr([together[company.index(unit.masks[0])]]) for unit in units[1:])


class LocalScorer:
    """The in-process scorer: one replica, no Ray, errors unwrapped."""

    num_replicas = 1
    num_lost = 0

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def free_bytes(self) -> int | None:
        return self._worker.free_bytes()

    def run(self, units: Sequence[WorkT]) -> Iterator[UnitResult[WorkT] | OutOfMemory[WorkT]]:
        for unit in units:
            start_s = time.time()
            try:
                value, seconds = self._worker.score(unit)
            except DeviceMemoryError as error:
                yield OutOfMemory(unit, str(error))
            else:
                yield UnitResult(unit, value, seconds, replica="local", start_s=start_s, stop_s=time.time())
