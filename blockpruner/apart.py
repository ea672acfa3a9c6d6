"""A function in a process of its own: so what it takes can be seen, and each call may start a Ray of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import psutil

from blockpruner.cluster.session import interruptible, interrupts_ignored
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.showing.console import quiet_libraries

LOOK_S = 1.0
"""Between two looks at the memory."""
PATIENCE_S = 60.0
"""In which an interrupted process must have cleaned up."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Apart(Generic[Result]):
    value: Result
    peak_memory_bytes: int
    """Host memory of the process and of all that it started, pages that several share counted once: the largest of the
    values seen, one a second."""


def run_apart(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Apart[Result]:
    """Call a function of some module in a new process. Raises the UserError, SearchFailed or KeyboardInterrupt that it
    raises; of a bug the process shows the traceback, and SearchFailed is raised here."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function, args, kwargs))
    # A terminal's Ctrl-C reaches the new process, too, which can only clean up once it has begun.
    with interrupts_ignored([signal.SIGINT]):
        process.start()
    try:
        theirs.close()  # so that the process's end is the pipe's
        peak = 0
        while not ours.poll(LOOK_S if peak else 0):
            peak = max(peak, _tree_bytes(process.pid))
        answer = ours.recv()
    except EOFError:
        raise SearchFailed(
            f"the process that ran {function.__name__} ended; if it says nothing above, the system may have killed it "
            f"because the memory was full."
        ) from None
    except KeyboardInterrupt:
        process.join(1.0)  # a terminal's Ctrl-C has reached it, too
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


def _end_with_parent() -> None:
    """However the parent ends: nobody would take the result."""
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
        with suppress(OSError):  # the parent may be gone
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
