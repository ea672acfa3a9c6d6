"""Options for replicas."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from blockpruner.engine.errors import UserError
from blockpruner.engine.options import AutoInt, Options


class LocalReplicas(Options):
    """Replicas"""

    replicas: AutoInt = Field(default=None, ge=1, examples=["auto|N"])
    """Number of replicas (copies of the model) that work in parallel. auto: as many as fit."""
    threads_per_replica: int | None = Field(default=None, ge=1)
    """CPU threads per replica. Default: 1, or all with `no_ray`."""
    no_ray: bool = False
    """Run one replica in this process, without Ray."""

    @model_validator(mode="after")
    def _check_one_process(self) -> Self:
        if self.no_ray and (self.replicas or 1) > 1:
            raise UserError("`no_ray` cannot be combined with `replicas`: one process holds one replica.")
        return self


class Replicas(LocalReplicas):
    """Replicas"""

    address: str | None = None
    """Ray cluster to join: auto or host:port. Default: start a private Ray on this machine."""
    allow_mixed: bool = False
    """Allow nodes with different GPUs or CPUs in one run. Scores can then depend on which node computes them. Default:
    only the kind of GPU that gives the most replicas."""
    task_timeout_s: float = Field(default=60.0, ge=1)
    """Give up on a unit of work after this many seconds, or after 5 times its expected duration if that is longer."""
    resource_timeout_s: float = Field(default=60.0, ge=1)
    """Wait this many seconds for resources while the cluster has no room for a replica."""

    @model_validator(mode="after")
    def _check_address(self) -> Self:
        if self.no_ray and self.address is not None:
            raise UserError("`no_ray` cannot be combined with `address`: one process holds one replica.")
        return self


class PlacementChoice(StrEnum):
    AUTO = "auto"
    RESIDENT = "resident"
    STREAMED = "streamed"
    SHARDED = "sharded"


class Placing(Options):
    """Placement"""

    placement: PlacementChoice = PlacementChoice.AUTO
    """Where a replica keeps its weights. resident: all on one device; streamed: load layers from host memory or disk
    when they are needed; sharded: split layers over several GPUs; auto: the first of these that fits."""
    gpus_per_replica: int | None = Field(default=None, ge=1)
    """GPUs per replica. With more than one, the layers are split over them."""
