"""A Ray cluster of several nodes on this machine that loses nodes, gains them, and loses its driver."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from blockpruner.cluster.metrics import COUNTED, SHOWN
from blockpruner.cluster.session import PRIVATE, QUIET
from tests.processes import REPOSITORY, command, facts, num_units, wait_for

FAST = {
    "metrics_report_interval_ms": 1000,
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
METRICS = {f"{name}_total" for name in COUNTED} | SHOWN.keys()


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """As of a private Ray: loopback only, one token for all."""
    previous = dict(os.environ)
    os.environ.update({**QUIET, **PRIVATE})
    yield dict(os.environ)
    os.environ.clear()
    os.environ.update(previous)


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[Any]:
    """A head without resources. Nodes come and go in the tests."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": FAST}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def with_a_node(cluster: Any) -> Any:
    """The cluster with the node that `story` leaves, or with a new one where its tests are left out."""
    if not cluster.worker_nodes:
        cluster.add_node(num_cpus=1)
    return cluster


def start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment
    )


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    return process.communicate(timeout=240)


def replicas_of(run: Path) -> set[str]:
    events = run / "events.jsonl"
    text = events.read_text() if events.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]  # it is being written
    return {line["replica"] for line in lines if line["type"] == "unit"}


def exported(cluster: Any, run: Path) -> dict[str, float]:
    """What Prometheus would read about a run at the node of its driver."""
    url = f"http://127.0.0.1:{cluster.head_node.metrics_export_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r'^ray_blockpruner_(\w+)\{.*\brun="(.*)"\} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, of_run, value in found if of_run == str(run)}


