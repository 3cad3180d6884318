"""Where benchmarks come from: what a task is, folders of files, and tables on the Hub or in a folder."""

import glob
import json
import logging
import os
import re
import unicodedata
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    DatasetInfo,
    Image,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.arrow_reader import ArrowReader
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

from ...data.readers import KINDS, every_row
from ...data.records import check_inside, hub_folders, is_hub_name, locate_image, undecoded
from ...data.sampling import split_full_stops
from ...files import parse_json, printable, read_regular
from ...images import MAX_FILE_BYTES, ImageSource, image_extensions, image_source
from ..tasks import ClassificationData, IncompleteDataError, RetrievalData

logger = logging.getLogger(__name__)

COMMIT = re.compile("[0-9a-f]{40}")
# Files that `save_to_disk` writes, of a split or of several.
SAVED_DATASET = ("state.json", "dataset_dict.json")
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}
NORMALIZATION = 'split at line ends, "</s>" and full stops; stripped; joined with ". "'


@dataclass(frozen=True)
class Task:
    """
    A benchmark.

    Args:
        key: What `--task` calls it.
        name: What a table calls it.
        id: What its data set is called on the Hub, or a name of its own.
        description: What is scored, in a line.
        source: Where to get it, and how it is to lie in its folder.
        reader: What reads it.
        options: The options of [`load_benchmark`] that it has.
        num_images: Images of the whole; fewer are refused. `None` where there is no set number.
        num_texts: Texts of the whole; fewer are refused.
        split: The split that it is scored on.
        hub_id: The data set on the Hub that is read where no data is given.
        hub_revision: The revision of it.
    """

    key: str
    name: str
    id: str
    description: str
    source: str
    reader: "Callable[[Task, str | None, Options], RetrievalData | ClassificationData]"
    options: tuple[str, ...]
    num_images: int | None = None
    num_texts: int | None = None
    split: str | None = None
    hub_id: str | None = None
    hub_revision: str | None = None


@dataclass(frozen=True)
class Options:
    """The options of [`load_benchmark`], which see; `None` where the task decides."""

    num_images: int | None = None
    split: str | None = None
    revision: str | None = None
    config: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    class_names: str | None = None
    captions: str | None = None
    normalize: bool | None = None
    image_root: str | None = None
    max_record_bytes: int | None = None


def normalize_caption(text: str) -> str:
    """
    Normalises a caption as the official LoTLIP evaluation does: split at every line end, `</s>` and full stop, those
    of abbreviations and numbers included; strip; drop what is empty; join with `". "`.

    Args:
        text: A caption.

    Returns:
        The caption, without a full stop at its end; empty if nothing else was in it.

    Example:

    ```python
    >>> normalize_caption("A 3.5 m boat...\\nIt is red. ")
    'A 3. 5 m boat. It is red'
    ```
    """
    return ". ".join(split_full_stops(text))


# What readers make, and what all of them check.


class LazyImages(Sequence[ImageSource]):
    """
    Images that are read when they are asked for.

    Args:
        count: How many there are.
        load: Gives the image at a place.
    """

    def __init__(self, count: int, load: Callable[[int], ImageSource]) -> None:
        self._count, self._load = count, load

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._load(place) for place in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"there are {self._count} images, no number {index}")
        return self._load(index % self._count)


@dataclass
class Gaps:
    """What a reader found missing, by its kind; all of it is said at once."""

    task: Task
    missing: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        self.missing.setdefault(kind, []).append(name)

    def refuse(self, total: int) -> None:
        """Raises IncompleteDataError if there is any."""
        if self.missing:
            lacks = (f"{len(names)} {kind} are missing ({shown(names)})" for kind, names in self.missing.items())
            problem = f"of {total} images with all that belongs to them, {', and '.join(lacks)}"
            raise incomplete(self.task, problem, first_alone=True)


