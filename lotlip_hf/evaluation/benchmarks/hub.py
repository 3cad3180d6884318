"""Data sets on the Hub: the commit to read, and errors with advice."""

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
    """Converts errors of the Hub in this context to a `ValueError` with advice."""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{repo_id} is a gated data set. Accept its conditions on the Hub and log in with `hf auth login`."
        ) from error
    except OfflineModeIsEnabled as error:
        raise not_kept(repo_id, revision) from error
    except HfHubHTTPError as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"{repo_id} is neither a folder nor a data set on the Hub{at} that is visible to this token "
            f"({reason_of(error)}). Check the name, or log in with `hf auth login`."
        ) from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        if constants.HF_HUB_OFFLINE:
            raise not_kept(repo_id, revision) from error
        raise ValueError(
            f"{repo_id}: the Hub cannot be reached ({reason_of(error)}). Set HF_HUB_OFFLINE=1 to use the cache."
        ) from error


def not_kept(repo_id: str, what: str | None) -> ValueError:
    """Makes the error for data that are not in the cache while HF_HUB_OFFLINE is set."""
    return ValueError(
        f"HF_HUB_OFFLINE is set, but {repo_id} is not a folder and {f'{what} of it' if what else 'it'} is not in the "
        "cache. Run once with HF_HUB_OFFLINE=0 to fill the cache."
    )


def reason_of(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def hub_commit(repo_id: str, revision: str | None) -> str:
    """
    Returns the commit of a revision of a data set on the Hub. With HF_HUB_OFFLINE, it is the commit at the time of the
    last download.
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
            "%s: HF_HUB_OFFLINE is set, so the commit %s in the cache is used. A newer commit may exist.",
            repo_id,
            commit,
        )
        return commit
    with from_hub(repo_id, revision):
        commit = str(HfApi().dataset_info(repo_id, revision=revision).sha)
        with suppress(RemoteEntryNotFoundError):  # the cache stores the commit, even without a README.md
            hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision)
    return commit


def hub_archive(repo_id: str, revision: str | None, commit: str) -> str:
    """Downloads the only zip archive of a data set on the Hub, or finds it in the cache."""
    with from_hub(repo_id, revision):
        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repo_id, repo_type="dataset", revision=commit, allow_patterns="*.zip"))
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.zip")]
        else:
            names = HfApi().list_repo_files(repo_id, repo_type="dataset", revision=commit)
        archives = [name for name in names if name.endswith(".zip")]
        if len(archives) != 1:
            raise ValueError(
                f"{repo_id} must have exactly one zip archive, but has {shown(archives) or 'none'}. Pass a folder."
            )
        return hf_hub_download(repo_id, archives[0], repo_type="dataset", revision=commit)
