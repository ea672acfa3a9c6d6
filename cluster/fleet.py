"""Runs replicas as Ray actors, each pinned to a node. Import this module only inside `session.ray_session`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from blockpruner.cluster.actor import ReplicaActor
from blockpruner.cluster.fleet_protocol import ReplicaDied
from blockpruner.cluster.nodes import Needs, Node
from blockpruner.cluster.preflight import Survey, survey
from blockpruner.cluster.session import KIND_LABEL
from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.scoring.replica import ReplicaSpec
from blockpruner.engine.sections import ModelSource

DEATH = (RayActorError, ActorUnschedulableError, OutOfMemoryError, WorkerCrashedError)
"""Exceptions of Ray for a replica whose process or node is gone. Its memory monitor causes OutOfMemoryError."""
SURVEY_TIMEOUT_S = 120.0


def cluster_nodes() -> list[Node]:
    """Return the live nodes of the cluster that Ray has joined."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    addresses = Counter(node["NodeManagerAddress"] for node in alive)
    return [_node(node, is_alone=addresses[node["NodeManagerAddress"]] == 1) for node in alive]


def _node(node: dict[str, Any], *, is_alone: bool) -> Node:
    address, node_id, resources = node["NodeManagerAddress"], node["NodeID"], node["Resources"]
    return Node(
        id=node_id,
        name=address if is_alone else f"{address}/{node_id[-6:]}",
        num_cpus=int(resources.get("CPU", 0)),
        num_gpus=int(resources.get("GPU", 0)),
        memory_bytes=int(resources.get("memory", 0)),
        kind=node["Labels"].get(KIND_LABEL, ""),
    )


def survey_nodes(nodes: Sequence[Node], model: ModelSource, device: str) -> dict[str, Survey]:
    """Survey each node and return the results by node name.

    The tasks take no resources, so that they run on busy nodes. Their processes end afterwards, so that they keep no
    GPU memory.
    """
    task = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(survey)
    asked = {node.name: task.options(label_selector=_on(node)).remote(model, device) for node in nodes}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=SURVEY_TIMEOUT_S)
    found, silent = {}, {}
    for name, reference in asked.items():
        try:
            found[name] = ray.get(reference, timeout=0)
        except RayTaskError as error:
            cause = first_line(error.cause) if error.cause else first_line(error)
            raise UserError(f"node {name} cannot run this program: {cause}; install the same version there.") from error
        except ray.exceptions.GetTimeoutError:
            silent[name] = f"no answer within {SURVEY_TIMEOUT_S:.0f} s"
        except ray.exceptions.RayError as error:
            silent[name] = first_line(error)
    if silent:
        told = "; ".join(f"{name}: {reason}" for name, reason in silent.items())
        raise UserError(
            f"{len(silent)} of {len(asked)} nodes do not answer ({told}); are they still running, and can they be "
            f"reached from here?"
        )
    return found


class RayFleet:
    """Implements `fleet_protocol.Fleet`."""

    def __init__(
        self,
        spec: ReplicaSpec,
        data: Any,
        needs: Needs,
        expected: Survey | None,
        *,
        allow_mixed: bool = False,
        kind: str | None = None,
    ) -> None:
        """expected: the survey that a node must match if it joins later; None if no node can join.

        kind: nodes with other GPUs are not used; None for any.
        """
        self._spec = spec
        self._data = ray.put(data)
        self._needs = needs
        self._expected = expected
        self._allow_mixed = allow_mixed
        self._kind = kind
        self._shared: tuple[Any, Any] | None = None
        """What the last units share, and its reference."""
        self._began = time.time() - time.monotonic()  # a changed clock or a suspended laptop must not time out replicas

    def nodes(self) -> list[Node]:
        return [node for node in cluster_nodes() if self._kind in (None, node.kind)]

    def start(self, node: Node) -> tuple[Any, Any]:
        # Replicas on a CPU must not see the GPUs. Ray hides GPUs only from actors that requested some. A private Ray
        # hides them from all of its processes: an actor with variables of its own could take none of those that wait.
        hide = self._expected is not None and not self._needs.num_gpus
        runtime_env = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}} if hide else None
        actor = (
            ray.remote(ReplicaActor)
            .options(
                num_cpus=self._needs.num_cpus,
                num_gpus=self._needs.num_gpus,
                runtime_env=runtime_env,
                label_selector=_on(node),
            )
            .remote()
        )
        return actor, actor.placed.remote()

    def load(self, handle: Any) -> Any:
        spec: Any = self._spec
        if self._expected is not None:
            spec = handle.check.remote(self._spec, self._expected, allow_mixed=self._allow_mixed)
        return handle.load.remote(spec, self._data)

    def score(self, handle: Any, unit: Any) -> Any:
        shared = getattr(unit, "shared", None)
        if shared is None:
            return handle.score.remote(unit)
        if self._shared is None or self._shared[0] is not shared:
            self._shared = shared, ray.put(shared)
        # In a list, Ray passes on the reference, and the actor gets the object once instead of for each unit.
        return handle.score.remote(replace(unit, shared=None), [self._shared[1]])

    def free_bytes(self, handle: Any) -> Any:
        return handle.free_bytes.remote()

    def wait(self, references: Sequence[Any], timeout_s: float) -> Any | None:
        if not references:
            time.sleep(timeout_s)
            return None
        ready, _ = ray.wait(list(references), timeout=timeout_s)
        return ready[0] if ready else None

    def result(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except DEATH as error:
            raise ReplicaDied(first_line(error), out_of_memory=isinstance(error, OutOfMemoryError)) from error
        except RayTaskError as error:  # raise the original exception from the actor
            raise error.cause from error

    def stop(self, handle: Any) -> None:
        ray.kill(handle)

    def now(self) -> float:
        return self._began + time.monotonic()


def _on(node: Node) -> dict[str, str]:
    return {"ray.io/node-id": node.id}
