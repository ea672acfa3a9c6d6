"""Damaged ledgers are read to what was written, as far as it goes, or refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockpruner.evaluating.answers import Answers
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.history import read_history
from blockpruner.searching.ledger import Ledger, parse_ledger
from blockpruner.searching.reading import read_summary
from blockpruner.showing.console import Reporter
from tests.damaged.damage import damaged_json, outcome
from tests.processes import REPOSITORY

EXAMPLES = int(os.environ.get("DAMAGED_EXAMPLES", "120"))
RECORDED = REPOSITORY / "tests" / "recorded"
NAMES = sorted(folder.name for folder in (RECORDED / "runs").iterdir())
OLD = {name: (RECORDED / "runs" / name / "ledger.jsonl").read_text() for name in NAMES}
HEADER = {"model": "2:0", "dtype": "float32"}
UNITS = [{"unit": f"{number}", "answers": [[-1.5, True], 2.5, None, "text"], "cuts": []} for number in range(3)]
ANSWERS = "".join(json.dumps(line) + "\n" for line in [HEADER, *UNITS])
fuzz = settings(derandomize=True, max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The recorded ledgers as they are written today, and one of answers."""
    place = tmp_path_factory.mktemp("chained") / "ledger.jsonl"
    return {name: written(place, text).read_bytes() for name, text in {**OLD, "answers": ANSWERS}.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a recorded run to damage."""
    return shutil.copytree(RECORDED, tmp_path_factory.mktemp("damaged") / "copy")


def written(path: Path, text: str) -> Path:
    path.unlink(missing_ok=True)
    ledger = Ledger(path)
    for line in text.splitlines():
        ledger.append(json.loads(line))
    ledger.close()
    return path


def damaged_lines(draw: st.DataObject, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    number = draw.draw(st.integers(0, len(lines) - 1))
    lines[number] = draw.draw(damaged_json(lines[number].decode())).replace(b"\n", b" ") + b"\n"
    return b"".join(lines)


@given(st.sampled_from(NAMES), st.data())
@fuzz
def test_a_chained_ledger_gives_what_was_written_or_is_refused(
    folder: Path, chained: dict[str, bytes], name: str, data: st.DataObject
) -> None:
    path = folder / "chained.jsonl"
    path.write_bytes(damaged_lines(data, chained[name]))
    found = outcome(lambda: parse_ledger(path))
    lines = [json.loads(line) for line in OLD[name].splitlines()]
    assert found is None or found[0] == lines[: len(found[0])]


@given(st.sampled_from(NAMES), st.data())
@fuzz
def test_an_older_ledger_is_read_or_refused(folder: Path, name: str, data: st.DataObject) -> None:
    run = folder / "runs" / name
    (run / "ledger.jsonl").write_bytes(damaged_lines(data, OLD[name].encode()))

    def read() -> None:
        history = read_history(run / "ledger.jsonl")
        for phase in range(-4, 6):
            history.sums(phase)
        read_summary(run)
        assert len({str(step["block"]) for step in history.steps}) == len(history.steps)

    outcome(read)


@given(st.data())
@settings(fuzz, max_examples=max(10, EXAMPLES // 10))
def test_a_resume_from_an_older_ledger_finds_something_or_refuses_and_changes_nothing(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    run = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(RECORDED / "runs" / "greedy", run)
    before = damaged_lines(data, OLD["greedy"].encode())
    (run / "ledger.jsonl").write_bytes(before)
    files = {file.name: file.read_bytes() for file in run.iterdir()}
    config = json.loads(OLD["greedy"].splitlines()[0])["config"]
    told = {"model": str(folder / "model"), "calibration": str(folder / "rows.txt")}
    from rich.console import Console

    reporter = Reporter(Console(quiet=True))
    here = os.getcwd()
    os.chdir(folder)  # recorded names are relative
    try:
        found: Any = outcome(lambda: run_search(SearchConfig.from_json({**config, **told}), run, reporter))
    finally:
        os.chdir(here)
    if found is None:
        assert {name: (run / name).read_bytes() for name in files} == files
    else:
        assert len(found["steps"]) == 3


@given(st.data())
@fuzz
def test_answers_of_an_evaluation_are_those_that_were_given_or_are_refused(
    folder: Path, chained: dict[str, bytes], data: st.DataObject
) -> None:
    (folder / "answers.jsonl").write_bytes(damaged_lines(data, chained["answers"]))
    answers = outcome(lambda: Answers(folder, HEADER))
    if answers is not None:
        with answers:
            known = answers._known
        assert all(unit == UNITS[int(name)] for name, unit in known.items())