def incomplete(task: Task, problem: str, *, first_alone: bool = False) -> IncompleteDataError:
    """The error for what is missing; with `first_alone` it tells of `num_images`, which may do without."""
    advice = " To score the first N images alone, ask for it: num_images=N (--num-images N)." if first_alone else ""
    return IncompleteDataError(
        f"{task.name} is not complete: {problem}. Nothing is scored on what is there. Where to get it: "
        f"{task.source}{advice}"
    )


def shown(names: Sequence[str], most: int = 3) -> str:
    """The first names of many, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_of(task: Task, options: Options, items: Sequence[Any], what: str) -> Sequence[Any]:
    """
    The items to score: the first `num_images`, or all of them, if they are as many as the benchmark has; of a split
    that is not the benchmark's they may be any number.
    """
    if options.num_images is not None:
        if len(items) < options.num_images:
            raise incomplete(task, f"{what} has {len(items)} images, and `num_images` asks for {options.num_images}")
        return items[: options.num_images]
    expected = task.num_images if options.split in (None, task.split) else None
    if not len(items):
        raise incomplete(task, f"{what} has no images")
    if expected is not None and len(items) < expected:
        raise incomplete(task, f"{what} has {len(items)} images of {expected}", first_alone=True)
    if expected is not None and len(items) > expected:
        logger.warning("%s has %d images, not the %d that are reported on.", what, len(items), expected)
    return items


def retrieval_data(
    task: Task,
    options: Options,
    gaps: Gaps,
    images: Sequence[ImageSource | None],
    names: Sequence[str],
    texts: Sequence[Sequence[str | None]],
    *,
    protocol: Mapping[str, Any],
    captions_per_image: int | None = None,
    normalize: bool = True,
    id: str | None = None,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
) -> RetrievalData:
    """
    `images` [I] and `texts` [I], each image's own, as a data set; refused if `gaps` were found, or are here: a text
    that is `None` or empty, an image with no text or fewer than `captions_per_image`. `normalize` is whether captions
    are normalised where the options do not say.
    """
    normalize = normalize if options.normalize is None else options.normalize
    all_texts: list[str] = []
    text_to_image: list[int] = []
    for place, own in enumerate(texts):
        if captions_per_image is not None and len(own) < captions_per_image:
            gaps.add("captions", f"{names[place]}: {len(own)} of {captions_per_image}")
        elif not own:
            gaps.add("captions", names[place])
        for text in own:
            text = normalize_caption(text) if normalize and text is not None else text
            if text is None or not text.strip():
                gaps.add("captions", f"{names[place]}: {'none' if text is None else 'empty'}")
                continue
            all_texts.append(text)
            text_to_image.append(place)
    gaps.refuse(len(images))
    expected = task.num_texts if options.num_images is None and options.split in (None, task.split) else None
    if expected is not None and len(all_texts) < expected:
        raise incomplete(
            task, f"its {len(images)} images have {len(all_texts)} texts, not {expected}", first_alone=True
        )
    protocol = dict(protocol)
    protocol["normalization"] = NORMALIZATION if normalize else None
    protocol["num_duplicate_texts"] = len(all_texts) - len(set(all_texts))
    if options.num_images is not None:
        protocol["first_images"] = options.num_images
    return RetrievalData(
        id=id or task.id,
        name=name or task.name,
        images=cast(Sequence[ImageSource], images),
        image_names=names,
        texts=all_texts,
        text_to_image=text_to_image,
        split=split,
        revision=revision,
        protocol=protocol,
    )


# Files.


def data_folder(task: Task, data: str | None) -> Path:
    """The folder of a data set that is in none of its forms on the Hub, or that was given as a folder."""
    if data is None:
        raise ValueError(f"`data`: {task.key} needs its folder (--data DIR). Where to get it: {task.source}")
    if not os.path.isdir(data):
        reason = "not a folder" if os.path.exists(data) else "no such folder"
        raise FileNotFoundError(f"{data}: {reason}. {task.name}, where to get it: {task.source}")
    return Path(data)


def find_file(task: Task, folder: Path, *places: str) -> Path:
    """The first of these files that is there."""
    for place in places:
        if (folder / place).is_file():
            return folder / place
    raise incomplete(task, f"{folder} holds no {places[0]}, neither at the top nor where else it may be")


def image_roots(folder: Path | str, options: Options) -> tuple[str, ...]:
    """The folders that images must lie in: the one that is asked for, or the data's own."""
    return (options.image_root or os.fspath(folder),)


