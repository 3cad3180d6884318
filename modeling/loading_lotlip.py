"""What is checked when a LoTLIP is loaded: that its files came whole from the Hub, and whose code runs."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, get_session
from transformers.utils import logging

logger = logging.get_logger(__name__)

# In a repository's folder of the cache: the files that were checked, so that each is read for it once.
CHECKED = ".lotlip-checked"
CODE_FILES = sorted(Path(__file__).parent.glob("*_lotlip.py"))
IS_INSTALLED = __name__.startswith("lotlip_hf.")  # else this is a checkpoint's own code


@contextmanager
def checked_download(
    name_or_path: str | os.PathLike | None, cache_dir: str | os.PathLike | None = None, file: str = "*"
) -> Iterator[None]:
    """
    Loading from the Hub inside it ends with a check of the files in the cache against their checksums, which are their
    names there; a damaged one is removed. huggingface_hub itself compares sizes alone. A cache without symbolic links,
    as on some Windows machines, names no checksums and is not checked.

    Args:
        name_or_path: What is loaded. Nothing is checked of a folder.
        cache_dir: The cache, where it is not the usual one.
        file: Which file is checked, by name; by default all that are there.

    Raises:
        OSError: if a file is damaged.
    """
    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    try:
        yield
    except Exception as error:
        _refuse_damaged(name_or_path, cache, file, error)
        raise
    _refuse_damaged(name_or_path, cache, file)


def _refuse_damaged(
    name_or_path: str | os.PathLike | None, cache: Path, file: str, cause: Exception | None = None
) -> None:
    if name_or_path is None or os.path.exists(name_or_path):
        return
    damaged = _damaged(cache / repo_folder_name(repo_id=str(name_or_path), repo_type="model"), file)
    if not damaged:
        return
    names = ", ".join(sorted({link.name for link in damaged}))
    problem = f"{name_or_path}: {names} did not come whole from the Hub and"
    try:
        for link in damaged:
            blob = link.resolve()
            link.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            if not IS_INSTALLED:  # transformers' copy of a checkpoint's code, which runs
                Path(__file__).with_name(link.name).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{problem} cannot be removed from the cache ({cache}): {error}.") from cause
    raise OSError(f"{problem} has been removed from the cache ({cache}): load again.") from cause


def _damaged(repository: Path, file: str) -> list[Path]:
    """The links in a repository's folder of the cache to what does not match its checksum."""
    record = repository / CHECKED
    checked = set(record.read_text(encoding="utf-8").split("\n")) if record.is_file() else set()
    damaged, whole = [], []
    for link in repository.glob(f"snapshots/*/**/{file}"):
        if not link.is_symlink() or not link.is_file():
            continue
        blob = link.resolve()
        status = blob.stat()
        entry = f"{blob.name} {status.st_size} {status.st_mtime_ns}"
        if entry not in checked:
            (whole if _is_whole(blob) else damaged).append((link, entry))
    if whole:
        with suppress(OSError), record.open("a", encoding="utf-8") as lines:  # of a read-only cache, checked each time
            lines.write("".join(f"{entry}\n" for _, entry in whole))
    return [link for link, _ in damaged]


def _is_whole(blob: Path) -> bool:
    """Whether a file's content is what it is named by: the SHA-256 of a large file; of a small one what git calls it
    or, from some mirrors, its SHA-1. Other names tell nothing."""
    if len(blob.name) == 64:
        return _digest(blob, hashlib.sha256()) == blob.name
    if len(blob.name) == 40:
        return blob.name in (git_hash(blob), _digest(blob, hashlib.sha1()))
    return True


def _digest(file: Path, digest: Any) -> str:
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def warn_of_other_code(
    name_or_path: str | os.PathLike | None,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str = "",
    local_files_only: bool = False,
) -> None:
    """
    Tells of a checkpoint that was published with other code than this, which is the code that runs.

    Args:
        name_or_path: What is loaded, a folder or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        token: The Hub's.
        subfolder: Where the checkpoint lies in it.
        local_files_only: Whether the Hub is not to be asked.
    """
    if name_or_path is None or not IS_INSTALLED:
        return
    if os.path.isdir(name_or_path):
        files = (Path(name_or_path, subfolder, own.name) for own in CODE_FILES)
        others = {file.name: git_hash(file) for file in files if file.is_file()}
    elif local_files_only or constants.HF_HUB_OFFLINE:
        return
    else:
        url = f"{constants.ENDPOINT}/api/models/{name_or_path}/tree/{revision or 'main'}/{subfolder}".rstrip("/")
        try:
            # once, without the retries of huggingface_hub, for loading does not depend on it
            response = get_session().get(url, headers=build_hf_headers(token=token), timeout=5)
            response.raise_for_status()
            others = {entry["path"].rpartition("/")[2]: entry["oid"] for entry in response.json()}
        except Exception as error:  # no connection, no such repository: of that, loading tells
            logger.debug(f"{name_or_path}: its code was not compared ({error}).")
            return
    differing = [own.name for own in CODE_FILES if others.get(own.name, git_hash(own)) != git_hash(own)]
    if differing:
        logger.warning(
            f"{name_or_path} has its own code ({', '.join(differing)}), and it differs from the installed lotlip-hf. "
            "The installed code is used and the other was not run. Outputs may differ from those its author saw."
        )


def git_hash(file: Path) -> str:
    """What git, and the Hub, name a small file by."""
    return _digest(file, hashlib.sha1(b"blob %d\0" % file.stat().st_size))
