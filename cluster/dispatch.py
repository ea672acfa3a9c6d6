"""Units of work over Ray actors: longest first, two in flight each, the dead replaced and their work redone.

Import this module only inside `session.ray_session`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
from torch import Tensor

from cluster.replica import Replica
from engine.errors import SearchFailed, first_line
from engine.loading import ModelSource
from engine.scoring import UnitResult
from engine.units import KernelShape, WorkUnit

DEATH = (RayActorError, OutOfMemoryError, WorkerCrashedError)
"""What Ray raises when a replica's process is gone; out of memory when its memory monitor ended it."""
IN_FLIGHT = 2
"""Units queued at a replica: the next one starts without a round trip."""
MAX_DEATHS = 3
"""Replicas that one unit may kill, or that may die in a row while loading, before the run ends."""


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica needs to load."""

    model: ModelSource
    dtype: str
    device: str
    windows: Tensor
    threads: int
    num_gpus: int


@dataclass
class _Slot:
    """A place for a replica. Its actor may die and be replaced; the place and its name stay."""

    name: str
    actor: Any
    loading: Any
    """The reference of its `load` call; None once it is ready."""
    in_flight: dict[Any, WorkUnit] = field(default_factory=dict)


class RayScorer:
    """A fixed number of replicas. Leaving the context kills every actor."""

    def __init__(self, spec: ReplicaSpec, num_replicas: int, say: Callable[[str], None]) -> None:
        self.num_replicas = num_replicas
        self._spec = spec
        self._windows = ray.put(spec.windows)
        self._say = say
        self._deaths_while_loading = 0
        self._slots = [_Slot(f"replica-{index}", *self._spawn()) for index in range(num_replicas)]

    def __enter__(self) -> RayScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slot in self._slots:
            ray.kill(slot.actor)

    def wait_until_ready(self) -> None:
        """Until one replica is loaded; the others may still be on their way."""
        while all(slot.loading is not None for slot in self._slots):
            ready, _ = ray.wait([slot.loading for slot in self._slots if slot.loading is not None])
            for slot in self._slots:
                if slot.loading in ready:
                    self._finish_loading(slot)

    def is_batch_invariant(self, kernel: KernelShape) -> bool:
        """Ask the first replica that is ready."""
        for _ in range(MAX_DEATHS):
            self.wait_until_ready()
            slot = next(slot for slot in self._slots if slot.loading is None)
            try:
                return bool(_get(slot.actor.is_batch_invariant.remote(kernel)))
            except DEATH:
                self._replace(slot, deque(), Counter())
        raise SearchFailed(f"scoring a few masks killed {MAX_DEATHS} replicas; is there enough memory?")

    def use(self, kernel: KernelShape) -> None:
        self._kernel = kernel

    def run(self, units: Sequence[WorkUnit]) -> Iterator[UnitResult]:
        """Results as they come in. Raises what a unit raised; SearchFailed if a unit kills MAX_DEATHS replicas."""
        queue = deque(sorted(units, key=lambda unit: -unit.flops))  # stable, longest first
        deaths: Counter[WorkUnit] = Counter()
        while queue or any(slot.in_flight for slot in self._slots):
            self._fill(queue)
            waiting = [ref for slot in self._slots for ref in slot.in_flight]
            waiting += [slot.loading for slot in self._slots if slot.loading is not None]
            ready, _ = ray.wait(waiting)
            slot = next(slot for slot in self._slots if slot.loading == ready[0] or ready[0] in slot.in_flight)
            if slot.loading == ready[0]:
                self._finish_loading(slot)
                continue
            unit = slot.in_flight[ready[0]]
            try:
                sums, seconds = _get(ready[0])
            except DEATH:
                self._replace(slot, queue, deaths)
                continue
            del slot.in_flight[ready[0]]
            yield UnitResult(unit, sums, seconds, slot.name)

    def _fill(self, queue: deque[WorkUnit]) -> None:
        """Give every ready replica its units; at the end of the queue only one each, so that none waits behind a busy
        replica while another is idle."""
        for depth in range(IN_FLIGHT):
            for slot in self._slots:
                short = len(queue) < IN_FLIGHT * len(self._slots)
                if queue and slot.loading is None and len(slot.in_flight) == depth and not (depth and short):
                    unit = queue.popleft()
                    slot.in_flight[slot.actor.score.remote(unit, self._kernel)] = unit

    def _replace(self, slot: _Slot, queue: deque[WorkUnit], deaths: Counter[WorkUnit]) -> None:
        """The slot's actor died: a new one takes its place, and its units go back to the front of the queue.

        Only the first of them was running, so only that one is suspected of having killed it.
        """
        lost = list(slot.in_flight.values())
        if lost:
            deaths[lost[0]] += 1
            if deaths[lost[0]] >= MAX_DEATHS:
                raise SearchFailed(
                    f"windows {lost[0].first}..{lost[0].stop - 1} of masks {lost[0].masks[0]} ... {lost[0].masks[-1]} "
                    f"killed {MAX_DEATHS} replicas; is there enough memory?"
                )
        self._say(f"{slot.name} died; it is replaced, and {len(lost)} units are done again")
        queue.extendleft(reversed(lost))
        slot.in_flight.clear()
        ray.kill(slot.actor)
        slot.actor, slot.loading = self._spawn()

    def _spawn(self) -> tuple[Any, Any]:
        spec = self._spec
        # Replicas on a CPU must not see the GPUs: Ray hides them only from actors that asked for some.
        env_vars = {} if spec.num_gpus else {"CUDA_VISIBLE_DEVICES": ""}
        options = {"num_cpus": spec.threads, "num_gpus": spec.num_gpus, "runtime_env": {"env_vars": env_vars}}
        actor = ray.remote(Replica).options(**options).remote()
        return actor, actor.load.remote(spec.model, spec.dtype, spec.device, self._windows, spec.threads)

    def _finish_loading(self, slot: _Slot) -> None:
        try:
            pid = _get(slot.loading)
        except DEATH as error:
            self._deaths_while_loading += 1
            if self._deaths_while_loading >= MAX_DEATHS:
                raise SearchFailed(
                    f"{MAX_DEATHS} replicas died one after the other while loading {self._spec.model.name!r}; is there "
                    f"enough memory? The last one: {first_line(error)}"
                ) from error
            self._replace(slot, deque(), Counter())
            return
        self._deaths_while_loading = 0
        slot.loading = None
        self._say(f"{slot.name} is ready (process {pid})")


def _get(reference: Any) -> Any:
    """The result. What our code raised in the actor is raised here as itself."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
