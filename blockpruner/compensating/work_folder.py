"""The folder beside the output from which a compensation resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockpruner.compensating.choosing import Store
from blockpruner.engine.compensation.changed_file import read_changed, write_changed
from blockpruner.engine.compensation.walk import Changed
from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import read_json
from blockpruner.engine.options import different
from blockpruner.files import lock_folder, replacing, short, write_json

CONFIG, STAGE = "config.json", "stage-{}-{:04d}.weights"
OURS = (".*", CONFIG, "stage-*.weights")


@dataclass(frozen=True)
class WorkFolder:
    path: Path

    def _save(self, run: int, stage: int, changes: Sequence[Changed]) -> None:
        with replacing(self.path / STAGE.format(run, stage)) as aside:
            write_changed(aside, changes)

    def _known(self, run: int) -> dict[int, Sequence[Changed]]:
        """Raises UserError for a damaged file."""
        found: dict[int, Sequence[Changed]] = {}
        for path in sorted(self.path.glob(f"stage-{run}-*.weights")):
            try:
                found[int(path.stem.rpartition("-")[2])] = read_changed(path)
            except ValueError as error:
                raise UserError(f"{short(path)} is damaged; delete {short(self.path)} to fit again.") from error
        return found

    @property
    def store(self) -> Store:
        return Store(self._known, self._save)


@contextmanager
def work_folder(out: Path, config: Mapping[str, Any]) -> Iterator[WorkFolder]:
    """Open the folder from which a compensation resumes. Raises UserError if it belongs to another one."""
    work = out.with_name(f"{out.name}.work")
    lock = lock_folder(work)
    try:
        foreign = sorted(path.name for path in work.iterdir() if not any(path.match(one) for one in OURS))
        if foreign:
            raise UserError(
                f"expected {short(work)} to hold nothing but a compensation, because it is deleted at the end; it "
                f"holds {foreign[0]!r}. Move that, or choose another `out`."
            )
        recorded = work / CONFIG
        if any(work.glob("stage-*")):
            begun = read_json(recorded, dict[str, Any], f"delete {short(work)} to fit again")
            if differences := different(begun, json.loads(json.dumps(config))):
                raise UserError(
                    f"{short(work)} holds a compensation with another config: {differences}. Use the same options, "
                    f"choose another `out`, or delete that folder."
                )
        write_json(recorded, dict(config))
        yield WorkFolder(work)
    except UserError:
        if not foreign and not any(work.glob("stage-*")):
            shutil.rmtree(work, ignore_errors=True)  # there is nothing to keep
        raise
    finally:
        lock.release()
