"""Which state of a repository on the Hugging Face hub is meant?"""

from __future__ import annotations

from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from blockpruner.engine.sections import ModelSource


def commit_of(source: ModelSource) -> str | None:
    """Return the commit that the revision of a hub id is now: 40 hexadecimal digits, or None if it is not known.

    Raises OSError if there is no such model.
    """
    return extract_commit_hash(cached_file(source.name, CONFIG_NAME, revision=source.revision or "main"), None)
