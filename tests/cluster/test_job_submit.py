"""`ray job submit` to a Ray that runs on this machine as a cluster would: a head of its own, a dashboard, a token."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

RAY = Path(sys.executable).with_name("ray")
OPTIONS = ["--seq-len", "16", "--num-samples", "20", "--dtype", "float32", "--num-remove", "1", "--replicas", "1"]


@dataclass(frozen=True)
class Cluster:
    dashboard: str
    environment: dict[str, str]

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m blockpruner arguments` on the cluster, as a user does from elsewhere, and wait for it."""
        entrypoint = [sys.executable, "-m", "blockpruner", *arguments]
        return subprocess.run(
            [RAY, "job", "submit", "--address", self.dashboard, "--", *entrypoint],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120,
        )  # fmt: skip


def free_ports(number: int) -> list[str]:
    """Ports that nobody has. The system gives them from above 32767; Ray's usual ones lie below."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


def wait_for_dashboard(url: str, token: str, process: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"{url}/api/version", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except urllib.error.HTTPError:
            raise
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"Ray did not start: {log.read_text()}")
            time.sleep(0.2)


def end(process: subprocess.Popen[bytes]) -> list[str]:
    """SIGTERM to `ray start --block` ends that Ray; `ray stop` would end every Ray of the machine. Returns what was
    left and had to be killed."""
    if process.poll() is not None:
        return []
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, alive = psutil.wait_procs([psutil.Process(process.pid), *family], timeout=30)
    names = [member.name() for member in alive]
    for member in alive:
        member.kill()
    process.wait()
    return names


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not pytest's folder: the path of a unix socket has at most 107 characters.
    private = Path(tempfile.mkdtemp(prefix="bp-"))
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port",
             "runtime-env-agent-port", "node-manager-port", "object-manager-port")  # fmt: skip
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    token = secrets.token_hex(32)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "BLOCKPRUNER_CACHE": str(private / "cache"),
    }
    arguments = [
        "start", "--head", "--block", "--num-cpus=1", "--num-gpus=0", "--dashboard-host=127.0.0.1",
        "--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000",
        "--disable-usage-stats", f"--temp-dir={private / 'ray'}", *(f"--{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    log = private / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([RAY, *arguments], env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
        wait_for_dashboard(dashboard, token, process, log)
        yield Cluster(dashboard, environment)
    finally:
        left = end(process)
        shutil.rmtree(private, ignore_errors=True)
    assert left == []


def test_a_submitted_search_runs_on_the_cluster_and_its_arguments_arrive_as_given(
    cluster: Cluster, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    rows, run = tmp_path / "a folder" / "rows.txt", tmp_path / "the results" / "run"
    for path in (rows, run):
        path.parent.mkdir()
    rows.write_text(text_file.read_text())
    done = cluster.submit(
        "search", str(tiny_folder), "--address", "auto", "--calibration", str(rows), "--out", str(run), *OPTIONS
    )
    assert done.returncode == 0, done.stdout
    assert "step 1 of 1: " in done.stdout
    summary = json.loads((run / "run.json").read_text())
    assert summary["status"] == "finished"
    assert summary["config"]["calibration"] == str(rows)
    scored_by = {line.get("replica") for line in map(json.loads, (run / "ledger.jsonl").read_text().splitlines())}
    assert "replica-0" in scored_by, "a replica on Ray, not the driver"


@pytest.mark.slow
def test_bad_input_fails_the_job_with_one_line(cluster: Cluster, tmp_path: Path) -> None:
    missing, run = tmp_path / "no such model", tmp_path / "run"
    done = cluster.submit("search", str(missing), "--address", "auto", "--out", str(run), *OPTIONS)
    assert done.returncode != 0
    assert "failed with exit code 2" in done.stdout, "bad input, not a bug"
    errors = {line for line in done.stdout.splitlines() if line.startswith("error: ")}  # ray repeats the logs
    assert len(errors) == 1, done.stdout
    assert str(missing) in errors.pop()
    assert "Traceback" not in done.stdout


def test_who_does_not_know_the_token_is_refused(cluster: Cluster) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/", timeout=10)
