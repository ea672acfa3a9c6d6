"""`recover`: whatever phase a kill hits, the same command ends with the bytes of a recovery that nothing disturbed."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockpruner.engine.errors import UserError
from blockpruner.engine.recovery import training
from blockpruner.engine.recovery.trained.adapters import Adapters
from blockpruner.recovering import recovering
from blockpruner.showing.console import Reporter
from tests import calls
from tests.calls import prune_to
from tests.conftest import TEXT

OPTIONS = {
    "num_rows": 12, "seq_len": 16, "accumulation": 2, "lr": 0.01, "epochs": 2, "dtype": "float32",
    "perplexity": ("rest",),
}  # fmt: skip
KILLED = 9


@pytest.fixture(scope="module")
def place(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pruned model, rows, and what an undisturbed recovery makes of them."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": TEXT[n:] * 2}) + "\n" for n in range(16)))
    (folder / "order.json").write_text('{"1": [["mlp", 1]], "2": [["mlp", 1], ["mha", 2]]}')
    sequence = folder / "order.json"
    prune_to(folder / "pruned", _silent(), model=str(tiny_folder), sequence=sequence, dtype="float32")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "SAVE_STEPS", 2)
        _recover(folder, folder / "whole")
    return folder


def _silent() -> Reporter:
    from rich.console import Console

    return Reporter(Console(quiet=True))


def _recover(place: Path, out: Path) -> dict[str, Any]:
    return calls.recover(out, _silent(), folder=place / "pruned", data=str(place / "rows.jsonl"), **OPTIONS)


def _content(out: Path) -> dict[str, Any]:
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    side_car = json.loads(files.pop("blockpruner.json"))
    del side_car["recovery"]["wall_s"]
    return {**files, "blockpruner.json": side_car}


def _killed(place: Path, out: Path, phase: str) -> None:
    """Recover in a process that ends in a phase without any cleanup."""
    # Not forked from this process, which may have threads of Ray. The server imports torch once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_work, args=(place, out, phase))
    process.start()
    process.join()
    assert process.exitcode == KILLED


def _work(place: Path, out: Path, phase: str) -> None:
    training.SAVE_STEPS = 2
    PHASES[phase]()
    try:
        _recover(place, out)
    finally:
        os._exit(1)


def _die(*arguments: object, **options: object) -> None:
    os._exit(KILLED)


def _at_call(module: Any, name: str, when: Callable[..., bool]) -> Callable[[], None]:
    """Die when a function is called with certain arguments."""
    real = getattr(module, name)

    def patch() -> None:
        setattr(module, name, lambda *given, **more: _die() if when(*given) else real(*given, **more))

    return patch


def _at_step(number: int) -> Callable[[], None]:
    def patch() -> None:
        recovering._progress = lambda reporter: lambda step, *others: _die() if step == number else None  # type: ignore[assignment]

    return patch


PHASES = {
    "before the perplexities are recorded": _at_call(
        recovering, "write_json", lambda path, _: path.name == "before.json"
    ),
    "in the first step": _at_step(1),
    "between two checkpoints": _at_step(5),
    "while a checkpoint is written": _at_call(training, "complete", lambda folder: folder.name == "checkpoint-4"),
    "while the adapters are written": _at_call(recovering, "recorded_losses", lambda work: True),
    "while the weights are merged": _at_call(Adapters, "merge", lambda *_: True),
    "after the weights are written": _at_call(recovering.shutil, "copytree", lambda *_: True),
    "in the last evaluation": _at_call(recovering, "perplexities", lambda which, *_: which == "recovered"),
}
AFTER = "after the end"
PHASES[AFTER] = _at_call(recovering.shutil, "rmtree", lambda path, **_: Path(path).name == "out.work")


SECOND = (
    "in the first step",
    "while a checkpoint is written",
    "after the weights are written",
    "in the last evaluation",
)
"""Beside others that stop at the same file."""


@pytest.mark.parametrize(
    "phase",
    [pytest.param(one, marks=pytest.mark.slow if one in SECOND else ()) for one in PHASES if one != AFTER],
)
def test_a_killed_recovery_ends_with_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    monkeypatch.setattr(training, "SAVE_STEPS", 2)
    out = tmp_path / "out"
    _killed(place, out, phase)
    assert not out.exists()
    _recover(place, out)
    assert _content(out) == _content(place / "whole")
    assert not (tmp_path / "out.work").exists()


def test_a_kill_after_the_end_leaves_a_whole_checkpoint(place: Path, tmp_path: Path) -> None:
    _killed(place, tmp_path / "out", AFTER)
    with pytest.raises(UserError, match="does not exist yet"):
        _recover(place, tmp_path / "out")


def test_a_resume_uses_the_threads_of_the_session_that_began(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They can change the bits of a training."""
    monkeypatch.setattr(training, "SAVE_STEPS", 2)
    _killed(place, tmp_path / "out", "between two checkpoints")
    seen: list[int] = []
    real = recovering.train
    monkeypatch.setattr(
        recovering, "train", lambda *given, **more: (seen.append(torch.get_num_threads()), real(*given, **more))
    )
    began = json.loads((tmp_path / "out.work" / "config.json").read_text())["threads"]
    threads = torch.get_num_threads()
    torch.set_num_threads(began + 1)
    try:
        _recover(place, tmp_path / "out")
        assert (seen, torch.get_num_threads()) == ([began], began + 1)
    finally:
        torch.set_num_threads(threads)


def test_a_work_folder_with_other_files_is_not_taken_and_not_deleted(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"it holds 'thesis.txt'. Move that, or choose another `out`"):
        _recover(place, tmp_path / "out")
    assert (tmp_path / "out.work" / "thesis.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "out.work")
