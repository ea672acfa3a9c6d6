"""Models that come as packages of PyPI."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from blockpruner.engine.errors import UserError
from blockpruner.engine.model.from_gguf.files import gguf_file
from blockpruner.engine.model.from_gguf.packaged import PACKAGES
from blockpruner.engine.model.source import GEMMA3, SMOLLM2, full_name

WHOLE = b"GGUF and the rest of it"
JOINS = """
import hashlib
from pathlib import Path

MODEL_NAME = "joined.gguf"
PARTS = sorted(Path(__file__).parent.glob("part*"))


def assemble(output_path):
    if not PARTS:
        raise FileNotFoundError("Missing chunk files")
    joined = b"".join(part.read_bytes() for part in PARTS)
    output_path.write_bytes(joined)
    if hashlib.sha256(joined).hexdigest() != {digest!r}:
        raise ValueError("Assembled file sha256 did not match expected value")
    return output_path
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package of Gemma 3's name, in two parts, and an empty cache."""
    name = PACKAGES[GEMMA3].module
    folder = tmp_path / "site" / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(JOINS.format(digest=hashlib.sha256(WHOLE).hexdigest()))
    (folder / "part0").write_bytes(WHOLE[:9])
    (folder / "part1").write_bytes(WHOLE[9:])
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("BLOCKPRUNER_CACHE", str(tmp_path / "cache"))
    return folder


def test_the_parts_of_a_package_are_joined_once_in_the_cache(package: Path, tmp_path: Path) -> None:
    file = gguf_file(GEMMA3)
    assert file == tmp_path / "cache" / "joined.gguf"
    assert file.read_bytes() == WHOLE
    (package / "part1").unlink()
    assert gguf_file(GEMMA3) == file


@pytest.mark.parametrize("parts", [["part1"], ["part0", "part1"]])
def test_a_package_that_lacks_parts_leaves_nothing_in_the_cache(
    package: Path, tmp_path: Path, parts: list[str]
) -> None:
    for part in parts:
        (package / part).unlink()
    with pytest.raises(
        UserError, match=r"expected all parts of the model 'gemma3'.*pip install --force-reinstall gemma3"
    ):
        gguf_file(GEMMA3)
    assert not list((tmp_path / "cache").glob("*joined.gguf"))
    assert not list((tmp_path / "cache").glob("*/*"))


def test_a_package_without_the_file_is_said(package: Path) -> None:
    (package / "__init__.py").write_text("")
    with pytest.raises(UserError, match="which lacks the file; run: pip install gemma3"):
        gguf_file(GEMMA3)


def test_the_names_of_packaged_models_mean_the_same_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (SMOLLM2, GEMMA3):
        (tmp_path / name).mkdir()
        assert full_name(name) == name
