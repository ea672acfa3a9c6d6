"""The folder beside the output from which a training resumes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, Field, TypeAdapter

from blockpruner.engine.errors import UserError
from blockpruner.engine.json_files import read_json
from blockpruner.engine.options import different
from blockpruner.engine.recovery.checkpoints import latest_checkpoint
from blockpruner.engine.recovery.config import Loss
from blockpruner.engine.recovery.trained.adapters import Adapters
from blockpruner.engine.recovery.what import Trained
from blockpruner.engine.sections import Bos, ChatTemplate
from blockpruner.engine.text.bos import recorded_bos
from blockpruner.engine.text.files import are_same_texts
from blockpruner.files import lock_folder, write_json

CONFIG, BEFORE = "config.json", "before.json"
"""Files of the work folder: what the training is of, and the perplexities of the dense and the pruned model."""
OURS = (".*", CONFIG, BEFORE, "checkpoint-*", "ray", *(kind.file for kind in Trained.all().values()))
"""All that a training leaves in the work folder."""
OLD = {"chat_template": ChatTemplate.AUTO, "bos": Bos.FIRST_WINDOW, "loss": Loss.TEXT, "train": Adapters.name}
"""Options of trainings that began before the options existed."""
Perplexity = Annotated[float, Field(gt=0)] | None
"""None for NaN, which JSON does not have."""
Shape = TypeVar("Shape")


class Begun(BaseModel, extra="allow"):
    """The content of config.json in the work folder, besides the options."""

    threads: int | None = Field(default=None, ge=1, le=10_000)
    """CPU threads of the session that began. All later ones use as many, since the number can change bits."""


def _work(out: Path) -> Path:
    return out.with_name(f"{out.name}.work")


def recorded_model(out: Path) -> str | None:
    """Return the fingerprint of the pruned model that an earlier session began to train, or None."""
    path = _work(out) / CONFIG
    recorded = read_json(path, dict[str, Any], "delete that folder") if path.exists() else {}
    model = recorded.get("model")
    return model if isinstance(model, str) else None


def bos_to_use(asked: Bos, out: Path) -> Bos:
    """Return the recorded `bos` of a training that goes on, if this call leaves it open."""
    work = _work(out)
    return recorded_bos(work / CONFIG) if asked is Bos.AUTO and latest_checkpoint(work) is not None else asked


@contextmanager
def work_folder(out: Path, config: dict[str, Any]) -> Iterator[Path]:
    """Open the folder from which a training resumes. Raises UserError if it belongs to another config."""
    work = _work(out)
    lock = lock_folder(work)
    if foreign := sorted(path.name for path in work.iterdir() if not any(path.match(one) for one in OURS)):
        lock.release()
        raise UserError(
            f"expected {str(work)!r} to hold nothing but a training, because it is deleted at the end; it holds "
            f"{foreign[0]!r}. Move that, or choose another `out`."
        )
    threads = torch.get_num_threads()
    try:
        path = work / CONFIG
        begun = read_back(path, Begun)
        if latest_checkpoint(work) is not None:
            if begun is None:
                raise UserError(f"{str(work)!r} holds a training without its {CONFIG}; delete that folder.")
            recorded = {**OLD, **(begun.model_extra or {})}
            data = recorded.get("data")
            texts = [config["data"]] if isinstance(config["data"], str) else config["data"]
            is_same = are_same_texts(texts, data)
            mine = {**config, "data": data} if is_same else config
            if differences := different(recorded, mine):
                raise UserError(
                    f"{str(work)!r} holds a training with another config: {differences}. Use the same options, choose "
                    f"another `out`, or delete that folder."
                )
        if begun is not None and begun.threads is not None:
            torch.set_num_threads(begun.threads)
        write_json(path, {**config, "threads": torch.get_num_threads()})
        yield work
    except UserError:
        if not any(work.glob("checkpoint-*")) and not (work / BEFORE).exists():
            shutil.rmtree(work, ignore_errors=True)  # there is nothing to keep
        raise
    finally:
        torch.set_num_threads(threads)
        lock.release()


def read_back(path: Path, shape: type[Shape]) -> Shape | None:
    """Read a JSON file of the work folder; None if it is missing."""
    try:
        return TypeAdapter(shape).validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it does not have the form that was written"
        raise UserError(f"cannot read {str(path)!r}: {reason}; delete {str(path.parent)!r} to train again.") from error
