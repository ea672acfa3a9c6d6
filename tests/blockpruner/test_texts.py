"""Texts by other spellings of their paths, and with characters that some programs take for patterns."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from blockpruner.compensating import pruned
from blockpruner.compensating.config import CompensateConfig
from blockpruner.engine.errors import UserError
from blockpruner.evaluating.config import EvaluationConfig
from blockpruner.evaluating.evaluating import evaluate_model
from blockpruner.pruning.config import PruneConfig
from blockpruner.reporting.recorded import read_recorded
from blockpruner.reporting.repeat import search_command
from blockpruner.searching.config import SearchConfig
from blockpruner.searching.driver import run_search
from blockpruner.showing.console import Reporter
from tests import calls


def test_a_run_goes_on_with_another_spelling_of_the_path_of_its_text(
    config: Callable[..., SearchConfig], text_file: Path, tmp_path: Path, reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, elsewhere = tmp_path / "a", tmp_path / "b"
    folder.mkdir()
    elsewhere.mkdir()
    shutil.copy(text_file, folder / "rows.txt")
    (tmp_path / "link.txt").symlink_to(folder / "rows.txt")
    monkeypatch.chdir(folder)
    run_search(config(calibration="rows.txt", num_remove=1), tmp_path / "run", reporter)
    for count, name in enumerate(("./rows.txt", "../link.txt", str(folder / "rows.txt")), start=2):
        found = run_search(config(calibration=name, num_remove=count), tmp_path / "run", reporter)
        assert len(found["steps"]) == count
        assert found["config"]["calibration"] == str(folder / "rows.txt")
    monkeypatch.chdir(elsewhere)
    run_search(config(calibration="../a/rows.txt", num_remove=4), tmp_path / "run", reporter)
    (elsewhere / "rows.txt").write_text((folder / "rows.txt").read_text().replace("fox", "dog"))
    with pytest.raises(UserError, match=r"`calibration` was '.*/a/rows.txt', now 'rows.txt'"):
        run_search(config(calibration="rows.txt", num_remove=4), tmp_path / "run", reporter)
    (elsewhere / "other.txt").write_text((folder / "rows.txt").read_text())
    with pytest.raises(UserError, match=r"`calibration` was '.*/a/rows.txt', now 'other.txt'"):
        run_search(config(calibration="other.txt", num_remove=4), tmp_path / "run", reporter)


def test_a_run_on_several_texts_resumes_is_reported_and_compensated(
    config: Callable[..., SearchConfig],
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a,b.txt").write_text(text_file.read_text().replace("fox", "dog"))
    texts = (str(text_file), str(tmp_path / "a,b.txt"))
    run_search(config(calibration=texts, num_windows=8, num_remove=1), tmp_path / "run", reporter)
    found = run_search(config(calibration=texts, num_windows=8, num_remove=2), tmp_path / "run", reporter)
    assert found["config"]["calibration"] == list(texts)
    with pytest.raises(UserError, match="`calibration` was"):
        run_search(config(calibration=texts[::-1], num_windows=8, num_remove=3), tmp_path / "run", reporter)
    (recorded,) = read_recorded([tmp_path / "run"])
    words = shlex.split(search_command(recorded))
    assert [words[place + 1] for place, word in enumerate(words) if word == "--calibration"] == list(texts)
    calls.report([tmp_path / "run"], tmp_path / "report", reporter)
    seen: list[CompensateConfig] = []
    monkeypatch.setattr(pruned, "compensate_checkpoint", lambda config, out, reporter: seen.append(config) or {})
    pruning = PruneConfig.of(model=str(tiny_folder), run=tmp_path / "run", compensate=True)
    pruned.prune_and_compensate(pruning, tmp_path / "out", reporter)
    assert seen[0].calibration == texts


def test_an_evaluation_reads_exactly_the_file_that_is_named(
    tiny_folder: Path, text_file: Path, tmp_path: Path, reporter: Reporter
) -> None:
    (tmp_path / "rows1.jsonl").write_text(json.dumps({"text": "another file"}))
    rows = text_file.read_text().splitlines()
    names = [str(tmp_path / name) for name in ("rows[1].jsonl", "rows.jsonl")]
    for name in names:
        Path(name).write_text("\n".join(json.dumps({"text": row}) for row in rows))
    judging = EvaluationConfig.of(
        model=str(tiny_folder), perplexity=tuple(names), seq_len=(16,), num_windows=2, dtype="float32", no_ray=True
    )
    found = evaluate_model(judging, reporter)["perplexity"]
    assert found[names[0]] == found[names[1]]
