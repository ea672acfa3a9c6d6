"""A ledger is chained: what was edited is refused by its line, what is missing at the end is scored again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpruner.engine.errors import UserError
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.searching.ledger import Ledger, parse_ledger
from blockpruner.showing.console import Reporter
from tests.processes import REPOSITORY

LINES = [{"type": "unit", "number": number, "sums": [number / 7, 1e-300]} for number in range(6)]
RECORDED = REPOSITORY / "tests" / "recorded"


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    ledger = Ledger(path)
    for line in lines:
        ledger.append(line)
    ledger.close()
    return path


def without_chain(ledger: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("chain", "fingerprint")} for line in lines]


def results(summary: Any) -> Any:
    """What a search found, without how long it took and where."""
    spent = {"wall_s", "num_replicas", "num_lost", "placement"}
    steps = [{key: value for key, value in step.items() if key not in spent} for step in summary["steps"]]
    return steps, summary["dense"]


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("ledger") / "ledger.jsonl", LINES).read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("edited") / "ledger.jsonl"


def test_lines_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    path = written(tmp_path / "ledger.jsonl", LINES)
    assert parse_ledger(path) == (LINES, path.stat().st_size)


@given(st.integers(0, 10**6))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_any_cut_at_the_end_leaves_the_lines_before_it(chained: bytes, place: Path, where: int) -> None:
    cut = chained[: where % (len(chained) + 1)]
    place.write_bytes(cut)
    lines, _ = parse_ledger(place)
    assert lines == LINES[: cut.count(b"\n")]
    written(place, LINES[len(lines) :])
    assert place.read_bytes() == chained


def refusal_of(ledger: Path) -> str | None:
    try:
        parse_ledger(ledger)
    except UserError as error:
        return str(error)
    return None


def edited(lines: list[bytes], kind: str, one: int, other: int, byte: int) -> list[bytes]:
    one, other = one % len(lines), other % len(lines)
    match kind:
        case "swap":
            lines[one], lines[other] = lines[other], lines[one]
        case "drop":
            del lines[one]
        case "double":
            lines.insert(other, lines[one])
        case "join":
            lines += lines[one:]
        case "digit":
            places = [place.start() for place in re.finditer(rb"\d", lines[one])]
            at = places[byte % len(places)]
            digit = b"%d" % ((int(lines[one][at : at + 1]) + 1 + byte % 9) % 10)
            lines[one] = lines[one][:at] + digit + lines[one][at + 1 :]
        case "byte":
            at = byte % len(lines[one])
            lines[one] = lines[one][:at] + bytes([byte % 256]) + lines[one][at + 1 :]
        case "unchain":
            lines[one] = re.sub(rb', "chain": "\w+"', b"", lines[one])
    return lines


@given(
    st.sampled_from(["swap", "drop", "double", "join", "digit", "byte", "unchain"]),
    st.integers(0, 99), st.integers(0, 99), st.integers(0, 10**6),
)  # fmt: skip
@settings(derandomize=True, max_examples=300, deadline=None)
def test_any_single_edit_is_refused_by_its_line_or_changes_nothing(
    chained: bytes, place: Path, kind: str, one: int, other: int, byte: int
) -> None:
    place.write_bytes(b"".join(edited(chained.splitlines(keepends=True), kind, one, other, byte)))
    refusal = refusal_of(place)
    if refusal is None:
        lines, _ = parse_ledger(place)
        assert lines == LINES[: len(lines)]
    else:
        assert re.search(r"is damaged in (line \d+ |one of the lines 1 to \d+;)", refusal)
        assert "\n" not in refusal


def test_a_last_line_that_was_edited_and_taken_out_of_the_chain_is_refused(chained: bytes, place: Path) -> None:
    *lines, last = chained.splitlines(keepends=True)
    forged = re.sub(rb', "chain": "\w+"', b"", last).replace(b'"number": 5', b'"number": 7')
    place.write_bytes(b"".join([*lines, forged]))
    with pytest.raises(UserError, match=rf"is damaged in line {len(LINES)} \(it is not chained"):
        parse_ledger(place)


def test_an_older_ledger_that_grows_is_chained_from_there_to_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES[:3]))
    written(path, LINES[3:])
    assert [b'"chain"' in line for line in path.read_bytes().splitlines()] == [False] * 3 + [True] * 3
    assert parse_ledger(path)[0] == LINES
    older = path.read_text().splitlines(keepends=True)
    path.write_text("".join([older[1], older[0], *older[2:]]))
    with pytest.raises(UserError, match="is damaged in one of the lines 1 to 4; restore it"):
        parse_ledger(path)


def test_a_search_whose_ledger_was_edited_is_refused_and_one_that_was_cut_resumes_to_the_same_bits(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    whole = run_search(config(num_remove=2), tmp_path / "run", reporter)
    lines = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines(keepends=True)
    for number in (1, len(lines) // 2, len(lines) - 2):
        copy = shutil.copytree(tmp_path / "run", tmp_path / f"dropped-{number}")
        (copy / "ledger.jsonl").write_text("".join(lines[:number] + lines[number + 1 :]))
        with pytest.raises(UserError, match=rf"is damaged in line {number + 1} \(it, or its place"):
            run_search(config(num_remove=2), copy, reporter)
    cut = shutil.copytree(tmp_path / "run", tmp_path / "cut")
    (cut / "ledger.jsonl").write_text("".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:20])
    assert results(run_search(config(num_remove=2), cut, reporter)) == results(whole)


@pytest.mark.parametrize(
    ("what", "edit"),
    [
        ("expected one record of the run, in the first line", lambda lines: [*lines, *lines]),
        ("expected step 2, got 3", lambda lines: [line for line in lines if '"step": 2, "block"' not in line]),
        ("window 7 of 2", lambda lines: [lines[0].replace('"num_windows": 17', '"num_windows": 2'), *lines[1:]]),
    ],
)
def test_an_older_ledger_whose_records_do_not_follow_each_other_is_refused(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch, what: str, edit: Callable[..., list[str]]
) -> None:
    shutil.copytree(RECORDED, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    ledger = Path("runs/greedy/ledger.jsonl")
    header = json.loads(ledger.read_text().splitlines()[0])
    ledger.write_text("".join(edit(ledger.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match=what):
        run_search(SearchConfig.from_json(header["config"]), Path("runs/greedy"), reporter)


def test_a_run_without_a_chain_is_continued_and_then_has_one(
    config: Callable[..., SearchConfig], tmp_path: Path, reporter: Reporter
) -> None:
    whole = run_search(config(num_remove=2), tmp_path / "whole", reporter)
    run_search(config(num_remove=1), tmp_path / "run", reporter)
    ledger = tmp_path / "run" / "ledger.jsonl"
    ledger.write_text("".join(json.dumps(line) + "\n" for line in without_chain(ledger)))
    num_old = len(ledger.read_bytes().splitlines())
    assert results(run_search(config(num_remove=2), tmp_path / "run", reporter)) == results(whole)
    assert all('"chain"' in line for line in ledger.read_text().splitlines()[num_old:])
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))
    with pytest.raises(UserError, match="in one of the lines 1 to"):
        run_search(config(num_remove=2), tmp_path / "run", reporter)
