"""What a machine cannot give is told in one line, before anything starts."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockpruner.cluster import session
from blockpruner.cluster.nodes import Needs, Node, check_number
from blockpruner.engine.errors import SearchFailed, UserError
from blockpruner.engine.work.memory import GIB


@pytest.mark.parametrize("asked", [1, 2, 6, 16])
def test_as_many_replicas_as_fit_may_be_asked_for(asked: int) -> None:
    check_number(asked, Needs(1, 0, least_bytes=GIB), Node("local", "here", 8, 0, 64 * GIB))


@pytest.mark.parametrize(
    ("asked", "num_cpus", "gib", "most"),
    [(30, 2, 64, 4), (1000, 64, 20, 20), (2, 8, 1, 1), (3, 1, 8, 2)],
)
def test_replicas_that_the_machine_cannot_hold_are_refused_at_once(
    asked: int, num_cpus: int, gib: int, most: int
) -> None:
    with pytest.raises(UserError, match=f"expected at most {most} `replicas`, got {asked}; here: {num_cpus} CPUs"):
        check_number(asked, Needs(1, 0, least_bytes=GIB), Node("local", "here", num_cpus, 0, gib * GIB))


def test_one_replica_may_always_be_tried() -> None:
    check_number(1, Needs(1, 0, least_bytes=99 * GIB), Node("local", "here", 1, 0, GIB))


def test_the_private_folder_of_ray_lies_where_the_names_of_its_sockets_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tempfile.mkdtemp(dir="/tmp", prefix="s")
    long = tmp_path / ("l" * 60)
    long.mkdir()
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        monkeypatch.setattr(session, "SHORT_FOLDER", short)
        said: list[str] = []
        folder = session._private_folder(said.append)
        assert os.path.dirname(folder) == short
        (note,) = said
        assert folder in note
        assert str(long) in note
        os.rmdir(folder)
        monkeypatch.setattr(session, "SHORT_FOLDER", str(tmp_path / "nowhere"))
        with pytest.raises(UserError, match=r"set TMPDIR to one, or use `no_ray`") as error:
            session._private_folder(said.append)
        assert "\n" not in str(error.value)
    finally:
        os.rmdir(short)


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> None:
        raise OSError("no socket")

    # Not Ray itself: it reads the environment at its first import, for all sessions of this process.
    broken = SimpleNamespace(init=fail, is_initialized=lambda: False, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", broken)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(session, "LONGEST_FOLDER", 1000)
    before = dict(os.environ)
    with (
        pytest.raises(SearchFailed, match=r"Ray could not start .*no socket.* or use `no_ray`"),
        session.ray_session(None),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == before


ENVIRONMENTS = {
    "no threads": ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS, got '0'"),
    "threads that are no number": ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS, got 'many'"),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_a_wrong_environment_is_told_before_anything_is_imported(case: str) -> None:
    values, message = ENVIRONMENTS[case]
    done = subprocess.run(
        [sys.executable, "-m", "blockpruner", "plan", "llama-2-7b"],
        capture_output=True, text=True, env={**os.environ, **values}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert message in done.stderr


def test_a_working_directory_that_is_gone_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"mkdir gone; cd gone; rmdir ../gone; exec {sys.executable} -m blockpruner plan llama-2-7b"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the working directory does not exist any more; change to another one.\n"
