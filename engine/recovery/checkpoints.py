"""Checkpoints of a training: which one is complete, and whether its files are still the ones that were written."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from blockpruner.engine.errors import UserError

COMPLETE = "complete"
"""Name of the last file written to a training checkpoint. Without it, the checkpoint may be incomplete. It holds the
SHA-256 of the other files; an empty one is of an earlier version, and its files are not compared."""
STATE = "trainer_state.json"
OF_OTHER_PROCESSES = "rng_state_"
"""Files with this prefix may still be being written when the first process completes the checkpoint."""


class Entry(BaseModel):
    """A line of the Trainer's log. The summary at the end has no loss of a step."""

    loss: float | None = None


class State(BaseModel):
    """The part of the Trainer's state that is read here."""

    global_step: int
    log_history: list[Entry]


def complete(checkpoint: Path) -> None:
    """Mark a checkpoint as complete."""
    written = {
        path.name: _digest(path)
        for path in sorted(checkpoint.iterdir())
        if path.is_file() and path.name != COMPLETE and not path.name.startswith(OF_OTHER_PROCESSES)
    }
    # A kill in the middle of writing must not leave a shorter list.
    aside = checkpoint / f".{COMPLETE}"
    aside.write_bytes(TypeAdapter(dict[str, str]).dump_json(written))
    aside.replace(checkpoint / COMPLETE)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint of a training, or None. Raises UserError if its files were changed."""
    marked = [(_step(path.parent), path.parent) for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    step, last = max(((step, path) for step, path in marked if step is not None), default=(0, None))
    if last is not None and (what := _damage(last, step)):
        raise UserError(
            f"the training checkpoint {str(last)!r} is damaged: {what}. Delete it to resume from the checkpoint before "
            f"it, or delete {str(folder)!r} to train again."
        )
    return last


def read_losses(checkpoint: Path) -> list[float]:
    """Return the loss of each step until the checkpoint, in nats."""
    state = State.model_validate_json((checkpoint / STATE).read_bytes())
    return [entry.loss for entry in state.log_history if entry.loss is not None]


def _step(checkpoint: Path) -> int | None:
    found = re.fullmatch(r"checkpoint-(\d{1,18})", checkpoint.name, re.ASCII)
    return int(found[1]) if found else None


def _damage(checkpoint: Path, step: int) -> str | None:
    """Describe what is wrong with the files of a complete checkpoint."""
    try:
        marker = (checkpoint / COMPLETE).read_bytes()
        written = TypeAdapter(dict[str, str]).validate_json(marker) if marker else {}
        for name, digest in written.items():
            if _digest(checkpoint / name) != digest:
                return f"{name} is not the file that was written"
        if State.model_validate_json((checkpoint / STATE).read_bytes()).global_step != step:
            return f"{STATE} is of another step"
    except OSError as error:
        return f"{Path(error.filename or COMPLETE).name} cannot be read ({error.strerror})"
    except ValidationError as error:
        return f"{COMPLETE if error.title.startswith('dict') else STATE} does not have the form that was written"
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
