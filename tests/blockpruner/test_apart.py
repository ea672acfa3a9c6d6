"""A function in a process of its own: what it gives, raises and takes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blockpruner.apart import run_apart
from blockpruner.engine.errors import SearchFailed, UserError
from tests.processes import REPOSITORY


def pid_and(value: int, *, factor: int = 1) -> tuple[int, int]:
    return os.getpid(), value * factor


def raise_it(error: Exception) -> None:
    raise error


def hold(num_bytes: int) -> int:
    held = bytearray(os.urandom(2**20) * (num_bytes // 2**20))
    time.sleep(2.5)
    return len(held)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_function_runs_elsewhere_and_its_value_comes_back() -> None:
    found = run_apart(pid_and, 3, factor=2)
    assert found.value[0] != os.getpid()
    assert found.value[1] == 6


def test_errors_that_a_user_is_told_come_back_as_they_were() -> None:
    with pytest.raises(UserError, match="expected a stone"):
        run_apart(raise_it, UserError("expected a stone"))


def test_a_process_that_was_killed_is_named_by_what_it_ran() -> None:
    with pytest.raises(SearchFailed, match="the process that ran die ended"):
        run_apart(die)


def test_a_bug_shows_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SearchFailed):
        run_apart(raise_it, ZeroDivisionError("a bug"))
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err


def test_memory_is_that_of_the_process() -> None:
    small = run_apart(pid_and, 1).peak_memory_bytes
    large = run_apart(hold, 300 * 2**20).peak_memory_bytes
    assert large > small
    assert large > 300 * 2**20


def wait_and_tell(path: Path) -> None:
    (path / "began").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (path / "cleaned up").touch()
        raise


PARENT = """
import sys
from pathlib import Path
from blockpruner.apart import run_apart
from tests.blockpruner.test_apart import wait_and_tell
run_apart(wait_and_tell, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_the_process_cleans_up_and_ends_however_its_parent_is_stopped(tmp_path: Path, number: int) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    wait_until((tmp_path / "began").exists)
    parent.send_signal(number)
    wait_until((tmp_path / "cleaned up").exists)
    assert parent.wait(60) != 0


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)
