"""A stand-in for the Hugging Face Hub that listens on this machine alone.

It speaks as much of the Hub's HTTP interface as the real client of `huggingface_hub` needs to make
repositories, commit to them, list and download them: preupload, LFS, commits in ndjson, trees in
pages, `resolve` with redirects, and the errors with the codes that the Hub gives them.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_write"  # noqa: S105 - it opens no door
_PAGE = 20  # entries of a tree in one answer
_URLS = {
    "create": r"/api/repos/create",
    "validate": r"/api/validate-yaml",
    "info": r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/revision/([^/]+))?",
    "tree": r"/api/(models|datasets)/([\w.-]+/[\w.-]+)/tree/([^/]+)(?:/(.+))?",
    "paths": r"/api/(models|datasets)/([\w.-]+/[\w.-]+)/paths-info/([^/]+)",
    "preupload": r"/api/(models|datasets)/([\w.-]+/[\w.-]+)/preupload/([^/]+)",
    "commit": r"/api/(models|datasets)/([\w.-]+/[\w.-]+)/commit/([^/]+)",
    "branch": r"/api/(models|datasets)/([\w.-]+/[\w.-]+)/branch/([^/]+)",
    "batch": r"/(datasets/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch",
    "blob": r"/blob/(\w+)",
    "resolve": r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)",
}


class Refusal(Exception):  # noqa: N818 - it is no error of the stand-in
    """An answer that is an error: status, and the code that tells the client what it means."""


@dataclasses.dataclass
class Repository:
    """Commits by their name, each the whole of its files; branches and tags lead to them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    lfs: set[str] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        """Begin as the Hub does."""
        self.commit("main", {".gitattributes": b"*.bin filter=lfs\n"})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Add a commit."""
        name = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()  # noqa: S324
        self.commits[name] = files
        self.refs[branch] = name
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """Find a branch, a tag or a commit."""
        name = self.refs.get(unquote(revision), revision)
        if name not in self.commits:
            raise Refusal(404, "RevisionNotFound")
        return name, self.commits[name]


class HubStandIn(http.server.ThreadingHTTPServer):
    """The server, with all that it knows."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.elsewhere = f"http://localhost:{self.server_port}/blob/"
        """Where contents lie: the Hub sends to another host, which gets no token."""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.seen: list[str] = []
        """`METHOD /path` of all requests."""
        self.uploaded: list[str] = []
        """LFS objects in the order they came."""
        self.refusals: list[tuple[str, int, str]] = []
        """What is refused: (pattern of `METHOD /path`, status, code)."""