class ImageFinder:
    """
    Looks files up in folders that are listed once each.

    Args:
        roots: The folders that images must lie in, links followed.
    """

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = roots
        self._folders: dict[Path, dict[str, str]] = {}

    def find(self, *paths: Path) -> str | None:
        """
        The first of these files that is there. Its name may be spelled with other code points for the same letters, as
        some systems unpack archives, and its extension in capitals; a name without one stands for an image's.

        Raises:
            ValueError: if it lies outside of the roots.
        """
        for path in paths:
            names = self._names(path.parent)
            for spelling in (path.name, _spelling(path.name)):
                if spelling in names:
                    found = str(path.parent / names[spelling])
                    check_inside(found, self._roots)
                    return found
        return None

    def others(self, folder: Path, known: Collection[str]) -> list[str]:
        """The images in a folder that are none of those known by name."""
        spellings = {_spelling(name) for name in known}
        spellings |= {os.path.splitext(name)[0] for name in spellings}
        images = {name for name in self._names(folder).values() if is_image_name(name)}
        return sorted(
            name for name in images if not {_spelling(name), os.path.splitext(_spelling(name))[0]} & spellings
        )

    def _names(self, folder: Path) -> dict[str, str]:
        if folder not in self._folders:
            listed = sorted(os.listdir(folder)) if folder.is_dir() else []
            names = {name: name for name in listed}
            for name in listed:
                names.setdefault(_spelling(name), name)
            for name in filter(is_image_name, listed):
                names.setdefault(os.path.splitext(_spelling(name))[0], name)
            self._folders[folder] = names
        return self._folders[folder]


def _spelling(name: str) -> str:
    stem, extension = os.path.splitext(unicodedata.normalize("NFC", name))
    return stem + (".jpg" if extension.lower() == ".jpeg" else extension.lower())


def is_image_name(name: str) -> bool:
    """Whether a file is taken for an image, by its name."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_extensions()


def tell_of_others(others: Sequence[str], where: str) -> None:
    """Logs images that are there and not scored."""
    if others:
        logger.warning("%s: %d images are not of the benchmark and left out: %s.", where, len(others), shown(others))


def read_bytes(path: Path | zipfile.Path) -> bytes:
    """A file's contents, or an error if it is too large."""
    if isinstance(path, Path):
        return read_regular(path, MAX_FILE_BYTES)
    if path.root.getinfo(path.at).file_size > MAX_FILE_BYTES:
        raise ValueError(f"{printable(path)}: larger than {MAX_FILE_BYTES:,} bytes.")
    return path.read_bytes()


def read_text(path: Path | zipfile.Path) -> str:
    """A text file in UTF-8, or an error that names it."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}).") from error


def read_json(path: Path) -> Any:
    """A JSON file, or an error that names it."""
    text = read_text(path)
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: broken JSON ({error.msg}); get the file once more.") from error
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON ({error}).") from error


def field_of(row: Any, key: str, where: object) -> Any:
    """A value of a row, or an error that says where it is missing."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected a JSON object with {key!r}, got {type(row).__name__}.")
    if key not in row:
        raise ValueError(f"{where}: there is no {key!r}; there are {', '.join(map(repr, row))}.")
    return row[key]


def string_of(row: Any, key: str, where: object) -> str:
    """A string of a row, or an error that says where it is missing, or something else."""
    value = field_of(row, key, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} must be a string, got {value!r:.80}.")
    return value


