"""A Hub on loopback for the tests: a real HTTP server with the part of the Hub's API that huggingface_hub uses.

```python
with hub_server(tmp_path / "hub") as hub:
    use_in_process(monkeypatch, hub, tmp_path / "cache", token=WRITE_TOKEN)
    HfApi().create_repo("ada/model")
    hub.faults.append(Fault("PUT", r"^/upload/", DropRequest(after=1000)))
    ...
    subprocess.run([...], env=environment(hub, tmp_path / "other-cache", token=READ_TOKEN))
```

It serves models, datasets and Spaces; what it does not know it answers with 404, and `hub.requests` tells. As on the
Hub, large and binary files are LFS files: they are sent to and fetched from a storage with another origin, which gets
no token. Xet is not offered. huggingface_hub asks no server whether it may upload by Xet, it does so wherever `hf_xet`
is installed; so the two ways in, `use_in_process` and `environment`, set `HF_HUB_DISABLE_XET`.
"""

import base64
import hashlib
import json
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pytest
import transformers.utils.hub
import yaml
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http

WRITE_TOKEN = "hf_write"  # ada, member of the organisation lotlip
READ_TOKEN = "hf_read"  # ada too, but nothing may be written with it
OTHER_TOKEN = "hf_other"  # bob

LFS_NAMES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.onnx", "*.parquet", "*.npz", "*.zip", "*.tar")


@dataclass(frozen=True)
class Account:
    """Whom a token belongs to, and what may be done with it."""

    name: str
    organizations: tuple[str, ...] = ()
    may_write: bool = True


