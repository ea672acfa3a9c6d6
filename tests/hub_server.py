"""A small server that speaks as much of the Hugging Face hub's HTTP API as its clients use to read repositories.

It keeps a list of what it was asked, and can fail as the hub and the line to it do.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

TOKEN = "hf_known"
"""With this token a user may read gated repositories."""


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False

    def commit(self, revision: str) -> str | None:
        """Return the commit that a branch, a tag, a commit or the first digits of one means."""
        found = [commit for commit in self.commits if len(revision) >= 7 and commit.startswith(revision)]
        return self.refs.get(revision) or (found[0] if found else None)


@dataclass
class Hub:
    port: int = 0
    repositories: dict[str, Repository] = field(default_factory=dict)
    """By kind and id: `models/someone/tiny`, `datasets/someone/rows`."""
    asked: list[str] = field(default_factory=list)
    """Method and path of every request."""
    failing: int | None = None
    """The status with which all requests are answered, if any."""
    cut_after: int | None = None
    """The number of bytes of a file after which the line is dropped, if any."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def push(self, hub_id: str, files: Path | dict[str, bytes], *, ref: str = "main", kind: str = "models") -> str:
        """Let a branch or tag name a new commit, of all files in a folder. Returns the commit."""
        if isinstance(files, Path):
            names = [file for file in sorted(files.rglob("*")) if file.is_file()]
            files = {str(file.relative_to(files)): file.read_bytes() for file in names}
        repository = self.repositories.setdefault(f"{kind}/{hub_id}", Repository())
        commit = hashlib.sha1(repr((len(repository.commits), sorted(files.items()))).encode()).hexdigest()
        repository.commits[commit] = files
        repository.refs[ref] = commit
        return commit


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty hub."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", hub.port), Handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub in place of the real one, and an empty cache in place of the user's."""
    with serving() as served:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", served.endpoint)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the address of its hub
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # which clients do before they try again
        close_session()
        yield served
    close_session()


class _Handler(BaseHTTPRequestHandler):
    served: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        hub, url = self.served, urlsplit(self.path)
        hub.asked.append(f"{self.command} {self.path}")
        if hub.failing:
            return self._refuse(hub.failing)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        kind = "datasets" if "datasets" in parts[:2] else "models"
        words = parts[2:] if parts[0] == "api" else parts[kind == "datasets" :]
        repository = hub.repositories.get(f"{kind}/{'/'.join(words[:2])}")
        if repository is None:
            return self._refuse(401, "RepoNotFound")  # as the hub answers those without a token
        what, revision = [*words[2:4], "", ""][:2]
        rest = "/".join(words[4:])
        commit = repository.commit(revision or "main")
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        files = repository.commits[commit]
        if what == "resolve":
            return self._file(repository, commit, rest)
        if what in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            found: Any = {"id": "/".join(words[:2]), "sha": commit, "siblings": siblings, "tags": [], "private": False}
        elif what == "tree":
            found = _tree(files, rest, is_deep=parse_qs(url.query).get("recursive", [""])[0].lower() == "true")
            if rest and not found:
                return self._refuse(404, "EntryNotFound", commit)
        elif what == "paths-info":
            asked = parse_qs(body).get("paths", []) or json.loads(body or "{}").get("paths", [])
            found = [
                entry
                for name in asked
                for entry in _tree(files, str(Path(name).parent), is_deep=False)
                if entry["path"] == name
            ]
        else:
            return self._refuse(404, "EntryNotFound", commit)
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_POST = do_GET  # noqa: N815 - names that http.server asks for

    def _file(self, repository: Repository, commit: str, name: str) -> None:
        if repository.is_gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            has_token = "Authorization" in self.headers
            return self._refuse(403 if has_token else 401, "GatedRepo", commit)
        if name not in repository.commits[commit]:
            return self._refuse(404, "EntryNotFound", commit)
        content = repository.commits[commit][name]
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if "Range" in self.headers else 200, content[start:], headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: self.served.cut_after])
        if self.served.cut_after is not None and len(content) > self.served.cut_after:
            self.close_connection = True

    def _refuse(self, status: int, code: str = "", commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": commit}
        self._send(status, b"", {name: value for name, value in headers.items() if value})

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _tree(files: dict[str, bytes], folder: str, *, is_deep: bool) -> list[dict[str, Any]]:
    start = "" if folder in ("", ".") else f"{folder}/"
    below = {name: content for name, content in files.items() if name.startswith(start)}
    entries = [
        {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
        for name, content in below.items()
        if is_deep or "/" not in name[len(start) :]
    ]
    folders = sorted({start + name[len(start) :].split("/")[0] for name in below if "/" in name[len(start) :]})
    return [
        *entries,
        *({"type": "directory", "path": name, "size": 0, "oid": _digest(name.encode())} for name in folders),
    ]


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