def caption_of(value: Any, where: object) -> str | None:
    """A caption, `None` where it is missing, or an error if it is something else."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: expected a caption, a string, got {value!r:.80}.")
    return value


# Tables: data sets that the `datasets` library opens, on the Hub or in a folder.


class Table(NamedTuple):
    """
    A split of a data set, its images as they are stored; `id` and the commit where it comes from the Hub. Paths of
    images start from `folder` and lie in one of `roots`. `is_text` is whether all values are texts, as in CSV.
    """

    dataset: Dataset
    split: str
    id: str | None
    revision: str | None
    where: str
    folder: str
    roots: tuple[str, ...]
    is_text: bool = False


def is_table(folder: str) -> bool:
    """Whether a folder holds files that `datasets` opens, and no images."""
    if any(os.path.isfile(os.path.join(folder, name)) for name in SAVED_DATASET):
        return True
    found = False
    for _, _, names in os.walk(folder):
        if any(map(is_image_name, names)):
            return False
        found = found or any(name.endswith((".parquet", ".arrow", ".tar")) for name in names)
    return found


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
            f"token ({_reason(error)})."
        ) from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        if constants.HF_HUB_OFFLINE:
            raise not_kept(repo_id, revision) from error
        raise ValueError(
            f"{repo_id}: the Hub cannot be reached ({_reason(error)}). With HF_HUB_OFFLINE=1 what was read of it "
            "before is taken from the cache."
        ) from error


def not_kept(repo_id: str, what: str | None) -> ValueError:
    """The error for what is not in the caches where HF_HUB_OFFLINE is set."""
    return ValueError(
        f"{repo_id}: there is no such folder, HF_HUB_OFFLINE is set, and the cache does not have "
        f"{f'{what} of it' if what else 'it'}. Run the same with HF_HUB_OFFLINE=0 once: what is read then is kept."
    )


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
            "%s: HF_HUB_OFFLINE is set; what the cache has of the commit %s is scored, which may not be the newest.",
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
            folder = snapshot_download(repo_id, repo_type="dataset", revision=commit, allow_patterns="*.zip")
            names = [path.relative_to(folder).as_posix() for path in sorted(Path(folder).rglob("*.zip"))]
        else:
            names = HfApi().list_repo_files(repo_id, repo_type="dataset", revision=commit)
        archives = [name for name in names if name.endswith(".zip")]
        if len(archives) != 1:
            raise ValueError(f"{repo_id}: expected one zip archive, found {shown(archives) or 'none'}.")
        return hf_hub_download(repo_id, archives[0], repo_type="dataset", revision=commit)


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def open_table(task: Task, data: str | None, options: Options) -> Table:
    """Opens a split: the one that is asked for, or the task's, or the only one. No other split is downloaded."""
    revision = options.revision
    source, commit = data, None
    if source is None:
        source = task.hub_id
        revision = revision or task.hub_revision
        if source is None:
            raise ValueError(
                f"`data`: {task.key} needs its folder or the name of a data set on the Hub (--data). Where to get it: "
                f"{task.source}"
            )
    on_hub = is_hub_name(source)
    if on_hub:
        commit = hub_commit(source, revision)
    elif revision is not None:
        raise ValueError(f"`revision` {revision!r}: {source} is not on the Hub.")
    elif not os.path.exists(source):
        raise FileNotFoundError(f"{source}: no such folder, and no name of a data set on the Hub (owner/name).")
    if commit is not None and constants.HF_HUB_OFFLINE:
        dataset, chosen = _kept_split(task, source, options, commit)
    else:
        dataset, chosen = _load_split(task, source, options, commit)
    if options.split is None and task.split not in (None, chosen) and task.num_images not in (None, len(dataset)):
        raise ValueError(
            f"`split`: {source} has {chosen!r} alone, of {len(dataset)} images, and {task.name} is {task.split!r}, of "
            f"{task.num_images}. To score it nevertheless ask for it: --split {chosen}."
        )
    dataset = undecoded(dataset)
    where = f"{source} (split {chosen})"
    if on_hub:
        roots = hub_folders(source) if options.image_root is None else (options.image_root,)
        return Table(dataset, chosen, source, commit, where, "", roots)
    folder = source if os.path.isdir(source) else os.path.dirname(source) or "."
    is_text = KINDS.get(os.path.splitext(source)[1].lower()) == "csv"
    return Table(dataset, chosen, None, commit, where, folder, image_roots(folder, options), is_text)


