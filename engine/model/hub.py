"""Repositories on the Hugging Face hub: which commit is meant, what lies there, and why one cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import cached_files, extract_commit_hash

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.model.json_object import read_object
from blockpruner.engine.model.source import NAMES
from blockpruner.engine.model.weight_files import INDEX, SINGLE
from blockpruner.engine.sections import ModelSource

FAILURES = (OSError, ValueError, httpx.HTTPError)
"""What the hub's client raises if the hub, the line to it or what was asked for is at fault."""
LOG_IN = "log in (`hf auth login`) or set HF_TOKEN"


def commit_of(source: ModelSource) -> str | None:
    """Return the commit that the revision of a hub id is now: 40 hexadecimal digits, or None if it is not known.

    Raises OSError if there is no such model.
    """
    return extract_commit_hash(cached_file(source.name, CONFIG_NAME, revision=source.revision or "main"), None)


def local_folder(source: ModelSource) -> Path | None:
    """Return the folder of a source: its own, or that of a hub id in the hub's cache; None if it is not there. Nothing
    is fetched."""
    if os.path.isdir(source.name):
        return Path(source.name)
    try:
        config = cached_file(source.name, CONFIG_NAME, revision=source.revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(config).parent if config else None


def fetch_weights(source: ModelSource) -> None:
    """Bring the files of which transformers loads a hub id into the hub's cache: what they hold decides about the head
    and the dtype, whatever the config says. Raises UserError if that fails; a repository without weights is left to
    whoever loads it."""
    try:
        if _fetched(source, SINGLE) is None and (index := _fetched(source, INDEX)) is not None:
            named = read_object(Path(index)).get("weight_map")
            names = {str(name) for name in named.values()} if isinstance(named, dict) else ()
            cached_files(source.name, sorted(names), revision=source.revision)
    except FAILURES as error:
        if isinstance(error, UserError):
            raise
        why = why_unreachable(source, error) or f"cannot fetch the weights of {source.name!r} ({first_line(error)})."
        raise UserError(why) from error


def _fetched(source: ModelSource, name: str) -> str | None:
    return cached_file(source.name, name, revision=source.revision, _raise_exceptions_for_missing_entries=False)


def file_names(source: ModelSource) -> list[str] | None:
    """Return the names of the files at a revision of a hub id, or None if the hub does not tell. Costs one request."""
    try:
        return [file.rfilename for file in HfApi().model_info(source.name, revision=source.revision).siblings or ()]
    except FAILURES:  # whoever reads a file says what is wrong
        return None


def code_arguments(config: PreTrainedConfig, source: ModelSource) -> dict[str, str]:
    """Return the arguments with which `AutoModelForCausalLM.from_config` takes the code of a model from the revision
    that is meant: it takes that of the main branch by itself, and `from_pretrained` then keeps to it.

    Code in another repository than the weights stays that of the other's main branch.
    """
    code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    is_loaded = known is not None and not known.__module__.startswith("transformers.")
    if not source.trust_remote_code or source.revision is None or code is None or "--" in code or is_loaded:
        return {}
    return {"code_revision": source.revision}


def why_unreachable(source: ModelSource, error: BaseException) -> str | None:
    """Return the line to show if an error was caused by the hub or by the line to it, or None for any other error."""
    causes = list(_causes(error))
    if not isinstance(error, OSError | httpx.HTTPError):
        return None
    name, page = source.name, f"{constants.ENDPOINT}/{source.name}"
    if _first(causes, GatedRepoError):
        return f"{name!r} is gated: ask for access at {page}, and {LOG_IN}, as a user who has it."
    if _first(causes, RepositoryNotFoundError):
        return (
            f"expected {NAMES}, got {name!r}, which is nothing of this here, and which the hub does not show; correct "
            f"it, or {LOG_IN} if it is private."
        )
    if _first(causes, RevisionNotFoundError):
        return (
            f"expected `revision` to be a branch, a tag or a commit of {name!r}, got {source.revision!r}; see "
            f"{page}/commits/main."
        )
    if constants.is_offline_mode() and _first(causes, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return (
            f"expected {NAMES}, got {name!r}, which is nothing of this here, and not (or not all) in the hub's cache "
            f"({constants.HF_HUB_CACHE}); HF_HUB_OFFLINE is set, so it is not fetched."
        )
    refused = _first(causes, HfHubHTTPError)
    if isinstance(refused, HfHubHTTPError) and refused.response.status_code != 404:
        status = refused.response.status_code
        then = LOG_IN if status in (401, 403) else "try again later"
        return f"the Hugging Face hub ({constants.ENDPOINT}) answers {status} for {name!r}; {then}."
    if _first(causes, httpx.TransportError, LocalEntryNotFoundError) or "Consistency check failed" in str(error):
        return (
            f"cannot fetch {name!r} from the Hugging Face hub ({constants.ENDPOINT}), and it is not (or not all) in "
            f"the cache; see to the connection and run the same again, or give a folder."
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first(causes: list[BaseException], *kinds: type[BaseException]) -> BaseException | None:
    return next((one for one in causes if isinstance(one, kinds)), None)
