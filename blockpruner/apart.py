"""Runs a function in its own process, so that its memory can be measured and each call can start its own Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import psutil

from blockpruner.cluster.session import interruptible, interrupts_ignored
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.showing.libraries import quiet_libraries

LOOK_S = 1.0
"""Seconds between two memory measurements."""
PATIENCE_S = 60.0
"""Seconds that an interrupted process has to clean up."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Apart(Generic[Result]):
    value: Result
    peak_memory_bytes: int
    """Largest host memory of the process and its children, sampled once per second. Shared pages are counted once."""


def run_apart(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Apart[Result]:
    """Call a function in a new process. The function must be importable from a module.

    Raises the UserError, SearchFailed or KeyboardInterrupt of the function. After any other exception the process
    prints the traceback, and SearchFailed is raised here.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function, args, kwargs))
    # Ctrl-C in a terminal also reaches the new process, which cannot clean up before its code runs.
    with interrupts_ignored([signal.SIGINT]), main_hidden():
        process.start()
    try:
        theirs.close()  # so that the pipe closes when the process ends
        peak = 0
        while not ours.poll(LOOK_S if peak else 0):
            peak = max(peak, _tree_bytes(process.pid))
        answer = ours.recv()
    except EOFError:
        raise SearchFailed(
            f"the process that ran {function.__name__} ended; if it printed no error above, the system may have killed "
            f"it because memory ran out."
        ) from None
    except KeyboardInterrupt:
        process.join(1.0)  # Ctrl-C in a terminal has also reached it
        if process.is_alive():
            process.terminate()
        process.join(PATIENCE_S)
        raise
    finally:
        with interrupts_ignored():
            process.join(PATIENCE_S)
            process.kill()
            process.join()
    if isinstance(answer, BaseException):
        raise answer
    return Apart(answer[0], peak)


@contextmanager
def main_hidden() -> Iterator[None]:
    """Prevent a process started in this context from running the caller's script again.

    The script may have no `__main__` guard. The process imports the functions that it calls from their modules.
    """
    main = sys.modules["__main__"]
    hidden = {name: value for name in ("__file__", "__spec__") if (value := getattr(main, name, None)) is not None}
    if "__file__" in hidden:
        del main.__file__
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


def _end_with_parent() -> None:
    """End this process when the parent ends for any reason, since nobody would read the result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _serve(pipe: Connection, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    quiet_libraries()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with interruptible():
            result = function(*args, **kwargs)
        with suppress(OSError):  # the parent may have ended
            pipe.send((result,))
    except (UserError, SearchFailed, KeyboardInterrupt) as error:
        with suppress(OSError):
            pipe.send(error)


def _tree_bytes(pid: int | None) -> int:
    total = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                memory = process.memory_full_info()
                total += getattr(memory, "pss", memory.uss)
    return total