@contextmanager
def _opening(source: str) -> Iterator[None]:
    """Names the data set in whatever reads its files."""
    try:
        yield
    except Exception as error:
        reason = error.__cause__ or error
        hint = ""
        if is_hub_name(source) and isinstance(reason, RuntimeError | ValueError):
            # of a script, or of what `datasets` turns to then: what it keeps of other revisions
            hint = (
                " If it is a script, which `datasets` does not run, and the data set's page on the Hub shows a table, "
                "then revision='refs/convert/parquet' (--data-revision) may have it."
            )
        raise ValueError(f"{source}: cannot be opened ({type(reason).__name__}: {_reason(reason)}).{hint}") from error


def _kept_split(task: Task, source: str, options: Options, commit: str) -> tuple[Dataset, str]:
    """
    A split of a data set on the Hub that [`_load_split`] read before: as `datasets` keeps it, which is whole. Of the
    files in the Hub's cache nobody can tell.
    """
    kept = {}  # by split
    for file in sorted(Path(datasets.config.HF_DATASETS_CACHE).glob(f"*/*/*/{commit}/dataset_info.json")):
        info = DatasetInfo.from_directory(str(file.parent))
        if info.config_name == (options.config or "default"):
            kept |= {str(split): (file.parent, info) for split in info.splits or {}}
    if not kept:
        raise not_kept(source, f"the commit {commit}")
    chosen = _choose_split(list(kept), options.split, task.split, f"{source} in the cache")
    folder, info = kept[chosen]
    with _opening(source):
        parts = ArrowReader(str(folder), info).read(info.dataset_name, chosen, list(info.splits.values()))
        return Dataset(**parts), chosen


def _load_split(task: Task, source: str, options: Options, commit: str | None) -> tuple[Dataset, str]:
    split = options.split
    if os.path.isfile(os.path.join(source, "dataset_dict.json")):
        with _opening(source):
            splits = cast(DatasetDict, load_from_disk(source))
        chosen = _choose_split(list(splits), split, task.split, source)
        return splits[chosen], chosen
    if os.path.isfile(os.path.join(source, "state.json")):
        with _opening(source):
            dataset = cast(Dataset, load_from_disk(source))
        return dataset, _choose_split([str(dataset.split or split or task.split or "train")], split, None, source)
    if os.path.isfile(source):
        kind = KINDS.get(os.path.splitext(source)[1].lower())
        if kind is None:
            raise ValueError(f"{source}: expected a folder, or a file of one of {', '.join(KINDS)}.")
        chosen = split or task.split or "train"
        with _opening(source):
            if kind in ("csv", "json"):
                return _read_table(source), chosen
            dataset = load_dataset(kind, data_files={chosen: glob.escape(source)}, split=chosen)
        return cast(Dataset, dataset), chosen
    with _opening(source):
        builder = load_dataset_builder(source, options.config, revision=commit)
    data_files = {str(name): list(files) for name, files in cast(Any, builder.config.data_files or {}).items()}
    chosen = _choose_split(list(data_files), split, task.split, source)
    # of this split alone; they are taken for patterns
    files = {chosen: [file if commit else glob.escape(file) for file in data_files[chosen]]}
    with _opening(source):
        builder = load_dataset_builder(
            source, options.config, data_files=files, features=builder.info.features, revision=commit
        )
        if commit is not None and builder.hash != commit:
            # where the connection fails, `datasets` turns to whatever revision it keeps
            raise ConnectionError(f"the commit {commit} cannot be had")
        builder.download_and_prepare(verification_mode="no_checks")  # the card tells of all splits
        return cast(Dataset, builder.as_dataset(split=chosen)), chosen


def _read_table(file: str) -> Dataset:
    """A table of CSV or JSON with its values as they are written."""
    columns: dict[str, None] = {}
    for row in every_row(file):
        columns |= dict.fromkeys(row)
    status = os.stat(file)
    arguments = {
        "file": os.path.abspath(file),
        "columns": tuple(columns),
        "state": (status.st_size, status.st_mtime_ns),
    }
    return cast(Dataset, Dataset.from_generator(_table_rows, gen_kwargs=arguments))


