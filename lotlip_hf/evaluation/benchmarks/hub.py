"""Data sets on the Hub: which commit is read, and what to do if the Hub does not give it."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from .files import shown

logger = logging.getLogger(__name__)

COMMIT = re.compile("[0-9a-f]{40}")


@contextmanager
def from_hub(repo_id: str, revision: str | None) -> Iterator[None]:
    """Says what to do where the Hub does not give a data set."""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{repo_id}: its owners ask for something first. Agree to it on the data set's page on the Hub, and log "
            "in with `hf auth login`."
        ) from error
    except OfflineModeIsEnabled as error:
        raise not_kept(repo_id, revision) from error
    except HfHubHTTPError as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"{repo_id}: there is no such folder, and the Hub has no such data set{at} or does not show it to this "
            f"token ({reason_of(error)})."
        ) from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        if constants.HF_HUB_OFFLINE:
            raise not_kept(repo_id, revision) from error
        raise ValueError(
            f"{repo_id}: the Hub cannot be reached ({reason_of(error)}). With HF_HUB_OFFLINE=1 what was read of it "
            "before is taken from the cache."
        ) from error


def not_kept(repo_id: str, what: str | None) -> ValueError:
    """The error for what is not in the caches where HF_HUB_OFFLINE is set."""
    return ValueError(
        f"{repo_id}: there is no such folder, HF_HUB_OFFLINE is set, and the cache does not have "
        f"{f'{what} of it' if what else 'it'}. Run the same with HF_HUB_OFFLINE=0 once: what is read then is kept."
    )


def reason_of(error: Exception) -> str:
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def hub_commit(repo_id: str, revision: str | None) -> str:
    """
    The commit that a revision of a data set on the Hub stands for; with HF_HUB_OFFLINE, stood for when something was
    last read of it.
    """
    if constants.HF_HUB_OFFLINE:
        commit = revision
        if commit is None or not COMMIT.fullmatch(commit):
            folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="dataset"))
            reference = folder / "refs" / (revision or "main")
            if not reference.is_file():
                raise not_kept(repo_id, revision)
            commit = reference.read_text(encoding="utf-8").strip()
        logger.warning(
            "%s: HF_HUB_OFFLINE is set; the commit %s in the cache is scored, which may not be the newest.",
            repo_id,
            commit,
        )
        return commit
    with from_hub(repo_id, revision):
        commit = str(HfApi().dataset_info(repo_id, revision=revision).sha)
        with suppress(RemoteEntryNotFoundError):  # the cache notes what the revision stands for, even if there is none
            hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision)
    return commit


def hub_archive(repo_id: str, revision: str | None, commit: str) -> str:
    """The only zip archive of a data set on the Hub, downloaded or from the cache."""
    with from_hub(repo_id, revision):
        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repo_id, repo_type="dataset", revision=commit, allow_patterns="*.zip"))
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.zip")]
        else:
            names = HfApi().list_repo_files(repo_id, repo_type="dataset", revision=commit)
        archives = [name for name in names if name.endswith(".zip")]
        if len(archives) != 1:
            raise ValueError(f"{repo_id}: expected one zip archive, found {shown(archives) or 'none'}.")
        return hf_hub_download(repo_id, archives[0], repo_type="dataset", revision=commit)
