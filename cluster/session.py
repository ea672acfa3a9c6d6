"""Starting or joining Ray, safely, and leaving nothing behind.

`import ray` must not happen before `ray_session` has set the environment: some switches are read at import.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from blockpruner.engine.errors import UserError

CONNECT_TIMEOUT_S = 10.0
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
OBJECT_STORE_BYTES = 128 * 2**20
"""Weights are mapped from files and masks are tiny: only the calibration tokens lie in the object store."""

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SCHEDULER_EVENTS": "0"}
PRIVATE = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # one a process: Ray reads it once
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # in spite of its name: loopback only
}


@contextmanager
def ray_session(address: str | None, num_cpus: int = 1, num_gpus: int = 0) -> Iterator[None]:
    """A Ray of our own for this machine with so many CPUs and GPUs, or a connection to the cluster at `address`.

    Our own listens on loopback only, demands a random token, keeps its files in a private folder that is removed at the
    end, and reports no usage statistics.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)  # as Ray does; but then it is checked
    if address is not None and address.startswith("ray://"):
        raise UserError(
            "expected the address of a Ray cluster (auto or host:port), got a Ray Client address; run the "
            "command on the cluster instead, with `ray job submit` or `ray submit`."
        )
    if address is not None and address != "auto":
        _check_reachable(address)
    previous = dict(os.environ)
    os.environ.update(QUIET if address is not None else {**QUIET, **PRIVATE})
    import ray

    private = None
    try:
        if address is None:
            # Ray opens its own folder to everybody, so it gets one inside a folder that is ours alone.
            private = tempfile.mkdtemp(prefix="bp-")
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=os.path.join(private, "ray"),
            )
        else:
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"cannot join the Ray cluster at {address!r}: {reason}") from error
        with interruptible():  # once more: ray.init sets a SIGTERM handler of its own
            yield
    finally:
        with interrupts_ignored():
            ray.shutdown()
            if private is not None:
                shutil.rmtree(private, ignore_errors=True)
            os.environ.clear()
            os.environ.update(previous)


@contextmanager
def demand(num_cpus: int, num_gpus: int, num_replicas: int) -> Iterator[None]:
    """Ask the cluster's autoscaler, if it has one, for room for replicas; take the request back at the end, since it
    would keep the nodes up for ever."""
    from ray.autoscaler.sdk import request_resources

    bundle = {"CPU": num_cpus, **({"GPU": num_gpus} if num_gpus else {})}
    request_resources(bundles=[bundle] * num_replicas)
    try:
        yield
    finally:
        with interrupts_ignored():
            request_resources(bundles=[])


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(
            f"expected --address auto or host:port, got {address!r} (RAY_ADDRESS in the environment counts as "
            f"--address; --no-ray, or `env -u RAY_ADDRESS`, does without)."
        )
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"cannot reach a Ray cluster at {address!r} ({error}); is it running, and is this its head's address?"
        ) from error


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt here, also where a shell made us ignore SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_ignored(numbers: Sequence[int] = INTERRUPTS) -> Iterator[None]:
    """Cleaning up must not be cut short by a second Ctrl-C. A process that is started here ignores them for good."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
