"""A Hub on loopback for the tests: a real HTTP server with the part of the Hub's API that they use.

Small texts are uploaded with the commit, weights by Xet, whose client writes to a folder in place of a server
(`local://`). All files are downloaded from the Hub itself. What the server does not know it answers with 404.
"""

import base64
import hashlib
import json
import os
import re
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

import pytest
import transformers.utils.hub
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http

WRITE_TOKEN = "hf_write"
READ_TOKEN = "hf_read"  # nothing may be written with it


class Commit(NamedTuple):
    id: str
    files: dict[str, bytes]  # by path


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False  # its files are for those with a token
    commits: dict[str, Commit] = field(default_factory=dict)  # by id
    refs: dict[str, str] = field(default_factory=dict)  # what branches, tags and pull requests point to


@dataclass(eq=False)
class Answer(Exception):
    """What is sent back. As a fault's action: sent instead of carrying the request out."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Corrupt(NamedTuple):
    """A fault: flip a bit of the byte at this offset of the file that is downloaded."""

    offset: int


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of this method whose path (unquoted) has a match of `path`: the
    answer; or None, the request is carried out, and the connection closed without an answer."""

    method: str
    path: str
    action: Answer | Corrupt | None
    times: int = 1


class Hub:
    """The state of the server. Its methods in `ROUTES` return an `Answer`, or what is sent as JSON."""

    def __init__(self, folder: Path) -> None:
        self.url = ""  # `HF_ENDPOINT`
        self.storage = folder / "xet"  # what is uploaded
        self.repos: dict[tuple[str, str], Repo] = {}  # by kind ("model" or "dataset") and id
        self.faults: list[Fault] = []  # what goes wrong, in this order
        self.damaged: set[str] = set()  # paths of files that are stored otherwise than they were sent
        self.requests: list[tuple[str, str]] = []  # method and path

    def add(self, repo_id: str, files: dict[str, bytes], *, kind: str = "model") -> str:
        """Commit files to `main` of a repository, which is created if need be; return the commit's id."""
        repo = self.repos.get((kind, repo_id)) or self.create(kind, repo_id)
        return self.commit(repo, "refs/heads/main", {**head(repo, "main").files, **files}, "Add files").id

    def files(self, repo_id: str, revision: str = "main", *, kind: str = "model") -> dict[str, bytes]:
        return head(self.repos[kind, repo_id], revision).files

    def matching(self, method: str, path: str) -> list[tuple[str, str]]:
        """The requests so far of this method whose path has a match of the regular expression `path`."""
        return [one for one in list(self.requests) if one[0] == method and re.search(path, one[1])]

    def create(self, kind: str, repo_id: str, *, private: bool = False) -> Repo:
        repo = self.repos[kind, repo_id] = Repo(repo_id, private)
        self.commit(repo, "refs/heads/main", {}, "initial commit")
        return repo

    def commit(self, repo: Repo, ref: str, files: dict[str, bytes], title: str) -> Commit:
        commit_id = hashlib.sha1(f"{repo.id} {len(repo.commits)} {title}".encode()).hexdigest()
        repo.commits[commit_id], repo.refs[ref] = Commit(commit_id, files), commit_id
        return repo.commits[commit_id]

    def uploaded(self, sha256: str, size: int) -> bytes:
        """What Xet has stored: in its shards, Xet's own hash of a file stands beside the SHA-256."""
        import hf_xet  # its first import opens the log that `use_in_process` names

        wanted = struct.pack("<4Q", *struct.unpack(">4Q", bytes.fromhex(sha256)))
        for shard in self.storage.glob("xet/xorbs/shards/*.mdb"):
            data, start = shard.read_bytes(), 48  # after the header, each file has several records of 48 bytes
            while data[start : start + 32] != b"\xff" * 32:
                *own, flags, count = struct.unpack_from("<4QII", data, start)
                start += 48 * (1 + count * (1 + (flags >> 31)) + (flags >> 30 & 1))
                if data[start - 48 : start - 16] == wanted:
                    file = hf_xet.XetFileInfo(struct.pack(">4Q", *own).hex(), size)
                    with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{self.storage}") as group:
                        group.start_download_file(file, f"{self.storage}/{sha256}")
                    return (self.storage / sha256).read_bytes()
        raise refusal(400, f"There is no LFS object {sha256}")

    def create_repo(self, asked: dict[str, Any]) -> Answer:
        repo_id = f"{asked.get('organization') or 'ada'}/{asked['name']}"
        if ("model", repo_id) in self.repos:
            return Answer(409, to_json({"url": f"{self.url}/{repo_id}"}))
        self.create("model", repo_id, private=asked.get("visibility") == "private")
        return Answer(200, to_json({"url": f"{self.url}/{repo_id}"}))

    def info(self, request: "Handler", repo: Repo, revision: str | None) -> Any:
        commit = head(repo, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return {"id": repo.id, "sha": commit.id, "private": repo.private, "siblings": siblings}

    def tree(self, request: "Handler", repo: Repo, revision: str, folder: str | None) -> Any:
        commit = head(repo, revision)
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path, content in sorted(commit.files.items()):
            if path.startswith(prefix):
                for parent in list(PurePosixPath(path).parents)[:-1]:
                    entries[f"{parent}"] = {"type": "directory", "path": f"{parent}", "oid": "0" * 40, "size": 0}
                size, lfs = len(content), {"oid": etag(path, content), "size": len(content), "pointerSize": 134}
                entries[path] = {"type": "file", "path": path, "oid": git_oid(content), "size": size}
                entries[path] |= {"lfs": lfs} if is_lfs(path) else {}
        below = {path.removeprefix(prefix): entry for path, entry in entries.items() if path.startswith(prefix)}
        return [below[path] for path in below if request.query.get("recursive") == "true" or "/" not in path]

    def create_branch(self, request: "Handler", repo: Repo, name: str) -> Any:
        repo.refs.setdefault(f"refs/heads/{name}", repo.refs["refs/heads/main"])
        return {}

    def create_pull_request(self, request: "Handler", repo: Repo) -> Any:
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        repo.refs[f"refs/pr/{number}"] = repo.refs["refs/heads/main"]
        return {"num": number}

    def pull_request(self, request: "Handler", repo: Repo, number: str) -> Any:
        known = {"num": int(number), "title": "", "status": "draft", "createdAt": "2026-01-01T00:00:00.000Z"}
        known |= {"isPullRequest": True, "changes": {"base": "main"}, "filesWithConflicts": [], "events": []}
        return {**known, "repo": {"name": repo.id, "type": "model"}}

    def preupload(self, request: "Handler", repo: Repo, revision: str) -> Any:
        there = head(repo, revision).files
        files = [{"path": asked["path"], "shouldIgnore": False} for asked in json.loads(request.body)["files"]]
        for file in files:
            path = file["path"]
            file |= {"uploadMode": "lfs" if is_lfs(path) else "regular"}
            file |= {"oid": etag(path, there[path])} if path in there else {}
        return {"files": files}

    def xet_token(self, request: "Handler", repo: Repo) -> Any:
        return {"casUrl": f"local://{self.storage}", "accessToken": "xet", "exp": int(time.time()) + 3600}

    def create_commit(self, request: "Handler", repo: Repo, revision: str) -> Any:
        parent = head(repo, revision)
        header, *lines = map(json.loads, request.body.splitlines())
        if header["value"].get("parentCommit") not in (None, parent.id):
            raise refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for kind, value in (line.values() for line in lines):
            path = value["path"]
            if kind == "deletedFile":
                del files[path]
                continue
            text = value.get("content")
            content = self.uploaded(value["oid"], value["size"]) if text is None else base64.b64decode(text)
            files[path] = flip(content, 0) if path in self.damaged else content
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        commit = self.commit(repo, ref, files, header["value"]["summary"])
        return {"success": True, "commitOid": commit.id, "commitUrl": f"{self.url}/{repo.id}/commit/{commit.id}"}

    def resolve(self, request: "Handler", repo: Repo, revision: str, path: str) -> Any:
        if repo.gated and not request.token:
            raise refusal(401, "Access to it is restricted.", "GatedRepo")
        commit = head(repo, revision)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise refusal(404, "Entry not found", "EntryNotFound", **headers)
        content = commit.files[path]
        return Answer(200, content, {**headers, "ETag": f'"{etag(path, content)}"'})

    def carry_out(self, request: "Handler") -> Answer:
        method = request.command.replace("HEAD", "GET")
        if method == "POST" and request.token != WRITE_TOKEN:
            raise refusal(403 if request.token else 401, "You don't have the rights to write there")
        if request.target == "/api/repos/create":
            return self.create_repo(json.loads(request.body))
        if request.target == "/api/validate-yaml":
            return Answer(200, to_json({"errors": [], "warnings": []}))
        if target := re.fullmatch("/(?:api/)?(?:(model|dataset)s/)?([^/]+/[^/]+)(.*)", request.target):
            repo = self.repos.get((target[1] or "model", target[2]))
            if repo is None or (repo.private and not request.token):
                raise refusal(404 if request.token else 401, "Repository not found", "RepoNotFound")
            for route, pattern, function in ROUTES:
                if route == method and (found := re.fullmatch(pattern, target[3])):
                    result = function(self, request, repo, *found.groups())
                    return result if isinstance(result, Answer) else Answer(200, to_json(result))
        raise refusal(404, "This server does not know that")


REVISION = "(refs/[^/]+/[^/]+|[^/]+)"
ROUTES = [
    ("GET", f"(?:/revision/{REVISION})?", Hub.info),
    ("GET", f"/tree/{REVISION}(?:/(.+))?", Hub.tree),
    ("POST", "/branch/(.+)", Hub.create_branch),
    ("POST", "/discussions", Hub.create_pull_request),
    ("GET", "/discussions/(.+)", Hub.pull_request),
    ("POST", f"/preupload/{REVISION}", Hub.preupload),
    ("GET", "/xet-write-token/.+", Hub.xet_token),
    ("POST", f"/commit/{REVISION}", Hub.create_commit),
    ("GET", f"/resolve/{REVISION}/(.+)", Hub.resolve),
]


def to_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def refusal(status: int, message: str, code: str = "", **headers: str) -> Answer:
    return Answer(status, b"{}", {"X-Error-Message": message, "X-Error-Code": code, **headers})


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".pt", ".parquet", ".zip", ".tar"))


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_lfs(path) else git_oid(content)


