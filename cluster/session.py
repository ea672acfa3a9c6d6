"""Starts or joins Ray safely, and cleans up afterwards.

Do not `import ray` before `ray_session` has set the environment: Ray reads some variables at import.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext, suppress
from types import FrameType

from blockpruner.engine.errors import SearchFailed, UserError, first_line

CONNECT_TIMEOUT_S = 10.0
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
OBJECT_STORE_BYTES = 128 * 2**20
"""Room for the calibration tokens. Weights are mapped from files, and masks are tiny."""
SHORT_FOLDER = "/tmp"
LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
LONGEST_FOLDER = LONGEST_SOCKET - len(
    "/bp-12345678/ray/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store"
)
"""Bytes of the folder in which Ray's private folder fits."""

KIND_LABEL = "ray.io/accelerator-type"
"""The label in which Ray keeps the kind of a node's GPUs."""

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SCHEDULER_EVENTS": "0"}
PRIVATE = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # one token per process: Ray reads it once
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name, this makes Ray listen on loopback only
}


@contextmanager
def ray_session(
    address: str | None,
    num_cpus: int = 1,
    num_gpus: int = 0,
    result_bytes: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
    """Start a private Ray on this machine with the given CPUs and GPUs, or join the cluster at `address`.

    num_gpus: if there are none, no process of this Ray sees a GPU.
    result_bytes: room for results of units, beside the calibration tokens. What does not fit goes to the disk.
    say: told if the private folder does not lie in TMPDIR.

    The private Ray listens on loopback only, requires a random token, keeps its files in a private folder that is
    removed at the end, and reports no usage statistics.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)  # as Ray does, but here the address is checked
    if address is not None and address.startswith("ray://"):
        raise UserError(
            "expected the address of a Ray cluster (auto or host:port), got a Ray Client address; run the "
            "command on the cluster instead, with `ray job submit` or `ray submit`."
        )
    if address is not None and address != "auto":
        _check_reachable(address)
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        raise UserError(
            "Ray is already running in this process; call ray.shutdown() first, or use another process and pass the "
            "`address` of this Ray."
        )
    # Ray makes its folder readable for everybody, so it is created inside a private folder.
    private = tempfile.mkdtemp(prefix="bp-") if address is not None else _private_folder(say)
    previous = dict(os.environ)
    os.environ.update(QUIET if address is not None else {**QUIET, **PRIVATE})
    try:
        import ray

        # Ray puts the current folder first on the path of every worker, where a torch.py would hide torch.
        with chdir(private):
            if address is None:
                try:
                    with _hidden_gpus() if num_gpus == 0 else nullcontext():
                        ray.init(
                            address="local",
                            num_cpus=num_cpus,
                            num_gpus=num_gpus,
                            include_dashboard=False,
                            log_to_driver=False,
                            logging_level="ERROR",
                            object_store_memory=OBJECT_STORE_BYTES + result_bytes,
                            _temp_dir=os.path.join(private, "ray"),
                        )
                except (OSError, RuntimeError) as error:  # what the system refuses to Ray's processes
                    raise SearchFailed(
                        f"Ray could not start on this machine ({type(error).__name__}: {first_line(error)}); make room "
                        f"in its memory and in {os.path.dirname(private)!r}, or use `no_ray`."
                    ) from error
            else:
                try:
                    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
                except (ConnectionError, ValueError, RuntimeError) as error:
                    reason = " ".join(str(error).split())
                    raise UserError(
                        f"cannot join the Ray cluster at {address!r}; it must run Ray {ray.__version__}, as this "
                        f"process does, and know its token, if it has one. Ray says: {reason}"
                    ) from error
        with interruptible():  # again, since ray.init installs its own SIGTERM handler
            yield
    finally:
        with interrupts_ignored():
            if "ray" in sys.modules:
                sys.modules["ray"].shutdown()
            shutil.rmtree(private, ignore_errors=True)
            os.environ.clear()
            os.environ.update(previous)


@contextmanager
def _hidden_gpus() -> Iterator[None]:
    """Hide the GPUs from processes that are started in this context, and from those that they start later."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _private_folder(say: Callable[[str], None]) -> str:
    """Create a folder for Ray where the names of its sockets fit: in TMPDIR, else in /tmp."""
    usual = tempfile.gettempdir()
    tried = dict.fromkeys([usual, SHORT_FOLDER])
    for folder in tried:
        if len(os.fsencode(folder)) <= LONGEST_FOLDER:
            with suppress(OSError):
                private = tempfile.mkdtemp(prefix="bp-", dir=folder)
                if folder != usual:
                    say(f"note: Ray's temporary files go to {private}, since {usual} is too long for names of sockets")
                return private
    raise UserError(
        f"Ray needs a folder for temporary files with a path of at most {LONGEST_FOLDER} bytes, because sockets lie in "
        f"it, and found none that can be written to ({' and '.join(tried)} were tried); set TMPDIR to one, or use "
        f"`no_ray`."
    )


@contextmanager
def demand(num_cpus: int, num_gpus: int, num_replicas: int, kind: str | None = None) -> Iterator[None]:
    """Request resources for the replicas from the autoscaler of the cluster, if there is one.

    The request is withdrawn at the end, because it would keep the nodes running forever.

    kind: of GPU; None for any.
    """
    from ray.autoscaler.sdk import request_resources

    bundle = {"CPU": num_cpus, **({"GPU": num_gpus} if num_gpus else {})}
    selector = {KIND_LABEL: kind} if kind else {}
    request_resources(bundles=[bundle] * num_replicas, bundle_label_selectors=[selector] * num_replicas)
    try:
        yield
    finally:
        with interrupts_ignored():
            request_resources(bundles=[])


def _check_reachable(address: str) -> None:
    """Raise UserError if nothing listens at the address. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(
            f"expected `address` auto or host:port, got {address!r} (the environment variable RAY_ADDRESS counts as "
            f"`address`; use `no_ray` to ignore it)."
        )
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"cannot reach a Ray cluster at {address!r} ({error}); is it running, and is this the address of its head "
            f"node?"
        ) from error


@contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt, even if the shell made this process ignore SIGINT."""
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
    """Ignore interrupts, so that a second Ctrl-C does not stop the cleanup.

    A process that is started inside this context ignores them permanently.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
