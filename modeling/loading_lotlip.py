"""What is checked when a LoTLIP is loaded: that its files came whole from the Hub, and whose code runs."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoFile, constants
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Files of at most so many bytes are checked at each loading, larger ones when they have just come.
SMALL_FILE = 1_000_000
CODE_FILES = sorted(Path(__file__).parent.glob("*_lotlip.py"))


@contextmanager
def checked_download(
    name_or_path: str | os.PathLike | None, cache_dir: str | os.PathLike | None = None
) -> Iterator[None]:
    """
    Loading from the Hub inside it ends with a check of the files in the cache against their checksums, which are their
    names there; a damaged one is removed. huggingface_hub itself compares sizes alone.

    Args:
        name_or_path: What is loaded. Nothing is checked of a folder.
        cache_dir: The cache, where it is not the usual one.

    Raises:
        OSError: if a file is damaged.
    """
    cache, started = Path(cache_dir or constants.HF_HUB_CACHE), time.time()
    try:
        yield
    except Exception as error:
        _refuse_damaged(name_or_path, cache, started, error)
        raise
    _refuse_damaged(name_or_path, cache, started)


def _refuse_damaged(
    name_or_path: str | os.PathLike | None, cache: Path, started: float, cause: Exception | None = None
) -> None:
    if name_or_path is None or os.path.exists(name_or_path):
        return
    damaged = _remove_damaged(cache / repo_folder_name(repo_id=str(name_or_path), repo_type="model"), started)
    if damaged:
        raise OSError(
            f"{name_or_path}: {', '.join(damaged)} did not come whole from the Hub and has been removed from the "
            f"cache ({cache}): load again."
        ) from cause


def _remove_damaged(repository: Path, started: float) -> list[str]:
    """Removes what does not match its checksum from a repository's folder in the cache; returns the files' names."""
    damaged = []
    for link in repository.glob("snapshots/*/**/*"):
        if not link.is_symlink() or not link.is_file():  # a cache without links does not name the checksums
            continue
        blob = link.resolve()
        status = blob.stat()
        if (status.st_size <= SMALL_FILE or status.st_mtime >= started - 1) and not _is_whole(blob):
            damaged.append((link, blob))
    for link, blob in damaged:
        link.unlink()
        blob.unlink(missing_ok=True)
    return sorted({link.name for link, _ in damaged})


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
    name_or_path: str | os.PathLike | None, revision: str | None = None, token: str | bool | None = None
) -> None:
    """
    Tells of a checkpoint that was published with other code than this, which is the code that runs.

    Args:
        name_or_path: What is loaded, a folder or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        token: The Hub's.
    """
    if name_or_path is None or not __name__.startswith("lotlip_hf."):  # else this is the checkpoint's own code
        return
    if os.path.isdir(name_or_path):
        files = (Path(name_or_path) / own.name for own in CODE_FILES)
        others = {file.name: git_hash(file) for file in files if file.is_file()}
    else:
        try:
            tree = HfApi(token=token).list_repo_tree(str(name_or_path), revision=revision)
            others = {entry.path: entry.blob_id for entry in tree if isinstance(entry, RepoFile)}
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