def flip(content: bytes, offset: int) -> bytes:
    return content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :]


def head(repo: Repo, revision: str) -> Commit:
    """The commit that a branch, a tag, a pull request or an id stands for."""
    names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
    commit_id = next((repo.refs[name] for name in names if name in repo.refs), revision)
    if commit_id not in repo.commits:
        raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return repo.commits[commit_id]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # An answer is two writes; with it each waits 40 ms for the client.
    hub: Hub

    def handle_request(self) -> None:
        path, _, query = self.path.partition("?")
        self.target, self.query = unquote(path), dict(parse_qsl(query))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.requests.append((self.command, self.target))
        due = (one for one in self.hub.faults if one.times > 0 and one.method == self.command)
        fault = next((one for one in due if re.search(one.path, self.target)), None)
        action = fault.action if fault else Corrupt
        if fault:
            fault.times -= 1
        try:
            answer = action if isinstance(action, Answer) else self.hub.carry_out(self)
        except Answer as refused:
            answer = refused
        if action is None:
            self.close_connection = True
            return
        content = flip(answer.body, action.offset) if isinstance(action, Corrupt) else answer.body
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = handle_request

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def hub_server(folder: Path) -> Iterator[Hub]:
    """Run a Hub on a free port of loopback; `folder` is where Xet keeps what is uploaded."""
    hub = Hub(folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


def environment(hub: Hub, home: Path, token: str | None = None) -> dict[str, str]:
    """The environment for a fresh process that uses this Hub, with `HF_HOME` and without the settings of this one."""
    ours = re.compile(r"HF_|HUGGING_?FACE|TRANSFORMERS_(OFFLINE|CACHE)|\w+_PROXY$", re.IGNORECASE)
    variables = {name: value for name, value in os.environ.items() if not ours.match(name)}
    variables |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "*"}
    variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**variables, "HF_TOKEN": token} if token else variables


def use_in_process(monkeypatch: pytest.MonkeyPatch, hub: Hub, home: Path, token: str | None = None) -> None:
    """Point the huggingface_hub of this process to this Hub until the test ends, and leave its waits out.

    Not reached: remote code (transformers keeps its folder of modules) and datasets (which copies the endpoint).
    """
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made again at its next use
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_XET_LOG_DEST", f"{home}/")
    monkeypatch.setenv("NO_PROXY", "*")
    _http.close_session()  # the one that was opened before may go through a proxy
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
