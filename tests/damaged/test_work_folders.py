"""A work folder of `recover` that was damaged: the same bytes as without the damage, or one line and no output."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockpruner.engine.errors import UserError
from blockpruner.engine.recovery import training
from blockpruner.engine.recovery.checkpoints import latest_checkpoint, read_losses
from blockpruner.recovering import work_folder
from tests.conftest import TEXT, tiny_llama, tiny_tokenizer

CONFIG = {"data": "builtin", "lr": 0.01, "seed": 42, "model": "of a fingerprint"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with two checkpoints of a real training, as a kill leaves it."""
    out = tmp_path_factory.mktemp("work") / "out"
    tokenizer = tiny_tokenizer()
    rows = [torch.tensor(tokenizer(TEXT[start:])["input_ids"][:16]) for start in range(8)]
    with work_folder.work_folder(out, CONFIG) as work, pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "SAVE_STEPS", 1)
        training.train(tiny_llama(torch.float32), rows, training.RecoveryConfig(accumulation=4), work)
        work_folder.write_json(work / "before.json", {"key": [5.0, 7.0]})
    return work


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["threads", "lr", "key", "x"]), inner),
    max_leaves=6,
)


def damage(folder: Path, data: st.DataObject) -> None:
    """Change one file, or what lies beside it."""
    names = [name for name in _files(folder) if not name.endswith(".lock")]
    path = folder / data.draw(st.sampled_from(names), "file")
    kind = data.draw(
        st.sampled_from(["cut", "garbage", "flip", "missing", "folder", "json", "renamed", "link"]), "kind"
    )
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, max(0, len(content) - 1)), "length")])
    elif kind == "garbage":
        path.write_bytes(data.draw(st.binary(max_size=64), "bytes"))
    elif kind == "flip" and content:
        at = data.draw(st.integers(0, len(content) - 1), "at")
        path.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
    elif kind == "json":
        path.write_text(json.dumps(data.draw(VALUES, "value")))
    elif kind == "renamed" and path.parent != folder:
        path.parent.rename(folder / data.draw(st.sampled_from(["checkpoint-9", "checkpoint-x", "checkpoint-"]), "to"))
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(folder / "nowhere")


def opened(work: Path) -> tuple[object, ...]:
    """All that a resume reads of a work folder before the Trainer does."""
    with work_folder.work_folder(work.with_suffix(""), CONFIG):
        last = latest_checkpoint(work)
        before = work_folder.read_back(
            work / "before.json", dict[str, tuple[work_folder.Perplexity, work_folder.Perplexity]]
        )
        content = None if last is None else {**_files(last), "complete": b""}
        return last and last.name, before, content, last and read_losses(last)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_work_folder_is_refused_in_one_line_or_resumed_from_what_is_whole(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    work = whole.parent / "again.work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(whole, work)
    threads = torch.get_num_threads()
    damage(work, data)
    found = _files(work)
    sound = {name: {**_files(whole / name), "complete": b""} for name in ("checkpoint-1", "checkpoint-2")}
    try:
        name, _, content, _ = opened(work)
        assert name is None or content == sound[name]  # no other bits
    except UserError as error:
        message = str(error)
        is_same = _files(work) == found
    else:
        message, is_same = "", True
    finally:
        torch.set_num_threads(threads)
    assert "\n" not in message
    assert len(message) < 1000
    assert is_same  # a refusal changes nothing


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("optimizer.pt", "optimizer.pt is not the file that was written"),
        ("adapter_model.safetensors", "adapter_model.safetensors is not the file that was written"),
        ("trainer_state.json", "trainer_state.json is not the file that was written"),
    ],
)
def test_the_file_that_is_damaged_is_named(whole: Path, tmp_path: Path, file: str, message: str) -> None:
    work = tmp_path / "out.work"
    shutil.copytree(whole, work)
    path = work / "checkpoint-2" / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{message}. Delete it to resume from the checkpoint before it"):
        opened(work)
    shutil.rmtree(work / "checkpoint-2")
    assert opened(work)[0] == "checkpoint-1"


def test_checkpoints_of_an_earlier_version_are_resumed(whole: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    shutil.copytree(whole, work)
    (work / "checkpoint-2" / "complete").write_bytes(b"")
    (work / "config.json").write_text(json.dumps(CONFIG))
    assert opened(work)[0] == "checkpoint-2"