class _Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement
    server: HubStandIn

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self._chunks())
        url = urlsplit(self.path)
        line = f"{self.command} {unquote(url.path)}"
        self.server.seen.append(line)
        try:
            for pattern, status, code in self.server.refusals:
                if re.search(pattern, line):
                    raise Refusal(status, code)
            for name, pattern in _URLS.items():
                if match := re.fullmatch(pattern, url.path):
                    getattr(self, f"_{name}")(*match.groups())
                    return
            raise Refusal(404, "EntryNotFound")
        except Refusal as refusal:
            status, code = refusal.args
            self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the names that http.server calls

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, document: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(document).encode()
        self._answer(200, body, {"Content-Type": "application/json", **(headers or {})})

    def _repository(self, kind: str | None, name: str, *, write: bool = False) -> Repository:
        kind = "datasets" if (kind or "").startswith("datasets") else "models"
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        found = self.server.repositories.get((kind, name))
        if found is None or (found.private and not allowed):
            raise Refusal(404 if allowed else 401, "RepoNotFound")
        if found.gated and not allowed:
            raise Refusal(403, "GatedRepo")
        if write and not allowed:
            raise Refusal(403, "Forbidden")
        return found

    def _create(self) -> None:
        asked = json.loads(self.body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Unauthorized")
        name = f"{asked['organization']}/{asked['name']}"
        kind = asked.get("type", "model") + "s"
        place = f"{self.server.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if (kind, name) in self.server.repositories:
            self._answer(409, json.dumps({"url": place}).encode())
            return
        private = asked.get("visibility") == "private" or bool(
            asked.get("private")
        )  # of old clients
        self.server.repositories[kind, name] = Repository(private=private)
        self._json({"url": place})

    def _validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _info(self, kind: str, name: str, revision: str | None) -> None:
        found = self._repository(kind, name)
        commit, files = found.at(revision or "main")
        siblings = [{"rfilename": path, "size": len(files[path])} for path in sorted(files)]
        self._json(
            {"id": name, "sha": commit, "private": found.private, "siblings": siblings, "tags": []}
        )

    def _entry(self, found: Repository, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": _git_oid(content),
        }
        if path in found.lfs:
            oid = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
        return entry

    def _tree(self, kind: str, name: str, revision: str, below: str | None) -> None:
        found = self._repository(kind, name)
        _, files = found.at(revision)
        query = {key: value[0] for key, value in parse_qs(urlsplit(self.path).query).items()}
        prefix = f"{unquote(below)}/" if below else ""
        inside = {path: content for path, content in files.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, "EntryNotFound")
        folders = {
            prefix + "/".join(parts[:depth])
            for parts in (path.removeprefix(prefix).split("/") for path in inside)
            for depth in range(1, len(parts))
        }
        entries = [{"type": "directory", "path": path, "size": 0, "oid": "0"} for path in folders]
        entries += [self._entry(found, path, content) for path, content in inside.items()]
        if query.get("recursive", "false").lower() != "true":
            entries = [e for e in entries if "/" not in e["path"].removeprefix(prefix)]
        entries.sort(key=lambda entry: entry["path"])
        start = int(query.get("cursor", 0))
        headers = {}
        if start + _PAGE < len(entries):
            recursive = query.get("recursive", "false")
            place = f"{self.server.url}{urlsplit(self.path).path}"
            following = f"{place}?cursor={start + _PAGE}&recursive={recursive}"
            headers["Link"] = f'<{following}>; rel="next"'
        self._json(entries[start : start + _PAGE], headers)

    def _paths(self, kind: str, name: str, revision: str) -> None:
        found = self._repository(kind, name)
        _, files = found.at(revision)
        asked = parse_qs(self.body.decode())["paths"]
        self._json([self._entry(found, path, files[path]) for path in asked if path in files])

    def _preupload(self, kind: str, name: str, revision: str) -> None:
        found = self._repository(kind, name, write=True)
        _, files = found.at(revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            is_binary = b"\0" in base64.b64decode(file["sample"])
            there = files.get(file["path"])
            oid = None if there is None else _git_oid(there)
            if there is not None and is_binary:
                oid = hashlib.sha256(there).hexdigest()
            mode = "lfs" if is_binary else "regular"
            answers.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self._json({"files": answers})

    def _branch(self, kind: str, name: str, branch: str) -> None:
        found = self._repository(kind, name, write=True)
        if branch in found.refs:
            raise Refusal(409, "Exists")
        found.refs[branch] = found.refs["main"]
        self._json({})

    def _batch(self, kind: str | None, name: str) -> None:
        self._repository(kind, name, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            one = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.blobs:
                one["actions"] = {"upload": {"href": f"{self.server.url}/blob/{asked['oid']}"}}
            objects.append(one)
        self._json({"objects": objects, "transfer": "basic"})

    def _blob(self, oid: str) -> None:
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refusal(400, "BadOid")
            self.server.blobs[oid] = self.body
            self.server.uploaded.append(oid)
            self._answer(200, b"")
        else:
            self._content(self.server.blobs[oid], {"ETag": f'"{oid}"'})

    def _commit(self, kind: str, name: str, revision: str) -> None:
        found = self._repository(kind, name, write=True)
        parent, files = found.at(revision)
        files = dict(files)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", parent) != parent:
            raise Refusal(412, "PreconditionFailed")
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                found.lfs.discard(value["path"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise Refusal(400, "LfsMissing")
                files[value["path"]] = self.server.blobs[value["oid"]]
                found.lfs.add(value["path"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, "UnknownOperation")
        commit = found.commit(unquote(revision), files)
        place = f"{self.server.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        self._json({"commitUrl": f"{place}/commit/{commit}", "commitOid": commit})

    def _resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        found = self._repository(kind, name)
        commit, files = found.at(revision)
        path = unquote(path)
        if path not in files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        content, headers = files[path], {"X-Repo-Commit": commit}
        if path in found.lfs:
            oid = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            self._answer(302, b"", headers | {"Location": self.server.elsewhere + oid})
        else:
            self._content(content, headers | {"ETag": f'"{_git_oid(content)}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), int(match[2] or len(content) - 1) + 1
            whole = len(content)
            content = content[start:stop]
            headers |= {"Content-Range": f"bytes {start}-{start + len(content) - 1}/{whole}"}
            self._answer(206, content, headers)
        else:
            self._answer(200, content, headers)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()  # noqa: S324


@contextmanager
def hub_on_this_machine(cache_folder: str) -> Iterator[HubStandIn]:
    """Serve a Hub, and let the client of this process know no other one."""
    from huggingface_hub import constants

    with HubStandIn() as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        patch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers have no stand-in
        patch.setattr(constants, "HF_HUB_CACHE", cache_folder)
        patch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()