@dataclass(frozen=True)
class File:
    """A file of a commit: git's id and the size in bytes; of an LFS file, the SHA-256 as well."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def etag(self) -> str:
        """What identifies the content: the name of its file in the server's folder, and of the blob in a cache."""
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """A commit and all its files, by path."""

    id: str
    parent: str | None
    title: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    """A repository: its commits by id, and what its branches, tags and pull requests (`refs/...`) point to."""

    kind: str  # "model", "dataset" or "space"
    id: str
    private: bool = False
    gated: bool = False  # its files are for its owners and for those in `granted`
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where it lies under the server's address."""
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"

    def resolve(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag, a pull request or an id stands for."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        return self.commits.get(revision)


@dataclass
class Upload:
    """An LFS object on its way: the parts that have come, by number."""

    sha256: str
    size: int
    number_of_parts: int
    parts: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request as the server saw it; `status` is None where no answer was begun."""

    method: str
    path: str
    status: int | None
    authorized: bool  # whether a token came with it
    range: str | None  # its `Range` header
    to_storage: bool


@dataclass
class Answer:
    """What is sent back. As a fault's action: sent instead of carrying the request out."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DropRequest:
    """Close the connection after this many bytes of the request's body. The request is not carried out."""

    after: int = 0


@dataclass(frozen=True)
class DropAnswer:
    """Carry the request out, then close the connection after this many bytes of the answer's body; None: no answer."""

    after: int | None = None


@dataclass(frozen=True)
class Corrupt:
    """Flip a bit of the byte at this offset: of the body that is sent up, or of the file that is downloaded."""

    offset: int = 0


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of this method whose path has a match of `path`.

    Paths are without the server's address and query, unquoted: `/api/models/ada/model/commit/main`,
    `/ada/model/resolve/main/config.json`; in the storage, `/upload/SHA256/ID/PART` and `/lfs/SHA256/weights.bin`.
    """

    method: str
    path: str
    action: Answer | DropRequest | DropAnswer | Corrupt
    times: int = 1
    skip: int = 0  # so many requests that match are served first


class Refusal(Exception):
    """An answer other than success. The client chooses its exception by `code`, the Hub's `X-Error-Code`."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        error = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer = Answer(status, to_json({"error": message}), {**error, **(headers or {})})


@dataclass(frozen=True)
class Call:
    """A request on its way to the function that carries it out."""

    account: Account | None
    query: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


class Hub:
    """The state of the server, and the ways in for tests that need no client.

    Attributes:
        url: the address of the Hub (`HF_ENDPOINT`); storage_url: that of the LFS objects.
        accounts: token -> account.
        repos: (kind, id) -> repository.
        faults: what goes wrong, in this order; a fault that is used up does nothing.
        requests: what was asked, in the order of the answers.
        page_size: the entries of a folder on one page.
        regular_size: larger files are LFS files, in bytes; part_size: larger LFS files come in parts of this size.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.url = self.storage_url = ""
        self.accounts = {
            WRITE_TOKEN: Account("ada", ("lotlip",)),
            READ_TOKEN: Account("ada", ("lotlip",), may_write=False),
            OTHER_TOKEN: Account("bob"),
        }
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: dict[str, Upload] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.page_size = 1000
        self.regular_size = 10 * 1024 * 1024
        self.part_size = 1024 * 1024
        self.lock = threading.RLock()

    def add(self, repo_id: str, files: dict[str, bytes], *, kind: str = "model", private: bool = False) -> str:
        """Commit files to `main` of a repository, which is created if need be; return the commit's id."""
        with self.lock:
            repo = self.repos.get((kind, repo_id)) or self.create(kind, repo_id, private=private)
            head = repo.commits[repo.refs["refs/heads/main"]]
            added = {
                path: self.keep(content, self.is_lfs(path, content, len(content))) for path, content in files.items()
            }
            return self.commit(repo, "refs/heads/main", {**head.files, **added}, "Add files").id

    def files(self, repo_id: str, revision: str = "main", *, kind: str = "model") -> dict[str, bytes]:
        """What a revision of a repository holds, without the `.gitattributes` that the Hub puts into each."""
        with self.lock:
            commit = self.repos[kind, repo_id].resolve(revision)
            assert commit is not None, f"{repo_id} has no revision {revision!r}"
            files = {path: (self.folder / file.etag).read_bytes() for path, file in commit.files.items()}
        return {path: content for path, content in files.items() if path != ".gitattributes"}

    def matching(self, method: str, path: str) -> list[Request]:
        """The requests so far of this method whose path has a match of the regular expression `path`."""
        return [
            request for request in list(self.requests) if request.method == method and re.search(path, request.path)
        ]

    def create(self, kind: str, repo_id: str, *, private: bool = False) -> Repo:
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private=private)
        attributes = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_NAMES).encode()
        self.commit(repo, "refs/heads/main", {".gitattributes": self.keep(attributes, lfs=False)}, "initial commit")
        return repo

    def is_lfs(self, path: str, sample: bytes, size: int) -> bool:
        return size > self.regular_size or b"\0" in sample or any(fnmatch(path, name) for name in LFS_NAMES)

    def keep(self, content: bytes, lfs: bool) -> File:
        """Store a content under its name."""
        sha256 = hashlib.sha256(content).hexdigest() if lfs else None
        oid = git_oid(pointer(sha256, len(content)) if sha256 else content)
        file = File(oid, len(content), sha256)
        (self.folder / file.etag).write_bytes(content)
        return file

    def commit(self, repo: Repo, ref: str, files: dict[str, File], title: str) -> Commit:
        """Add a commit after what `ref` points to (a new ref: the first commit), and let `ref` point to it."""
        parent = repo.refs.get(ref)
        date = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        identity = [len(repo.commits), parent, title, date, sorted((path, file.oid) for path, file in files.items())]
        commit = Commit(hashlib.sha1(to_json(identity)).hexdigest(), parent, title, date, files)
        repo.commits[commit.id] = commit
        repo.refs[ref] = commit.id
        return commit

    def may_read(self, account: Account | None, repo: Repo) -> bool:
        return account is not None and repo.id.split("/")[0] in (account.name, *account.organizations)

    def repo(self, call: Call, kinds: str | None, repo_id: str, *, write: bool = False) -> Repo:
        """The repository that is asked for, if it is there and the account may read it (or write to it)."""
        kind = (kinds or "models").removesuffix("s")
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and not self.may_read(call.account, repo)):
            # The Hub does not tell strangers whether a repository is private or missing.
            raise Refusal(401 if call.account is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self.check_may_write(call, repo_id.split("/")[0])
        return repo

    def check_may_write(self, call: Call, namespace: str) -> None:
        if call.account is None:
            raise Refusal(401, "Invalid username or password.")
        if not call.account.may_write or namespace not in (call.account.name, *call.account.organizations):
            raise Refusal(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    def head(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def take_fault(self, method: str, path: str) -> Answer | DropRequest | DropAnswer | Corrupt | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    if fault.skip == 0:
                        fault.times -= 1
                        return fault.action
                    fault.skip -= 1
        return None


def to_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """What git keeps of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_fields(file: File, key: str) -> dict[str, Any]:
    """The part of a file's description that only LFS files have."""
    if file.sha256 is None:
        return {}
    return {"lfs": {key: file.sha256, "size": file.size, "pointerSize": len(pointer(file.sha256, file.size))}}


def card_metadata(card: str) -> dict[str, Any]:
    """The metadata at the top of a model card.

    Raises:
        ValueError: it is no YAML mapping.
    """
    block = re.match(r"\s*---\r?\n(.*?)\r?\n?---(\r?\n|$)", card, re.DOTALL)
    try:
        data = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML: {error}") from None
    if data is not None and not isinstance(data, dict):
        raise ValueError("The metadata must be a mapping of names to values")
    return data or {}


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []
REPO = "/api/(models|datasets|spaces)/([^/]+/[^/]+)"


def route(method: str, path: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function carry out the requests of this method and path.

    It gets the hub, the call and the pattern's groups, unquoted, and returns an `Answer` or what is sent as JSON.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((method, re.compile(path), function))
        return function

    return add


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, call: Call) -> Any:
    if call.account is None:
        raise Refusal(401, "Invalid username or password.")
    organizations = [{"type": "org", "name": name} for name in call.account.organizations]
    role = "write" if call.account.may_write else "read"
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return {"type": "user", "id": call.account.name, "name": call.account.name, "orgs": organizations, "auth": token}


@route("POST", "/api/repos/create")
def create_repo(hub: Hub, call: Call) -> Any:
    asked = call.json()
    namespace = asked.get("organization") or (call.account.name if call.account else "")
    hub.check_may_write(call, namespace)
    kind, repo_id = asked.get("type") or "model", f"{namespace}/{asked['name']}"
    url = {"url": f"{hub.url}/{Repo(kind, repo_id).path}"}
    if (kind, repo_id) in hub.repos:
        return Answer(409, to_json({"error": f"You already created this {kind} repo", **url}))
    hub.create(kind, repo_id, private=asked.get("visibility") == "private")
    return url


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: Hub, call: Call) -> Any:
    asked = call.json()
    namespace = asked.get("organization") or (call.account.name if call.account else "")
    repo = hub.repo(call, asked.get("type") or "model", f"{namespace}/{asked['name']}", write=True)
    del hub.repos[repo.kind, repo.id]
    return {}


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, call: Call) -> Any:
    try:
        metadata = card_metadata(call.json()["content"])
    except ValueError as error:
        return Answer(400, to_json({"errors": [{"message": str(error)}], "warnings": []}))
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return {"errors": [], "warnings": warnings}


@route("GET", f"{REPO}(?:/revision/([^/]+))?")
def repo_info(hub: Hub, call: Call, kinds: str, repo_id: str, revision: str | None) -> Any:
    repo = hub.repo(call, kinds, repo_id)
    commit = hub.head(repo, revision or "main")
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
    if call.query.get("blobs") == "true":
        for sibling in siblings:
            file = commit.files[sibling["rfilename"]]
            sibling.update(size=file.size, blobId=file.oid, **lfs_fields(file, "sha256"))
    card = commit.files.get("README.md")
    metadata: dict[str, Any] = {}
    with suppress(ValueError):  # a broken card is none
        metadata = card_metadata((hub.folder / card.etag).read_text(encoding="utf-8")) if card else {}
    described = {key: metadata[key] for key in ("library_name", "pipeline_tag") if key in metadata}
    return {
        "id": repo_id,
        "author": repo_id.split("/")[0],
        "sha": commit.id,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "tags": metadata.get("tags", []),
        "cardData": metadata,
        "siblings": siblings,
        **(described if repo.kind == "model" else {}),
    }


@route("GET", f"{REPO}/tree/([^/]+)(?:/(.+))?")
def tree(hub: Hub, call: Call, kinds: str, repo_id: str, revision: str, folder: str | None) -> Any:
    commit = hub.head(hub.repo(call, kinds, repo_id), revision)
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in sorted(commit.files.items()):
        if path.startswith(prefix):
            parents = path[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(parents) + 1):
                name = prefix + "/".join(parents[:depth])
                entries[name] = {"type": "directory", "path": name, "oid": git_oid(name.encode()), "size": 0}
            entries[path] = {
                "type": "file",
                "path": path,
                "oid": file.oid,
                "size": file.size,
                **lfs_fields(file, "oid"),
            }
    if folder and not entries:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound", {"X-Repo-Commit": commit.id})
    if call.query.get("recursive") != "true":
        entries = {path: entry for path, entry in entries.items() if "/" not in path[len(prefix) :]}
    start = int(call.query.get("cursor", 0))
    end = start + hub.page_size
    headers = {}
    if end < len(entries):
        address = f"{hub.url}/api/{kinds}/{repo_id}/tree/{commit.id}" + (
            f"/{quote(folder, safe='')}" if folder else ""
        )
        headers["Link"] = f'<{address}?recursive={call.query.get("recursive", "false")}&cursor={end}>; rel="next"'
    return Answer(200, to_json(list(entries.values())[start:end]), headers)


@route("GET", f"{REPO}/refs")
def refs(hub: Hub, call: Call, kinds: str, repo_id: str) -> Any:
    repo = hub.repo(call, kinds, repo_id)
    listed: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for ref, target in repo.refs.items():
        group = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        prefix = next(prefix for prefix in group if ref.startswith(prefix))
        listed[group[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": target})
    return listed


@route("POST", f"{REPO}/(branch|tag)/([^/]+)")
def create_ref(hub: Hub, call: Call, kinds: str, repo_id: str, what: str, name: str) -> Any:
    repo = hub.repo(call, kinds, repo_id, write=True)
    asked = call.json()
    if what == "branch":
        ref, start = f"refs/heads/{name}", asked.get("startingPoint", "main")
    else:
        ref, start = f"refs/tags/{asked['tag']}", name
    target = hub.head(repo, start).id
    if ref in repo.refs:
        raise Refusal(409, f"Reference {ref} already exists")
    repo.refs[ref] = target
    return {}


@route("GET", f"{REPO}/auth-check(/write)?")
def auth_check(hub: Hub, call: Call, kinds: str, repo_id: str, write: str | None) -> Any:
    check_gate(hub, call, hub.repo(call, kinds, repo_id, write=write is not None))
    return {}


@route("POST", f"{REPO}/preupload/([^/]+)")
def preupload(hub: Hub, call: Call, kinds: str, repo_id: str, revision: str) -> Any:
    there = hub.head(hub.repo(call, kinds, repo_id, write=True), revision).files
    files = []
    for asked in call.json()["files"]:
        path = asked["path"]
        lfs = hub.is_lfs(path, base64.b64decode(asked["sample"]), asked["size"])
        described = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        files.append({**described, **({"oid": there[path].etag} if path in there else {})})
    return {"files": files}


@route("POST", r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")
def lfs_batch(hub: Hub, call: Call, kinds: str | None, repo_id: str) -> Any:
    repo = hub.repo(call, kinds, repo_id, write=True)
    objects = []
    for asked in call.json()["objects"]:
        sha256, size = asked["oid"], asked["size"]
        described: dict[str, Any] = {"oid": sha256, "size": size}
        objects.append(described)
        if (hub.folder / sha256).exists():
            continue  # Nothing to do: it came with an earlier attempt, or with another file.
        upload_id = f"{len(hub.uploads):08x}"
        number_of_parts = -(-size // hub.part_size)
        hub.uploads[upload_id] = Upload(sha256, size, number_of_parts)
        urls = {
            f"{part}": f"{hub.storage_url}/upload/{sha256}/{upload_id}/{part}"
            for part in range(1, number_of_parts + 1)
        }
        if number_of_parts == 1:
            upload: dict[str, Any] = {"href": urls["1"]}
        else:
            href = f"{hub.url}/api/complete-multipart/{sha256}/{upload_id}"
            upload = {"href": href, "header": {"chunk_size": str(hub.part_size), **urls}}
        verify = {"href": f"{hub.url}/{repo.path}.git/info/lfs/objects/verify"}
        described["actions"] = {"upload": upload, "verify": verify}
    return {"transfer": "basic", "objects": objects}


def finish_upload(hub: Hub, upload: Upload) -> None:
    """Keep an uploaded object if it is what was announced; what has come is forgotten otherwise."""
    content = b"".join(upload.parts[number] for number in sorted(upload.parts))
    upload.parts.clear()
    if (hashlib.sha256(content).hexdigest(), len(content)) != (upload.sha256, upload.size):
        raise Refusal(400, f"BadDigest: what was uploaded is not the object {upload.sha256} of {upload.size} bytes")
    hub.keep(content, lfs=True)


@route("PUT", r"/upload/[0-9a-f]{64}/([0-9a-f]+)/(\d+)")
def put_part(hub: Hub, call: Call, upload_id: str, part: str) -> Any:
    upload = hub.uploads[upload_id]
    upload.parts[int(part)] = call.body
    if upload.number_of_parts == 1:
        finish_upload(hub, upload)
    return Answer(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@route("POST", "/api/complete-multipart/[0-9a-f]{64}/([0-9a-f]+)")
def complete_multipart(hub: Hub, call: Call, upload_id: str) -> Any:
    upload = hub.uploads[upload_id]
    claimed = {part["partNumber"]: part["etag"].strip('"') for part in call.json()["parts"]}
    if claimed != {number: hashlib.md5(content).hexdigest() for number, content in upload.parts.items()}:
        raise Refusal(400, "InvalidPart: the parts are not those that were uploaded")
    finish_upload(hub, upload)
    return {}


@route("POST", r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/verify")
def lfs_verify(hub: Hub, call: Call, kinds: str | None, repo_id: str) -> Any:
    hub.repo(call, kinds, repo_id, write=True)
    check_object(hub, call.json())
    return {}


def check_object(hub: Hub, asked: dict[str, Any]) -> None:
    path = hub.folder / asked["oid"]
    if not path.exists() or path.stat().st_size != asked.get("size", path.stat().st_size):
        raise Refusal(400, f"There is no LFS object {asked['oid']} of this size")


@route("POST", f"{REPO}/commit/([^/]+)")
def create_commit(hub: Hub, call: Call, kinds: str, repo_id: str, revision: str) -> Any:
    repo = hub.repo(call, kinds, repo_id, write=True)
    head = hub.head(repo, revision)
    ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
    if ref not in repo.refs:
        raise Refusal(400, f"{revision} is not a branch")
    header, files = {}, dict(head.files)
    for line in call.body.splitlines():
        key, value = (item := json.loads(line))["key"], item["value"]
        if key == "header":
            header = value
        elif key == "file":
            files[value["path"]] = hub.keep(base64.b64decode(value["content"], validate=True), lfs=False)
        elif key == "lfsFile":
            check_object(hub, value)
            size = (hub.folder / value["oid"]).stat().st_size
            files[value["path"]] = File(git_oid(pointer(value["oid"], size)), size, value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            gone = [
                path for path in files if path == value["path"] or path.startswith(value["path"].rstrip("/") + "/")
            ]
            if not gone or (key == "deletedFile" and gone != [value["path"]]):
                raise Refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            for path in gone:
                del files[path]
        else:
            raise Refusal(400, f"Unknown operation: {key}")
    if header.get("parentCommit") not in (None, head.id):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    pull_request = {}
    if call.query.get("create_pr") == "1":
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        ref = f"refs/pr/{number}"
        repo.refs[ref] = head.id
        pull_request = {"pullRequestUrl": f"{hub.url}/{repo.path}/discussions/{number}"}
    commit = hub.commit(repo, ref, files, header["summary"])
    commit_url = f"{hub.url}/{repo.path}/commit/{commit.id}"
    return {"success": True, "commitOid": commit.id, "commitUrl": commit_url, **pull_request}


def check_gate(hub: Hub, call: Call, repo: Repo) -> None:
    if repo.gated and not hub.may_read(call.account, repo):
        if call.account is None or call.account.name not in repo.granted:
            message = f"Access to {repo.id} is restricted and you are not in the authorized list."
            raise Refusal(401 if call.account is None else 403, message, "GatedRepo")


@route("GET", "/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
def resolve(hub: Hub, call: Call, kinds: str | None, repo_id: str, revision: str, path: str) -> Any:
    repo = hub.repo(call, kinds, repo_id)
    check_gate(hub, call, repo)
    commit = hub.head(repo, revision)
    headers = {"X-Repo-Commit": commit.id}
    file = commit.files.get(path)
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", headers)
    if file.sha256 is None:
        return Answer(200, (hub.folder / file.oid).read_bytes(), {**headers, "ETag": f'"{file.oid}"'})
    headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    return Answer(302, b"", {**headers, "Location": f"{hub.storage_url}/lfs/{file.sha256}/{quote(path)}"})


@route("GET", "/lfs/([0-9a-f]{64})/.+")
def get_object(hub: Hub, call: Call, sha256: str) -> Any:
    return Answer(200, (hub.folder / sha256).read_bytes(), {"ETag": f'"{sha256}"'})


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the route's function carry it out, and sends its answer, or lets it go wrong."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # An answer is two writes; with it each waits 40 ms for the client.
    hub: Hub
    is_storage: bool

    def handle_request(self) -> None:
        target = urlsplit(self.path)
        fault = self.hub.take_fault(self.command, unquote(target.path))
        if isinstance(fault, DropRequest):
            self.read_body(fault.after)
            self.log(None)
            return self.drop()
        body = self.read_body()
        if isinstance(fault, Corrupt) and self.command != "GET":
            body = flip(body, fault.offset)
        answer = fault if isinstance(fault, Answer) else self.carry_out(target.path, target.query, body)
        if isinstance(fault, Corrupt) and self.command == "GET":
            answer = replace(answer, body=flip(answer.body, fault.offset))
        drop_after = fault.after if isinstance(fault, DropAnswer) else -1
        if drop_after is None:
            self.log(None)
            return self.drop()
        self.send(self.part_of(answer), drop_after)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self, limit: int | None = None) -> bytes:
        """The body of the request, or its first `limit` bytes."""
        if "Transfer-Encoding" in self.headers:
            raise NotImplementedError("huggingface_hub sends no body without its length")
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size if limit is None else min(size, limit))
        if limit is None and len(body) < size:
            raise ConnectionAbortedError("The client went away: what it began to ask for is not carried out")
        return body

    def carry_out(self, path: str, query: str, body: bytes) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        try:
            call = Call(self.account(), dict(parse_qsl(query)), body)
            for route_method, pattern, function in ROUTES:
                if route_method == method and (found := pattern.fullmatch(path)):
                    groups = [group if group is None else unquote(group) for group in found.groups()]
                    with self.hub.lock:
                        result = function(self.hub, call, *groups)
                    return result if isinstance(result, Answer) else Answer(200, to_json(result))
            raise Refusal(404, f"This server knows no {self.command} {path}")
        except Refusal as refusal:
            return refusal.answer
        except Exception:
            # A defect of this file or a request that the client should not make: `hub_server` raises it at the end.
            self.hub.errors.append(f"{self.command} {self.path}\n{traceback.format_exc()}")
            return Answer(500)

    def account(self) -> Account | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        token = authorization.removeprefix("Bearer ")
        if token not in self.hub.accounts:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.accounts[token]

    def part_of(self, answer: Answer) -> Answer:
        """The part of a file that a `Range` header asks for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or answer.status != 200 or "ETag" not in answer.headers:
            return answer
        start, size = int(asked[1]), len(answer.body)
        end = min(int(asked[2] or size), size - 1)
        if start > end:
            return Answer(416, headers={"Content-Range": f"bytes */{size}"})
        headers = {**answer.headers, "Content-Range": f"bytes {start}-{end}/{size}"}
        return Answer(206, answer.body[start : end + 1], headers)

    def send(self, answer: Answer, drop_after: int) -> None:
        self.log(answer.status)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body if drop_after < 0 else answer.body[:drop_after])
        if drop_after >= 0:
            self.drop()

    def drop(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client was faster
            self.connection.shutdown(socket.SHUT_RDWR)

    def log(self, status: int | None) -> None:
        authorized = self.headers.get("Authorization") is not None
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, status, authorized, self.headers.get("Range"), self.is_storage)
        self.hub.requests.append(request)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing; `hub.requests` has it all."""


def flip(body: bytes, offset: int) -> bytes:
    return body[:offset] + bytes([body[offset] ^ 1]) + body[offset + 1 :]


class Server(ThreadingHTTPServer):
    """Prints nothing when a client goes away in the middle of a request."""

    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.hub.errors.append(traceback.format_exc())


@contextmanager
def hub_server(folder: Path) -> Iterator[Hub]:
    """Run a Hub on two free ports of loopback: the Hub and its storage of LFS objects.

    Args:
        folder: where the contents of the repositories are kept, one file each, named by its hash.

    Raises:
        AssertionError: at the end, if a request could not be carried out because of a defect of this server.
    """
    hub = Hub(folder)
    servers = []
    for is_storage in (False, True):
        handler = type("BoundHandler", (Handler,), {"hub": hub, "is_storage": is_storage})
        servers.append(Server(("127.0.0.1", 0), handler))
        servers[-1].hub = hub
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
    assert not hub.errors, "The test's Hub failed:\n" + "\n".join(hub.errors)


def environment(hub: Hub, cache_folder: Path, token: str | None = None) -> dict[str, str]:
    """The environment for a fresh process that uses this Hub, with a cache and without the settings of this process.

    Args:
        hub: a running server.
        cache_folder: becomes `HF_HOME`: the cache is in `hub` there, remote code in `modules`.
        token: one of `hub.accounts`; None for a stranger.
    """
    ours = re.compile(r"HF_|HUGGING_?FACE|TRANSFORMERS_(OFFLINE|CACHE)|\w+_PROXY$", re.IGNORECASE)
    variables = {name: value for name, value in os.environ.items() if not ours.match(name)}
    variables |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache_folder),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "*",
    }
    return {**variables, "HF_TOKEN": token} if token else variables


def use_in_process(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, cache_folder: Path, token: str | None = None
) -> list[float]:
    """Point the huggingface_hub of this process to this Hub until the test ends; transformers follows.

    huggingface_hub reads its environment once, at import, into `constants`, and every function but the client's own
    default `HfApi` looks there. Not reached: remote code (transformers keeps its folder of modules from the start) and
    datasets (which copies the endpoint): use `environment` and a fresh process for these.

    The client's waits between two tries are left out.

    Args:
        monkeypatch: pytest's fixture.
        hub: a running server.
        cache_folder: as in `environment`.
        token: one of `hub.accounts`; None for a stranger.

    Returns:
        A list to which each wait that was left out is added, in seconds.
    """
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache_folder / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache_folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made again at its next use
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("NO_PROXY", "*")
    _http.close_session()  # the one that was opened before may go through a proxy
    waits: list[float] = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))
    return waits
