"""Repositories on the Hugging Face hub: which commit is meant, what lies there, and why one cannot be read."""

from __future__ import annotations

from collections.abc import Iterator

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
from transformers.utils.hub import extract_commit_hash

from blockpruner.engine.model.source import NAMES
from blockpruner.engine.sections import ModelSource

FAILURES = (OSError, ValueError, httpx.HTTPError)
"""What the hub's client raises if the hub, the line to it or what was asked for is at fault."""
LOG_IN = "log in (`hf auth login`) or set HF_TOKEN"


def commit_of(source: ModelSource) -> str | None:
    """Return the commit that the revision of a hub id is now: 40 hexadecimal digits, or None if it is not known.

    Raises OSError if there is no such model.
    """
    return extract_commit_hash(cached_file(source.name, CONFIG_NAME, revision=source.revision or "main"), None)


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
