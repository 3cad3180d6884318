"""The Hub on loopback, used by the real client; and what that client retries, resumes and verifies when it goes wrong.

lotlip_hf relies on the second part, so a huggingface_hub that behaves otherwise is to be noticed here.
"""

import hashlib
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import (
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from transformers.utils import cached_file

from hub_server import (
    OTHER_TOKEN,
    READ_TOKEN,
    WRITE_TOKEN,
    Answer,
    Corrupt,
    DropAnswer,
    DropRequest,
    Fault,
    Hub,
    environment,
    git_oid,
    hub_server,
    use_in_process,
)

CARD = b"---\nlibrary_name: transformers\npipeline_tag: feature-extraction\ntags:\n- clip\n---\n# A model\n"
WEIGHTS = random.Random(0).randbytes(1_000_000)
FILES = {
    "README.md": CARD,
    "config.json": b'{"model_type": "lotlip"}',
    "model.safetensors": WEIGHTS,
    "tokenizer/vocab.txt": "a\nb\nü\n".encode(),
}
REPO = "ada/model"
DROPPED = (httpx.NetworkError, httpx.RemoteProtocolError)  # as the client sees it, by what it was doing just then


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server(tmp_path / "server") as hub:
        hub.part_size = 300_000  # the weights come in four parts
        yield hub


@pytest.fixture
def waits(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """This process uses the hub, as ada; the seconds that the client would have waited."""
    return use_in_process(monkeypatch, hub, tmp_path / "cache", WRITE_TOKEN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `FILES`."""
    for path, content in FILES.items():
        (tmp_path / "local" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / path).write_bytes(content)
    return tmp_path / "local"


def publish(folder: Path) -> str:
    """Publish a folder to `REPO` in one commit; return its id."""
    HfApi().create_repo(REPO, exist_ok=True)
    return HfApi().upload_folder(repo_id=REPO, folder_path=folder).oid


def cached_files() -> set[str]:
    """What a later load would find in the cache: the files of the snapshots, and blobs whole or not."""
    cache = Path(constants.HF_HUB_CACHE)
    found = {path for folder in ("snapshots", "blobs") for path in cache.glob(f"models--*/{folder}/**/*")}
    return {path.name for path in found if path.is_file()}


def read(folder: str) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    return {path: file.read_bytes() for path, file in files.items() if path != ".gitattributes"}


# The server.


def test_a_folder_is_published_and_comes_back_the_same(hub: Hub, waits: list[float], folder: Path) -> None:
    published = publish(folder)
    assert hub.files(REPO) == FILES
    assert read(snapshot_download(REPO)) == FILES
    assert HfApi().model_info(REPO).sha == published
    result = HfApi().verify_repo_checksums(REPO)
    assert result.checked_count == len(FILES) + 1
    assert result.mismatches == result.missing_paths == result.extra_paths == []
    assert len(hub.matching("PUT", r"^/upload/")) == 4
    to_storage = [request for request in hub.requests if request.to_storage]
    assert len(to_storage) == 5
    assert not any(request.authorized for request in to_storage)
    assert [request for request in hub.requests if request.status not in (200, 302)] == []
    assert waits == []


def test_small_weights_come_in_one_part(hub: Hub, waits: list[float], folder: Path) -> None:
    hub.part_size = 2_000_000
    publish(folder)
    assert hub.files(REPO) == FILES
    assert len(hub.matching("PUT", r"^/upload/")) == 1


def test_what_is_lfs(hub: Hub, waits: list[float]) -> None:
    hub.regular_size = 100
    hub.add(REPO, {"text.txt": b"a" * 100, "long.txt": b"a" * 101, "picture": b"a\0", "model.safetensors": b"a"})
    described = {file.path: file.lfs for file in HfApi().list_repo_tree(REPO)}
    assert described["text.txt"] is None
    assert {path for path, lfs in described.items() if lfs} == {"long.txt", "picture", "model.safetensors"}
    assert described["long.txt"].sha256 == hashlib.sha256(b"a" * 101).hexdigest()


def test_info_of_a_model(hub: Hub, waits: list[float], folder: Path) -> None:
    publish(folder)
    info = HfApi().model_info(REPO, files_metadata=True)
    assert (info.author, info.private) == ("ada", False)
    assert (info.library_name, info.pipeline_tag) == ("transformers", "feature-extraction")
    assert info.card_data is not None
    assert info.card_data.tags == ["clip"]
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    assert {path: sizes[path] for path in FILES} == {path: len(content) for path, content in FILES.items()}


def test_revisions(hub: Hub, waits: list[float], folder: Path) -> None:
    api = HfApi()
    first = publish(folder)
    api.create_tag(REPO, tag="v1", revision="main")
    api.create_branch(REPO, branch="try/out", revision=first)
    (folder / "config.json").write_text("2")
    second = publish(folder)
    on_branch = api.upload_file(path_or_fileobj=b"3", path_in_repo="config.json", repo_id=REPO, revision="try/out").oid
    assert len({first, second, on_branch}) == 3

    def config(revision: str) -> str:
        return Path(hf_hub_download(REPO, "config.json", revision=revision)).read_text()

    assert [config(revision) for revision in ("main", second, "try/out", on_branch)] == ["2", "2", "3", "3"]
    assert config(first) == config("v1") == FILES["config.json"].decode()
    assert read(snapshot_download(REPO, revision="v1")) == FILES
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "try/out": on_branch}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
    api.create_branch(REPO, branch="try/out", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_tag(REPO, tag="v1")


def test_what_is_not_there(hub: Hub, waits: list[float], folder: Path) -> None:
    publish(folder)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("ada/other", "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="v2")
    with pytest.raises(RevisionNotFoundError):
        HfApi().upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id=REPO, revision="v2")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "other.json")
    # transformers asks for many files that need not be there, and remembers which are not.
    asked = len(hub.requests)
    for _ in range(2):
        assert cached_file(REPO, "other.json", _raise_exceptions_for_missing_entries=False) is None
    assert len(hub.matching("HEAD", "other.json")) == 3
    assert {request.status for request in hub.requests[asked:]} == {404}


def test_pages_of_a_large_folder(hub: Hub, waits: list[float]) -> None:
    hub.add(REPO, {f"folder/{number}.txt": b"a" for number in range(7)})
    hub.page_size = 3
    assert len(list(HfApi().list_repo_tree(REPO, recursive=True))) == 9  # with the folder and .gitattributes
    assert len(list(HfApi().list_repo_tree(REPO, "folder"))) == 7
    assert [entry.path for entry in HfApi().list_repo_tree(REPO)] == [".gitattributes", "folder"]


def test_deletions(hub: Hub, waits: list[float], folder: Path) -> None:
    publish(folder)
    operations = [CommitOperationDelete("tokenizer/"), CommitOperationDelete("config.json")]
    HfApi().create_commit(REPO, operations, commit_message="Delete")
    assert set(hub.files(REPO)) == {"README.md", "model.safetensors"}
    with pytest.raises(EntryNotFoundError, match="name doesn't exist"):
        HfApi().delete_file("config.json", REPO)
    HfApi().delete_repo(REPO)
    assert not HfApi().repo_exists(REPO)


def test_parent_commit_keeps_two_writers_apart(hub: Hub, waits: list[float], folder: Path) -> None:
    ours = {"path_or_fileobj": b"ours", "path_in_repo": "config.json", "repo_id": REPO}
    first = publish(folder)
    theirs = hub.add(REPO, {"config.json": b"theirs"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as raised:
        HfApi().upload_file(**ours, parent_commit=first)
    assert raised.value.response.status_code == 412
    assert hub.files(REPO)["config.json"] == b"theirs"
    HfApi().upload_file(**ours, parent_commit=theirs)
    assert hub.files(REPO)["config.json"] == b"ours"


def test_a_pull_request_leaves_main_alone(hub: Hub, waits: list[float], folder: Path) -> None:
    first = publish(folder)
    offered = HfApi().upload_file(path_or_fileobj=b"2", path_in_repo="config.json", repo_id=REPO, create_pr=True)
    assert offered.pr_revision == "refs/pr/1"
    assert hub.files(REPO) == FILES
    assert HfApi().model_info(REPO).sha == first
    assert Path(hf_hub_download(REPO, "config.json", revision="refs/pr/1")).read_text() == "2"


def test_other_kinds_of_repositories(hub: Hub, waits: list[float]) -> None:
    url = HfApi().create_repo("lotlip/demo", repo_type="space", space_sdk="gradio")
    assert str(url) == f"{hub.url}/spaces/lotlip/demo"
    HfApi().upload_file(path_or_fileobj=WEIGHTS, path_in_repo="a.bin", repo_id="lotlip/demo", repo_type="space")
    assert Path(hf_hub_download("lotlip/demo", "a.bin", repo_type="space")).read_bytes() == WEIGHTS
    assert not HfApi().repo_exists("lotlip/demo")


def test_metadata_of_a_card_is_validated(hub: Hub, waits: list[float], folder: Path) -> None:
    first = publish(folder)
    ModelCard(CARD.decode()).validate()
    (folder / "README.md").write_text("---\ntags: [clip\n---\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        publish(folder)
    assert HfApi().model_info(REPO).sha == first
    (folder / "README.md").write_text("No metadata")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        publish(folder)


@pytest.mark.parametrize(
    ("token", "may_read", "may_write"),
    [(WRITE_TOKEN, True, True), (READ_TOKEN, True, False), (OTHER_TOKEN, False, False), (None, False, False)],
)
def test_private_repositories(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    may_read: bool,
    may_write: bool,
) -> None:
    hub.add("lotlip/private", FILES, private=True)
    use_in_process(monkeypatch, hub, tmp_path / "cache", token)
    if may_read:
        assert read(snapshot_download("lotlip/private")) == FILES
    else:
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("lotlip/private")
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("lotlip/private", "config.json")
        assert cached_files() == set()
    if may_write:
        HfApi().upload_file(path_or_fileobj=b"2", path_in_repo="config.json", repo_id="lotlip/private")
    else:
        with pytest.raises(HfHubHTTPError) as raised:
            HfApi().upload_file(path_or_fileobj=b"2", path_in_repo="config.json", repo_id="lotlip/private")
        assert raised.value.response.status_code == {READ_TOKEN: 403, OTHER_TOKEN: 404, None: 401}[token]
        with pytest.raises(HfHubHTTPError):
            HfApi().create_repo("lotlip/new")
    assert hub.files("lotlip/private")["config.json"] == (b"2" if may_write else FILES["config.json"])


def test_gated_repositories(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, FILES)
    repo = hub.repos["model", REPO]
    repo.gated = True
    use_in_process(monkeypatch, hub, tmp_path / "cache", OTHER_TOKEN)
    assert HfApi().model_info(REPO).gated == "manual"
    with pytest.raises(GatedRepoError):
        hf_hub_download(REPO, "config.json")
    with pytest.raises(GatedRepoError):
        HfApi().auth_check(REPO)
    repo.granted.add("bob")
    assert Path(hf_hub_download(REPO, "config.json")).read_bytes() == FILES["config.json"]


def test_a_token_that_is_not_valid(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    hub.add(REPO, FILES)
    use_in_process(monkeypatch, hub, tmp_path / "cache", "hf_expired")
    with pytest.raises(HfHubHTTPError, match="HF_TOKEN environment variable is invalid"):
        HfApi().whoami()
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        publish(folder)
    # Even a public repository: the client does not try again without the token.
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        hf_hub_download(REPO, "config.json")


def test_a_fresh_process(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, FILES, private=True)
    script = f"from huggingface_hub import snapshot_download; print(snapshot_download({REPO!r}))"

    def run(name: str, token: str | None) -> subprocess.CompletedProcess[str]:
        variables = environment(hub, tmp_path / name, token)
        return subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True)

    ran = run("ada", READ_TOKEN)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path / "ada" / "hub"))
    assert read(ran.stdout.strip()) == FILES
    ran = run("stranger", None)
    assert ran.returncode != 0
    assert "RepositoryNotFoundError" in ran.stderr


def test_the_client_is_itself_again_afterwards(hub: Hub, tmp_path: Path) -> None:
    before = constants.ENDPOINT, constants.HF_HUB_CACHE, HfApi().endpoint, get_token()
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_in_process(monkeypatch, hub, tmp_path / "cache", WRITE_TOKEN)
        assert (constants.ENDPOINT, HfApi().endpoint, get_token()) == (hub.url, hub.url, WRITE_TOKEN)
    assert (constants.ENDPOINT, constants.HF_HUB_CACHE, HfApi().endpoint, get_token()) == before


def test_a_request_that_ends_early_is_not_carried_out(hub: Hub) -> None:
    created = hub.add(REPO, FILES)
    head = (
        f"POST /api/models/{REPO}/commit/main HTTP/1.1\r\nAuthorization: Bearer {WRITE_TOKEN}\r\nContent-Length: 999"
    )
    operations = (
        b'{"key": "header", "value": {"summary": ""}}\n{"key": "deletedFile", "value": {"path": "config.json"}}\n'
    )
    port = urlsplit(hub.url).port
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode() + operations)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert hub.repos["model", REPO].refs["refs/heads/main"] == created


def test_defects_of_the_server_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="KeyError"), hub_server(tmp_path / "server") as hub:
        assert httpx.put(f"{hub.url}/upload/{'0' * 64}/ff/1", content=b"").status_code == 500


# Uploads that go wrong.


@pytest.mark.parametrize("after", [0, 100_000])
def test_a_dropped_upload_is_tried_again(hub: Hub, waits: list[float], folder: Path, after: int) -> None:
    hub.faults.append(Fault("PUT", r"^/upload/.*/2$", DropRequest(after), times=2))
    publish(folder)
    assert hub.files(REPO) == FILES
    parts = [(request.path[-1], request.status) for request in hub.matching("PUT", r"^/upload/")]
    assert parts == [("1", 200), ("2", None), ("2", None), ("2", 200), ("3", 200), ("4", 200)]
    assert waits == [1, 2]


def test_a_lost_answer_to_an_upload_is_survived(hub: Hub, waits: list[float], folder: Path) -> None:
    hub.faults.append(Fault("PUT", r"^/upload/", DropAnswer()))
    hub.faults.append(Fault("POST", "/complete-multipart/", Answer(500)))
    publish(folder)
    assert hub.files(REPO) == FILES
    assert waits == [1, 1]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "^/upload/"),
        ("POST", "/complete-multipart/"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch$"),
        ("POST", "/objects/verify$"),
    ],
)
@pytest.mark.parametrize(
    ("answer", "wait"), [(Answer(429, headers={"Retry-After": "7"}), 8), (Answer(500), 1), (Answer(503), 1)]
)
def test_a_busy_server_is_asked_again(
    hub: Hub, waits: list[float], folder: Path, method: str, path: str, answer: Answer, wait: int
) -> None:
    hub.faults.append(Fault(method, path, answer))
    publish(folder)
    assert hub.files(REPO) == FILES
    assert waits == [wait]


def test_an_upload_that_fails_leaves_nothing_visible_and_goes_on_where_it_was(
    hub: Hub, waits: list[float], folder: Path
) -> None:
    (folder / "other.safetensors").write_bytes(WEIGHTS[:100])
    created = hub.add(REPO, {"config.json": b"old"})
    hub.faults.append(Fault("PUT", r"^/upload/.*/3$", DropRequest(1000), times=6))
    with pytest.raises(RuntimeError, match=r"Error while uploading '.*model\.safetensors'") as raised:
        publish(folder)
    assert isinstance(raised.value.__cause__, DROPPED)
    assert waits == [1, 2, 4, 8, 8]  # six attempts
    assert hub.files(REPO) == {"config.json": b"old"}
    assert HfApi().model_info(REPO).sha == created
    assert hub.matching("POST", "/commit/") == []

    # Again: the object that came whole is not sent again, the parts of the other one are.
    sent = len(hub.matching("PUT", r"^/upload/"))
    publish(folder)
    assert hub.files(REPO) == {**FILES, "other.safetensors": WEIGHTS[:100]}
    assert len(hub.matching("PUT", r"^/upload/")) == sent + 4


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_upload_is_not_tried_again(hub: Hub, waits: list[float], folder: Path, status: int) -> None:
    hub.faults.append(Fault("PUT", r"^/upload/", Answer(status)))
    with pytest.raises(RuntimeError, match="Error while uploading") as raised:
        publish(folder)
    assert isinstance(raised.value.__cause__, HfHubHTTPError)
    assert waits == []
    assert hub.files(REPO) == {}


def test_a_corrupt_lfs_upload_is_refused_by_the_server(hub: Hub, waits: list[float], folder: Path) -> None:
    hub.faults.append(Fault("PUT", r"^/upload/.*/2$", Corrupt(1234)))
    with pytest.raises(RuntimeError, match="Error while uploading") as raised:
        publish(folder)
    assert isinstance(raised.value.__cause__, BadRequestError)
    assert hub.files(REPO) == {}
    publish(folder)
    assert hub.files(REPO) == FILES


def test_nobody_notices_a_regular_file_that_is_corrupted_on_its_way_up(
    hub: Hub, waits: list[float], folder: Path
) -> None:
    """A regular file is sent within the commit, without a hash; only a look at what was published finds it."""
    (folder / "model.safetensors").unlink()
    hub.faults.append(Fault("POST", "/commit/", Corrupt(200)))
    publish(folder)
    wrong = [path for path, content in hub.files(REPO).items() if content != FILES[path]]
    assert len(wrong) == 1
    assert [found["path"] for found in HfApi().verify_repo_checksums(REPO, local_dir=folder).mismatches] == wrong


@pytest.mark.parametrize(
    ("method", "path", "action"),
    [
        ("POST", "/repos/create$", Answer(503)),
        ("POST", "/validate-yaml$", Answer(503, b"{}")),
        ("POST", "/commit/", Answer(503)),
        ("POST", "/commit/", Answer(429, headers={"Retry-After": "1"})),
        ("POST", "/commit/", Answer(401)),
        ("POST", "/commit/", DropRequest(10)),
        ("GET", "/whoami-v2$", Answer(503)),
    ],
)
def test_what_the_client_asks_only_once(
    hub: Hub, waits: list[float], folder: Path, method: str, path: str, action: Answer | DropRequest
) -> None:
    """Whoever wants these to be tried again does it; the objects that were uploaded stay, so it costs little."""
    hub.faults.append(Fault(method, path, action))
    with pytest.raises((HfHubHTTPError, *DROPPED)):
        HfApi().whoami()
        publish(folder)
    assert waits == []
    if ("model", REPO) in hub.repos:
        assert hub.files(REPO) == {}
    uploads = len(hub.matching("PUT", r"^/upload/"))
    publish(folder)
    assert hub.files(REPO) == FILES
    assert len(hub.matching("PUT", r"^/upload/")) == (uploads or 4)


def test_a_lost_answer_to_a_commit(hub: Hub, waits: list[float], folder: Path) -> None:
    """The client raises although all is published; publishing the same again returns that commit."""
    hub.faults.append(Fault("POST", "/commit/", DropAnswer()))
    with pytest.raises(DROPPED):
        publish(folder)
    assert hub.files(REPO) == FILES
    assert publish(folder) == hub.repos["model", REPO].refs["refs/heads/main"]
    assert len(hub.repos["model", REPO].commits) == 2
    assert waits == []


# Downloads that go wrong.


def test_a_dropped_download_is_resumed(
    hub: Hub, waits: list[float], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps of `DOWNLOAD_CHUNK_SIZE`; what has come of a last, smaller step is asked for again."""
    publish(folder)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.faults.append(Fault("GET", r"model\.safetensors$", DropAnswer(250_000), times=2))
    assert read(snapshot_download(REPO)) == FILES
    asked = [(request.range, request.status) for request in hub.matching("GET", r"^/lfs/")]
    assert asked == [(None, 200), ("bytes=200000-", 206), ("bytes=400000-", 206)]
    assert waits == [1, 1]


def test_a_dropped_download_of_less_than_a_chunk_begins_again(hub: Hub, waits: list[float], folder: Path) -> None:
    publish(folder)
    assert len(WEIGHTS) < constants.DOWNLOAD_CHUNK_SIZE == 10 * 1024 * 1024
    hub.faults.append(Fault("GET", r"model\.safetensors$", DropAnswer(250_000), times=2))
    assert read(snapshot_download(REPO)) == FILES
    assert [request.range for request in hub.matching("GET", r"^/lfs/")] == [None, None, None]


@pytest.mark.parametrize("after", [None, 0, 250_000])
def test_a_download_that_fails_leaves_nothing_in_the_cache(
    hub: Hub, waits: list[float], folder: Path, after: int | None
) -> None:
    publish(folder)
    hub.faults.append(Fault("GET", r"model\.safetensors$", DropAnswer(after), times=6))
    with pytest.raises(DROPPED):
        hf_hub_download(REPO, "model.safetensors")
    assert waits == [1, 1, 1, 1, 1]  # six attempts
    assert cached_files() == set()
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS


@pytest.mark.parametrize("path", [r"^/lfs/", r"/resolve/.*/config\.json$"])
@pytest.mark.parametrize("status", [401, 500, 503])
def test_the_content_of_a_file_is_asked_for_once_if_the_server_fails(
    hub: Hub, waits: list[float], folder: Path, path: str, status: int
) -> None:
    publish(folder)
    name = "model.safetensors" if "lfs" in path else "config.json"
    hub.faults.append(Fault("GET", path, Answer(status)))
    with pytest.raises(HfHubHTTPError, match=str(status)):
        hf_hub_download(REPO, name)
    assert waits == []
    assert cached_files() == set()
    assert Path(hf_hub_download(REPO, name)).read_bytes() == FILES[name]


def test_a_download_waits_for_as_long_as_the_server_asks(hub: Hub, waits: list[float], folder: Path) -> None:
    publish(folder)
    hub.faults.append(Fault("GET", r"^/lfs/", Answer(429, headers={"Retry-After": "7"}), times=2))
    assert read(snapshot_download(REPO)) == FILES
    assert waits == [8, 8]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_first_request_for_a_file_is_tried_again_if_the_cache_has_none(
    hub: Hub, waits: list[float], folder: Path, status: int
) -> None:
    publish(folder)
    hub.faults.append(Fault("HEAD", "config.json", Answer(status), times=3))
    path = hf_hub_download(REPO, "config.json")
    assert Path(path).read_bytes() == FILES["config.json"]
    assert waits == [1, 2]

    # Once there is one, it is taken at once, even if it is old.
    hub.add(REPO, {"config.json": b"new"})
    hub.faults.append(Fault("HEAD", "config.json", Answer(status)))
    assert hf_hub_download(REPO, "config.json") == path
    assert waits == [1, 2]


def test_a_dropped_first_request_for_a_file_is_not_tried_again(hub: Hub, waits: list[float], folder: Path) -> None:
    """It raises httpx's own exception, even if the cache has the file."""
    publish(folder)
    for _ in range(2):
        hub.faults.append(Fault("HEAD", "config.json", DropAnswer()))
        with pytest.raises(DROPPED):
            hf_hub_download(REPO, "config.json")
        assert waits == []
        hf_hub_download(REPO, "config.json")


def test_a_snapshot_needs_the_list_of_files(hub: Hub, waits: list[float], folder: Path) -> None:
    publish(folder)
    hub.faults.append(Fault("GET", "^/api/models/ada/model/revision", Answer(503)))
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download(REPO)
    hub.faults.append(Fault("GET", "/tree/", Answer(503)))
    assert read(snapshot_download(REPO)) == FILES
    assert waits == [1]


def test_a_file_of_another_size_is_refused(hub: Hub, waits: list[float], folder: Path) -> None:
    publish(folder)
    hub.faults.append(Fault("GET", r"^/lfs/", Answer(200, WEIGHTS[:-1])))
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download(REPO, "model.safetensors")
    assert cached_files() == set()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_nobody_notices_a_download_with_a_wrong_byte(hub: Hub, waits: list[float], folder: Path, name: str) -> None:
    """The client compares sizes, not hashes. The wrong file stays in the cache until somebody verifies it."""
    publish(folder)
    hub.faults.append(Fault("GET", rf"{name}$", Corrupt(5)))
    path = Path(hf_hub_download(REPO, name))
    assert path.read_bytes() != FILES[name]
    assert len(path.read_bytes()) == len(FILES[name])
    assert Path(hf_hub_download(REPO, name)) == path
    assert Path(snapshot_download(REPO)) / name == path

    # How it can be found: the name of a blob is the hash of its content, so without a request ...
    blob = path.resolve()
    right, actual = FILES[name], path.read_bytes()
    if name == "model.safetensors":
        assert blob.name == hashlib.sha256(right).hexdigest() != hashlib.sha256(actual).hexdigest()
    else:
        assert blob.name == git_oid(right) != git_oid(actual)
    # ... and with one, by the client.
    assert [wrong["path"] for wrong in HfApi().verify_repo_checksums(REPO).mismatches] == [name]
    hf_hub_download(REPO, name, force_download=True)
    assert HfApi().verify_repo_checksums(REPO).mismatches == []
    assert path.read_bytes() == right


def test_a_wrong_byte_after_a_resumed_download_too(
    hub: Hub, waits: list[float], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the second request hits the file's byte, not that of the rest which is sent."""
    publish(folder)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.faults.append(Fault("GET", r"^/lfs/", DropAnswer(250_000)))
    hub.faults.append(Fault("GET", r"^/lfs/", Corrupt(300_000)))
    actual = Path(hf_hub_download(REPO, "model.safetensors")).read_bytes()
    assert [position for position in range(len(WEIGHTS)) if actual[position] != WEIGHTS[position]] == [300_000]
