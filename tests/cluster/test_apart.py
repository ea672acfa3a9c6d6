"""A function in a process of its own: what it gives, raises and takes."""

import os
import signal
import time

import pytest

from cluster.apart import run_apart
from engine.errors import SearchFailed, UserError


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
