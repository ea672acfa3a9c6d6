"""Does a search of SmolLM2 give the same bits after faults, and how long does recovery take?

All faults are real: processes are killed or stopped, and nodes of a local Ray cluster are removed and added.

    python -m benchmarks.faults          # about 10 minutes on 2 cores
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import console, print_json, print_table, run_benchmark
from blockpruner.cluster.session import PRIVATE, QUIET
from blockpruner.searching.reading import read_events

WAIT_S = 300.0


class Run:
    """A search in its own process."""

    def __init__(
        self, folder: Path, name: str, options: list[str], environment: dict[str, str], model: str = "smollm2"
    ) -> None:
        self.out = folder / name.replace(" ", "-")
        self.environment = environment
        self.command = [
            sys.executable, "-m", "blockpruner", "search", model, "--calibration", "builtin", "--num-samples", "16",
            "--seq-len", "64", "--num-windows", "8", "--num-remove", "2", "--out", str(self.out), "--json", *options,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )

    def wait_for(self, condition: Callable[[], bool]) -> float:
        """Wait until the condition holds, and return the seconds that it took."""
        start = time.monotonic()
        while not condition():
            if self.process.poll() is not None or time.monotonic() - start > WAIT_S:
                self.process.kill()
                raise RuntimeError(f"{self.out.name}: it did not come to that: {self.process.communicate()[1]}")
            time.sleep(0.02)
        return time.monotonic() - start

    def units(self, replica: str = "", after_s: float = 0.0) -> int:
        return sum(
            event["type"] == "unit" and replica in event["replica"] and event["stop_s"] > after_s
            for event in read_events(self.out)
        )

    def said(self, text: str, after_s: float = 0.0) -> bool:
        events = read_events(self.out)
        return any(event["type"] == "note" and text in event["text"] and event["at_s"] > after_s for event in events)

    def replicas(self) -> list[psutil.Process]:
        return replicas_of(self.process.pid)

    def result(self) -> Any:
        """Return the part of the result that must not depend on faults."""
        stdout, stderr = self.process.communicate(timeout=WAIT_S)
        if self.process.returncode:
            raise RuntimeError(f"{self.out.name} ended with {self.process.returncode}: {stderr}")
        summary = json.loads(stdout.splitlines()[-1])
        return summary["dense"], [(step["block"], step["nll"]) for step in summary["steps"]]


def replicas_of(pid: int) -> list[psutil.Process]:
    """Return the processes of replicas among all that a process has started."""
    found = []
    for one in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):  # it ended while it was looked at
            if any("ray::ReplicaActor" in word for word in one.cmdline()):
                found.append(one)
    return found


def replica_killed(run: Run, times: int = 1) -> float:
    run.wait_for(lambda: run.units() >= 3)
    recovered_s = 0.0
    for _ in range(times):
        run.wait_for(lambda: len(run.replicas()) == 2)
        at_s = time.time()
        run.replicas()[0].kill()
        recovered_s = run.wait_for(lambda at_s=at_s: run.said("is ready", at_s))  # type: ignore[misc]
    return recovered_s


def replica_killed_while_loading(run: Run) -> float:
    run.wait_for(lambda: len(run.replicas()) == 2)
    at_s = time.time()
    run.replicas()[0].kill()
    recovered_s = run.wait_for(lambda: run.said("it is replaced", at_s))
    ready = "on 127.0.0.1 is ready"
    return recovered_s + run.wait_for(lambda: run.said(f"replica-0 {ready}") and run.said(f"replica-1 {ready}"))


def replica_stopped(run: Run) -> float:
    run.wait_for(lambda: run.units() >= 3)
    at_s = time.time()
    run.replicas()[0].send_signal(signal.SIGSTOP)
    limit_s = run.wait_for(lambda: run.said("no result within", at_s))
    console.print(f"given up after {limit_s:.1f} s")
    return run.wait_for(lambda: run.said("is ready", at_s))


def driver_killed(run: Run) -> float:
    run.wait_for(lambda: run.units() >= 5)
    family = psutil.Process(run.process.pid).children(recursive=True)
    run.process.kill()
    run.process.communicate()
    psutil.wait_procs([one for one in family if "Replica" in one.name()], timeout=30)
    at_s = time.time()
    run.start()
    return run.wait_for(lambda: run.units(after_s=at_s) >= 1)


def interrupted_twice(run: Run) -> float:
    run.wait_for(lambda: run.units() >= 5)
    family = psutil.Process(run.process.pid).children(recursive=True)
    start = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    run.process.send_signal(signal.SIGINT)
    run.process.communicate()
    _, alive = psutil.wait_procs(family, timeout=30)
    ended_s = time.monotonic() - start
    if run.process.returncode != 130 or alive:
        raise RuntimeError(f"exit code {run.process.returncode}, still alive: {alive}")
    run.start()
    return ended_s


@contextmanager
def cluster_of(num_nodes: int) -> Iterator[tuple[Any, list[Any]]]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster, [cluster.add_node(num_cpus=1) for _ in range(num_nodes)]
    finally:
        cluster.shutdown()


def node_lost(run: Run, cluster: Any, node: Any) -> float:
    run.wait_for(lambda: bool(run.units("replica-0") and run.units("replica-1")))
    at_s = time.time()
    cluster.remove_node(node, allow_graceful=False)
    return run.wait_for(lambda: run.said("units will run again", at_s) or run.said("is gone", at_s))


def node_joins(run: Run, cluster: Any) -> float:
    run.wait_for(lambda: run.units() >= 3)
    start = time.monotonic()
    cluster.add_node(num_cpus=1)
    run.wait_for(lambda: run.units("replica-1") >= 1)
    return time.monotonic() - start


def main() -> None:
    os.environ.update({**QUIET, **PRIVATE})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = {name: value for name, value in environment.items() if name not in PRIVATE}
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        expected = Run(folder, "undisturbed", ["--replicas", "1"], alone).result()

        def one(name: str, options: list[str], use: dict[str, str], fault: Callable[[Run], float], what: str) -> None:
            run = Run(folder, name, options, use)
            seconds = fault(run)
            rows.append([name, what, seconds, run.result() == expected])
            console.print(f"{name}: {seconds:.1f} s, same bits: {rows[-1][3]}")

        two = ["--replicas", "2", "--task-timeout-s", "10"]
        one("replica killed while scoring", two, alone, replica_killed, "until its successor is ready")
        one("killed twice in a row", two, alone, lambda run: replica_killed(run, 2), "until its successor is ready")
        one("replica killed while loading", two, alone, replica_killed_while_loading, "until both are ready")
        one("replica hangs (SIGSTOP)", two, alone, replica_stopped, "from giving it up until its successor is ready")
        one("driver killed (SIGKILL)", two, alone, driver_killed, "from the same command to its first unit")
        one("Ctrl-C twice", two, alone, interrupted_twice, "until no process is left; then resumed")
        with cluster_of(2) as (cluster, nodes):
            options = ["--address", cluster.address]
            lose: Callable[[Run], float] = lambda run: node_lost(run, cluster, nodes[0])  # noqa: E731
            one("node lost", options, environment, lose, "until its units are given to others")
        with cluster_of(1) as (cluster, _):
            options = ["--address", cluster.address]
            one("node joins", options, environment, lambda run: node_joins(run, cluster), "until its first unit")
    print_table("faults", ["fault", "measured", "seconds", "same bits"], rows)
    figures = [
        {"fault": name, "measured": what, "seconds": seconds, "same": same} for name, what, seconds, same in rows
    ]
    print_json({"faults": figures})


if __name__ == "__main__":
    run_benchmark(main)
