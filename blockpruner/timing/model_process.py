"""Runs one model in its own process, so that its memory can be measured separately."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from blockpruner.apart import main_hidden
from blockpruner.cluster.session import interrupts_ignored
from blockpruner.engine.errors import SearchFailed, UserError, first_line
from blockpruner.engine.judge.latency import Generation, Memory, Speeds, memory
from blockpruner.engine.judge.workload import Workload
from blockpruner.engine.model.full_memory import is_out_of_memory
from blockpruner.engine.model.loading import load_model
from blockpruner.engine.sections import ModelSource
from blockpruner.showing.libraries import quiet_libraries


class ModelProcess:
    """Loads a model, and generates on request. Raises the UserError of the process, or SearchFailed."""

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
                f"the process that measured {self._name!r} ended; if it printed no error above, the system may have "
                f"killed it because memory ran out."
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def model_process(
    source: ModelSource, dtype: str, device: torch.device, threads: int, workload: Workload
) -> Iterator[ModelProcess]:
    """Start the process, which begins to load its model. The process is killed at the end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, source, dtype, device, threads, workload))
    with main_hidden(), interrupts_ignored():  # interrupts reach the whole process group, but only we end this process
        process.start()
    try:
        theirs.close()  # so that the pipe closes when the process ends
        yield ModelProcess(source.name, ours)
    finally:
        with interrupts_ignored():
            process.kill()
            process.join()


def serve(
    pipe: Connection, source: ModelSource, dtype: str, device: torch.device, threads: int, workload: Workload
) -> None:
    """Serve requests in the process until the pipe closes."""
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
            pipe.send(SearchFailed(f"{source.name!r} does not fit into device memory: {first_line(error)}"))