def _table_rows(file: str, columns: tuple[str, ...], state: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """The rows of a file with all of its columns; `state` is what `datasets` knows its contents by."""
    for row in every_row(file):
        yield {column: row.get(column) for column in columns}


def _choose_split(splits: Sequence[str], split: str | None, default: str | None, source: str) -> str:
    if split is not None and split not in splits:
        raise ValueError(f"`split`: {source} has no {split!r}; it has {', '.join(splits) or 'none'}.")
    chosen = split or (default if default in splits else splits[0] if len(splits) == 1 else None)
    if chosen is None:
        raise ValueError(f"`split`: {source} has {', '.join(splits)}; say which (--split).")
    return chosen


def find_column(table: Table, options: Options, option: str, usual: Sequence[str], feature: type | None = None) -> str:
    """The column to read: the one that is given, or the first of the usual names, or the only one of this feature."""
    given = getattr(options, option)
    columns = table.dataset.column_names
    if given is not None:
        if given not in columns:
            raise ValueError(f"`{option}`: {table.where} has no column {given!r}; it has {', '.join(columns)}.")
        return given
    of_feature = [name for name in columns if feature and isinstance(table.dataset.features[name], feature)]
    found = next((name for name in usual if name in columns), None)
    if found is None and len(of_feature) == 1:
        found = of_feature[0]
    if found is None:
        raise ValueError(
            f"{table.where} has the columns {', '.join(columns)}, none of them called {' or '.join(usual)}: say which "
            f"with `{option}` (--{option.replace('_', '-')})."
        )
    return found


def stored_image(value: Any, name: str, locate: Callable[[str], str] = str) -> ImageSource | None:
    """The image in a cell: a path, of which `locate` makes that of a file, or the bytes of one. `None` if empty."""
    value = image_source(value).source
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ValueError(f"{name}: an address, {value}. Download the images, and pass a folder of records as `data`.")
    if isinstance(value, str) and value:
        try:
            return locate(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}.") from error
    return value or None


def table_images(task: Task, table: Table, column: str) -> LazyImages:
    """The images of a table, as they are stored; those that are missing are an error."""
    images = table.dataset.select_columns([column])
    locate = partial(locate_image, folder=table.folder, roots=table.roots)

    def load(place: int) -> ImageSource:
        image = stored_image(images[place][column], f"{table.where}, row {place}", locate)
        if image is None:
            raise incomplete(task, f"row {place} of {table.where} has no image in the column {column!r}")
        return image

    return LazyImages(len(images), load)


def read_table_texts(
    task: Task,
    options: Options,
    table: Table,
    texts_of: Callable[[Any], Sequence[Any]],
    usual_columns: Sequence[str],
    *,
    protocol: Mapping[str, Any],
    captions_per_image: int | None = None,
    normalize: bool = True,
    name: str | None = None,
) -> RetrievalData:
    """A table with an image and its texts in each row; `texts_of` takes those to score from a cell."""
    image_column = find_column(table, options, "image_column", ("image", "jpg", "jpeg", "png", "webp"), Image)
    text_column = find_column(table, options, "text_column", usual_columns)
    rows = first_of(task, options, range(len(table.dataset)), table.where)
    table = table._replace(dataset=table.dataset.select(rows))
    texts = [
        [caption_of(text, f"{table.where}, row {row}, column {text_column!r}") for text in texts_of(value)]
        for row, value in enumerate(table.dataset[text_column])
    ]
    return retrieval_data(
        task,
        options,
        Gaps(task),
        table_images(task, table, image_column),
        [f"row {place}" for place in rows],
        texts,
        protocol={**protocol, "text_column": text_column},
        captions_per_image=captions_per_image,
        normalize=normalize,
        id=table.id,
        name=name,
        split=table.split,
        revision=table.revision,
    )
