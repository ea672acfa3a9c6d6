"""A model in a process of its own: what one model costs in memory cannot be seen where there are two."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from blockpruner.cluster.session import interrupts_ignored
from blockpruner.engine.errors import SearchFailed, UserError, first_line
from blockpruner.engine.judge.latency import Generation, Memory, Speeds, Workload, memory
from blockpruner.engine.model.loading import ModelSource, load_model
from blockpruner.engine.scoring.scoring import is_out_of_memory
from blockpruner.showing.console import quiet_libraries


class ModelProcess:
    """Loads, and generates when it is told to. Raises the UserError that the process raised, or SearchFailed."""

    def __init__(self, name: str, pipe: Connection) -> None:
        self._name = name
        self._pipe = pipe

    def wait_until_loaded(self) -> None:
        self._answer()

    def generate(self) -> Speeds:
        return self._answer("generate")

    def memory(self) -> Memory:
        return self._answer("memory")

    def _answer(self, request: str | None = None) -> Any:
        try:
            if request is not None:
                self._pipe.send(request)
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise SearchFailed(
                f"the process that measured {self._name!r} ended; if it says nothing above, the system may have killed "
                f"it because the memory was full."
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def model_process(
    source: ModelSource, dtype: str, device: torch.device, threads: int, workload: Workload
) -> Iterator[ModelProcess]:
    """Starts the process, which begins to load its model; at the end it is killed, whatever it does."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, source, dtype, device, threads, workload))
    with interrupts_ignored():  # they reach the whole process group: it is for us to end the process
        process.start()
    try:
        theirs.close()  # so that the process's end is the pipe's
        yield ModelProcess(source.name, ours)
    finally:
        with interrupts_ignored():
            process.kill()
            process.join()


def serve(
    pipe: Connection, source: ModelSource, dtype: str, device: torch.device, threads: int, workload: Workload
) -> None:
    """What the process does until nobody listens any more."""
    quiet_libraries()
    torch.set_num_threads(threads)
    with suppress(EOFError, ConnectionError):
        try:
            model = load_model(source, dtype, device)
            generation = Generation(model, workload)
            pipe.send(None)
            while True:
                pipe.send(generation() if pipe.recv() == "generate" else memory(model, source))
        except (UserError, SearchFailed) as error:
            pipe.send(error)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            pipe.send(SearchFailed(f"{source.name!r} does not fit the device's memory: {first_line(error)}"))