@pytest.fixture(scope="module")
def story(
    cluster: Any, environment: dict[str, str], slow_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """One run: on one node; another one joins; the first is lost in mid-step; the driver is killed; the run is resumed
    on what is left."""
    run = tmp_path_factory.mktemp("faults") / "run"
    options = ["--address", cluster.address, "--resource-timeout-s", "60", "--num-remove", "8"]
    arguments = command(slow_model, run, *options)
    first = cluster.add_node(num_cpus=1)
    process = start(arguments, environment)
    wait_for(lambda: "replica-0" in replicas_of(run), process)
    cluster.add_node(num_cpus=1)
    wait_for(lambda: "replica-1" in replicas_of(run), process)
    cluster.remove_node(first, allow_graceful=False)
    wait_for(lambda: "is lost" in (run / "events.jsonl").read_text(), process)
    metrics: dict[str, float] = {}

    def are_exported() -> bool:
        metrics.update(exported(cluster, run))
        return metrics.keys() >= METRICS

    wait_for(are_exported, process)
    process.send_signal(signal.SIGKILL)
    killed, _ = end(process)
    process = start([*arguments, "--json"], environment)
    resumed, stderr = end(process)
    assert process.returncode == 0, stderr
    return {"run": run, "killed": killed, "resumed": resumed, "metrics": metrics}


class TestNodes:
    def test_a_lost_node_a_joined_node_and_a_killed_driver_do_not_change_a_bit(
        self, story: dict[str, Any], undisturbed: dict[str, Any]
    ) -> None:
        assert facts(json.loads(story["resumed"].splitlines()[-1]), 3) == facts(undisturbed)

    def test_what_was_chosen_and_what_happened_is_said(self, story: dict[str, Any]) -> None:
        assert re.search(r"replicas of 1 CPU thread and \S+ GiB: 1 have a place, nodes: 1;", story["killed"])
        assert "replica-1 starts on" in story["killed"]
        assert "replica-0 is lost: its node" in story["killed"]
        assert "1 have a place, nodes: 1;" in story["resumed"]

    def test_prometheus_reads_how_the_run_goes(self, story: dict[str, Any]) -> None:
        metrics = story["metrics"]
        assert metrics.keys() == METRICS
        lines = [json.loads(line) for line in (story["run"] / "ledger.jsonl").read_text().splitlines()]
        assert metrics["deaths_total"] == 1
        assert metrics["replicas"] == 1
        assert metrics["queue_length"] >= 0
        assert 1 <= metrics["units_done_total"] <= sum(line["type"] == "unit" for line in lines)
        assert metrics["windows_done_total"] >= 1
        assert metrics["best_perplexity"] in [line["perplexity"] for line in lines if line["type"] == "step"]

    def test_the_timeline_has_every_unit_of_the_run(self, story: dict[str, Any]) -> None:
        lines = [json.loads(line) for line in (story["run"] / "events.jsonl").read_text().splitlines()]
        units = [line for line in lines if line["type"] == "unit"]
        ledger = [json.loads(line) for line in (story["run"] / "ledger.jsonl").read_text().splitlines()]
        assert len(units) == sum(line["type"] == "unit" for line in ledger)
        assert all(line["stop_s"] > line["start_s"] > 1.7e9 for line in units)
        assert any(line["type"] == "note" and "is ready" in line["text"] for line in lines)


@pytest.mark.slow
def test_two_ctrl_c_end_a_run_on_a_cluster_in_one_line_and_leave_no_replica(
    with_a_node: Any, environment: dict[str, str], slow_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(command(slow_model, run, "--address", with_a_node.address), environment)
    wait_for(lambda: num_units(run, step=1) >= 1, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = end(process)
    assert process.returncode == 130
    assert stderr.splitlines() == ["stopped; run the same command again to resume"]
    deadline = time.monotonic() + 15
    while [
        one for one in psutil.process_iter(["cmdline"]) if "ray::ReplicaActor" in " ".join(one.info["cmdline"] or [])
    ]:
        assert time.monotonic() < deadline, "a replica outlived its driver"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda", "--resource-timeout-s", "1"], r"no resources: a replica needs 1 GPU and 1 CPU thread"),
        pytest.param(["--threads-per-replica", "64"], r"--threads-per-replica of at most 1", marks=pytest.mark.slow),
    ],
)
def test_resources_that_the_cluster_lacks_are_named_in_one_line(
    with_a_node: Any,
    environment: dict[str, str],
    slow_model: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    process = start(command(slow_model, tmp_path / "run", "--address", with_a_node.address, *options), environment)
    _, stderr = end(process)
    assert process.returncode == 2
    assert len(stderr.splitlines()) == 1
    assert message in stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # takes a minute, on GPUs that Ray only believes in
def test_replicas_get_gpus_of_their_own_and_never_span_nodes_or_kinds_of_gpu(
    cluster: Any, environment: dict[str, str], slow_model: Path, tmp_path: Path
) -> None:
    gpus = {"T4": 1, "A100": 2}
    nodes = [
        cluster.add_node(num_cpus=4, num_gpus=number, labels={"ray.io/accelerator-type": kind})
        for kind, number in gpus.items()
    ]
    try:
        program = [sys.executable, "-m", "tests.cluster.logical_gpus", cluster.address, str(slow_model)]
        process = start(program, environment)
        stdout, stderr = end(process)
        assert process.returncode == 0, stderr
        found = json.loads(stdout.splitlines()[-1])
        assert found["1 each"] == ["(0)", "(0)", "(1)"]
        assert found["2 each"] == ["(0,1)"]
        assert found["one kind"] == ["(0)", "(1)"]
        assert [note.partition(";")[0] for note in found["notes"]] == [
            "note: only nodes with GPUs of kind A100 are used, which hold 2 replicas (others: T4 1)"
        ]
        options = ["--address", cluster.address, "--device", "cuda", "--gpus-per-replica", "3"]
        process = start(command(slow_model, tmp_path / "run", *options), environment)
        _, stderr = end(process)
        assert process.returncode == 2
        assert stderr.startswith("error: expected --gpus-per-replica of at most 2, the GPUs of the largest node")
    finally:
        for node in nodes:
            cluster.remove_node(node)


def test_a_cluster_of_another_ray_version_is_refused_in_one_line(
    cluster: Any, environment: dict[str, str], slow_model: Path, tmp_path: Path
) -> None:
    program = "import ray; ray.__version__ = '2.59.0'; from blockpruner.cli import main; main()"
    arguments = command(slow_model, tmp_path / "run", "--address", cluster.address)
    process = start([sys.executable, "-c", program, *arguments[3:]], environment)
    _, stderr = end(process)
    assert process.returncode == 2
    assert len(stderr.splitlines()) == 1
    assert "2.59.0" in stderr
