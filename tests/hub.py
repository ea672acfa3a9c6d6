"""A cache of the Hugging Face hub, as its client lays it out: refs name commits, snapshots hold their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class HubCache:
    folder: Path

    def snapshot(self, hub_id: str, commit: str, ref: str = "main") -> Path:
        """Let a branch or tag of a model name a commit. Returns the folder for the files of that commit."""
        repository = self.folder / f"models--{hub_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
        return repository / "snapshots" / commit


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    """An empty cache in place of the user's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return HubCache(tmp_path / "hub")
