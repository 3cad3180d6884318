"""
Benchmarks, read from the folders that their publishers ship and from the Hub.

`TASKS` holds them by name, and [`load_benchmark`] reads any of them. A data set that lacks images or captions is
refused with what is missing; only `num_images` makes a smaller one, and the results say so.
"""

import csv
import glob
import json
import logging
import os
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, cast

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)

from ..data.records import BUILDERS, ColumnMapping, load_records
from ..data.sampling import split_full_stops
from ..data.scenes import long_captions, render, scene, short_caption
from ..images import ImageSource, find_images, image_extensions
from .data import ClassificationData, IncompleteDataError, RetrievalData
from .zero_shot import open_clip_metadata

logger = logging.getLogger(__name__)

CAPTIONS_PER_IMAGE = 5  # of MSCOCO and Flickr30k; a few images have more, which nobody counts
NORMALIZATION = 'split at line ends, "</s>" and full stops; stripped; joined with ". "'
# Characters that are read at once of a large JSON file, and the most that one entry of it may have.
JSON_CHUNK, MAX_JSON_ENTRY = 1 << 20, 1 << 26
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
IMAGENET_CLASSES = 1000
WNID = re.compile(r"n\d{8}")
# Files that `save_to_disk` writes, of a split or of several.
SAVED_DATASET = ("state.json", "dataset_dict.json")
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


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
        num_texts: Texts of the whole.
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


# Of tasks that are read from tables too: on the Hub, or in a folder.
TABLE_OPTIONS = ("revision", "config", "image_column")


def load_benchmark(
    task: str,
    data: str | os.PathLike | None = None,
    *,
    num_images: int | None = None,
    split: str | None = None,
    revision: str | None = None,
    config: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    class_names: str | os.PathLike | None = None,
    captions: str | None = None,
    normalize: bool | None = None,
) -> RetrievalData | ClassificationData:
    """
    Reads a benchmark: images with their texts, or with their classes.

    Each task has some of the options; one that it does not have is refused.

    Args:
        task: A name in `TASKS`, such as `"iiw"`.
        data: The folder that the data set was unpacked to, the publisher's own or the one around it; or the name of a
            data set on the Hub (`owner/name`). By default the task's own on the Hub, where there is one.
        num_images: Take the first so many only, in the order of the benchmark; the results say so. For `scenes` it is
            how many there are (500).
        split: Which split; by default the one that is commonly reported.
        revision: Branch, tag or commit of a data set on the Hub.
        config: Configuration of a data set on the Hub that has several.
        image_column: Column of the images, in tables and records.
        text_column: Column of the texts: one, or a list of them.
        label_column: Column of the classes: numbers or names.
        class_names: A file with a class name in each line, in the order of the classes; or `"openai"` for the names
            that CLIP was evaluated with on ImageNet, as open_clip holds them. By default those of the data.
        captions: In `retrieval` and `scenes`: `"long"` (the default) takes the first long caption of each image,
            `"all"` every one, `"short"` the short caption.
        normalize: Whether captions go through [`normalize_caption`]. By default all do but short ones.

    Returns:
        The data, with what was chosen in its `protocol`.

    Raises:
        IncompleteDataError: if images, captions or classes are missing. It says which, and where to get them.
        FileNotFoundError: if there is no such folder.
        ImportError: if `class_names` is `"openai"` and open_clip is not installed.
        ValueError: if a file cannot be read, an argument is none that the task has, or the Hub does not give the data.

    Example:

    ```python
    >>> from lotlip_hf.evaluation.benchmarks import load_benchmark

    >>> data = load_benchmark("scenes", num_images=8)
    >>> len(data.images), len(data.texts), list(data.text_to_image)
    (8, 8, [0, 1, 2, 3, 4, 5, 6, 7])
    >>> iiw = load_benchmark("iiw", "path/to/iiw")  # doctest: +SKIP
    ```
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    options = Options(
        num_images=num_images,
        split=split,
        revision=revision,
        config=config,
        image_column=image_column,
        text_column=text_column,
        label_column=label_column,
        class_names=None if class_names is None else os.fspath(class_names),
        captions=captions,
        normalize=normalize,
    )
    has = TASKS[task].options
    for option, value in vars(options).items():
        if value is not None and option not in has:
            raise ValueError(f"`{option}` is no option of {task}; it has {', '.join(has)}.")
    if num_images is not None and num_images < 1:
        raise ValueError(f"`num_images` must be at least 1, got {num_images}.")
    if captions is not None and captions not in ("long", "all", "short"):
        raise ValueError(f'`captions` must be "long", "all" or "short", got {captions!r}.')
    return TASKS[task].reader(TASKS[task], None if data is None else os.fspath(data), options)


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
            lacks = (f"{len(names)} {kind} are missing ({_shown(names)})" for kind, names in self.missing.items())
            problem = f"of {total} images with all that belongs to them, {', and '.join(lacks)}"
            raise _incomplete(self.task, problem, first_alone=True)


def _incomplete(task: Task, problem: str, *, first_alone: bool = False) -> IncompleteDataError:
    """The error for what is missing; with `first_alone` it tells of `num_images`, which may do without."""
    advice = " To score the first N images alone, ask for it: num_images=N (--num-images N)." if first_alone else ""
    return IncompleteDataError(
        f"{task.name} is not complete: {problem}. Nothing is scored on what is there. Where to get it: "
        f"{task.source}{advice}"
    )


def _shown(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _first(task: Task, options: Options, items: Sequence[Any], what: str) -> Sequence[Any]:
    """
    The items to score: the first `num_images`, or all of them, if they are as many as the benchmark has; of a split
    that is not the benchmark's they may be any number.
    """
    if options.num_images is not None:
        if len(items) < options.num_images:
            raise _incomplete(task, f"{what} has {len(items)} images, and `num_images` asks for {options.num_images}")
        return items[: options.num_images]
    expected = task.num_images if options.split in (None, task.split) else None
    if not len(items):
        raise _incomplete(task, f"{what} has no images")
    if expected is not None and len(items) < expected:
        raise _incomplete(task, f"{what} has {len(items)} images of {expected}", first_alone=True)
    if expected is not None and len(items) > expected:
        logger.warning("%s has %d images, not the %d that are reported on.", what, len(items), expected)
    return items


def _retrieval(
    task: Task,
    options: Options,
    gaps: Gaps,
    images: Sequence[ImageSource | None],
    names: Sequence[str],
    texts: Sequence[Sequence[Any]],
    *,
    protocol: Mapping[str, Any],
    normalize: bool = True,
    id: str | None = None,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
) -> RetrievalData:
    """
    `images` [I] and `texts` [I], each image's own, as a data set; refused if `gaps` were found, or are here.
    `normalize` is whether captions are normalised where the options do not say.
    """
    normalize = normalize if options.normalize is None else options.normalize
    all_texts: list[str] = []
    text_to_image: list[int] = []
    for place, own in enumerate(texts):
        if not own:
            gaps.add("captions", names[place])
        for text in own:
            text = normalize_caption(text) if normalize and isinstance(text, str) else text
            if not isinstance(text, str) or not text.strip():
                gaps.add("captions", f"{names[place]}: {'empty' if isinstance(text, str) else f'{text!r} is no text'}")
                continue
            all_texts.append(text)
            text_to_image.append(place)
    gaps.refuse(len(images))
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


def _folder(task: Task, data: str | None) -> Path:
    """The folder of a data set that is in none of its forms on the Hub, or that was given as a folder."""
    if data is None:
        raise ValueError(f"`data`: {task.key} needs its folder (--data DIR). Where to get it: {task.source}")
    if not os.path.isdir(data):
        reason = "not a folder" if os.path.exists(data) else "no such folder"
        raise FileNotFoundError(f"{data}: {reason}. {task.name}, where to get it: {task.source}")
    return Path(data)


def _find_file(task: Task, folder: Path, *places: str) -> Path:
    """The first of these files that is there."""
    for place in places:
        if (folder / place).is_file():
            return folder / place
    raise _incomplete(task, f"{folder} holds no {places[0]}, neither at the top nor where else it may be")


class ImageFinder:
    """Looks files up in folders that are listed once each."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, str]] = {}

    def find(self, *paths: Path) -> str | None:
        """
        The first of these files that is there. Its name may be spelled with other code points for the same letters, as
        some systems unpack archives, and its extension in capitals; a name without one stands for an image's.
        """
        for path in paths:
            names = self._names(path.parent)
            for spelling in (path.name, _spelling(path.name)):
                if spelling in names:
                    return str(path.parent / names[spelling])
        return None

    def others(self, folder: Path, known: Collection[str]) -> list[str]:
        """The images in a folder that are none of those known by name."""
        spellings = {_spelling(name) for name in known}
        spellings |= {os.path.splitext(name)[0] for name in spellings}
        images = {name for name in self._names(folder).values() if _is_image(name)}
        return sorted(
            name for name in images if not {_spelling(name), os.path.splitext(_spelling(name))[0]} & spellings
        )

    def _names(self, folder: Path) -> dict[str, str]:
        if folder not in self._folders:
            listed = sorted(os.listdir(folder)) if folder.is_dir() else []
            names = {name: name for name in listed}
            for name in listed:
                names.setdefault(_spelling(name), name)
            for name in filter(_is_image, listed):
                names.setdefault(os.path.splitext(_spelling(name))[0], name)
            self._folders[folder] = names
        return self._folders[folder]


def _spelling(name: str) -> str:
    stem, extension = os.path.splitext(unicodedata.normalize("NFC", name))
    return stem + (".jpg" if extension.lower() == ".jpeg" else extension.lower())


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_extensions()


def _tell_of_others(others: Sequence[str], where: str) -> None:
    if others:
        logger.warning("%s: %d images are not of the benchmark and left out: %s.", where, len(others), _shown(others))


def _read_text(path: Path | zipfile.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}).") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: broken JSON ({error.msg}); get the file once more.") from error


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: broken JSON ({error.msg}); get the file once more.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
        rows.append(row)
    return rows


def _iterate_json_list(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a list in a JSON file, which may be too large to be read at once."""
    decoder, separators = json.JSONDecoder(), re.compile(r"[\s,]*")
    count = 0
    with open(path, encoding="utf-8-sig") as file:
        buffer = file.read(JSON_CHUNK).lstrip()
        if not buffer.startswith("["):
            raise ValueError(f"{path}: expected a list in JSON.")
        position = 1
        while True:
            position = cast(re.Match[str], separators.match(buffer, position)).end()
            if buffer.startswith("]", position):
                return
            try:
                entry, position = decoder.raw_decode(buffer, position)
            except json.JSONDecodeError as error:
                more = file.read(JSON_CHUNK)
                if not more or len(buffer) - position > MAX_JSON_ENTRY:
                    raise ValueError(
                        f"{path}: broken JSON after {count} entries ({error.msg}); get the file once more."
                    ) from error
                buffer, position = buffer[position:] + more, 0
                continue
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: entry {count} is no JSON object.")
            count += 1
            yield entry


def _field(row: Mapping[str, Any], key: str, where: object) -> Any:
    if key not in row:
        raise ValueError(f"{where}: there is no {key!r}; there are {', '.join(map(repr, row))}.")
    return row[key]


# Tables: data sets that the `datasets` library opens, on the Hub or in a folder.


class Table(NamedTuple):
    """A split of a data set, its images as they are stored; `id` and the commit where it comes from the Hub."""

    dataset: Dataset
    split: str
    id: str | None
    revision: str | None
    where: str


def _is_hub_name(data: str | None) -> bool:
    return data is not None and not os.path.exists(data) and HUB_NAME.fullmatch(data) is not None


def _is_table(folder: str) -> bool:
    """Whether a folder holds files that `datasets` opens, and no images."""
    if any(os.path.isfile(os.path.join(folder, name)) for name in SAVED_DATASET):
        return True
    found = False
    for _, _, names in os.walk(folder):
        if any(map(_is_image, names)):
            return False
        found = found or any(name.endswith((".parquet", ".arrow", ".tar")) for name in names)
    return found


@contextmanager
def _from_hub(repo_id: str, revision: str | None) -> Iterator[None]:
    """Says what to do where the Hub does not give a data set."""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{repo_id}: its owners ask for something first. Agree to it on the data set's page on the Hub, and log "
            "in with `hf auth login`."
        ) from error
    except OfflineModeIsEnabled as error:
        raise ValueError(
            f"{repo_id}: there is no such folder, and to look on the Hub HF_HUB_OFFLINE must not be set."
        ) from error
    except HfHubHTTPError as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"{repo_id}: there is no such folder, and the Hub has no such data set{at} or does not show it to this "
            f"token ({_reason(error)})."
        ) from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{repo_id}: the Hub cannot be reached ({_reason(error)}).") from error


def _hub_commit(repo_id: str, revision: str | None) -> str:
    """The commit that a revision of a data set on the Hub stands for."""
    with _from_hub(repo_id, revision):
        return str(HfApi().dataset_info(repo_id, revision=revision).sha)


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _open_table(task: Task, data: str | None, options: Options) -> Table:
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
    on_hub = _is_hub_name(source)
    if on_hub:
        commit = _hub_commit(source, revision)
    elif revision is not None:
        raise ValueError(f"`revision` {revision!r}: {source} is not on the Hub.")
    elif not os.path.exists(source):
        raise FileNotFoundError(f"{source}: no such folder, and no name of a data set on the Hub (owner/name).")
    dataset, chosen = _load_split(task, source, options, commit)
    if options.split is None and task.split not in (None, chosen) and task.num_images not in (None, len(dataset)):
        raise ValueError(
            f"`split`: {source} has {chosen!r} alone, of {len(dataset)} images, and {task.name} is {task.split!r}, of "
            f"{task.num_images}. To score it nevertheless ask for it: --split {chosen}."
        )
    for column, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    return Table(dataset, chosen, source if on_hub else None, commit, f"{source} (split {chosen})")


@contextmanager
def _opening(source: str) -> Iterator[None]:
    """Names the data set in whatever reads its files."""
    try:
        yield
    except Exception as error:
        reason = error.__cause__ or error
        hint = ""
        if _is_hub_name(source) and isinstance(reason, RuntimeError | ValueError):
            # of a script, or of what `datasets` turns to then: what it keeps of other revisions
            hint = (
                " If it is a script, which `datasets` does not run, and the data set's page on the Hub shows a table, "
                "then revision='refs/convert/parquet' (--data-revision) may have it."
            )
        raise ValueError(f"{source}: cannot be opened ({type(reason).__name__}: {_reason(reason)}).{hint}") from error


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
        builder_name = BUILDERS.get(os.path.splitext(source)[1].lower())
        if builder_name is None:
            raise ValueError(f"{source}: expected a folder, or a file of one of {', '.join(BUILDERS)}.")
        chosen = split or task.split or "train"
        with _opening(source):
            dataset = load_dataset(builder_name, data_files={chosen: glob.escape(source)}, split=chosen)
        return cast(Dataset, dataset), chosen
    with _opening(source):
        builder = load_dataset_builder(source, options.config, revision=commit)
    data_files = {str(name): list(files) for name, files in cast(Any, builder.config.data_files or {}).items()}
    chosen = _choose_split(list(data_files), split, task.split, source)
    # of this split alone; they are taken for patterns
    files = {chosen: [file if commit else glob.escape(file) for file in data_files[chosen]]}
    with _opening(source):
        builder = load_dataset_builder(source, data_files=files, features=builder.info.features, revision=commit)
        if commit is not None and builder.hash != commit:
            # where the connection fails, `datasets` turns to whatever revision it keeps
            raise ConnectionError(f"the commit {commit} cannot be had")
        builder.download_and_prepare(verification_mode="no_checks")  # the card tells of all splits
        return cast(Dataset, builder.as_dataset(split=chosen)), chosen


def _choose_split(splits: Sequence[str], split: str | None, default: str | None, source: str) -> str:
    if split is not None and split not in splits:
        raise ValueError(f"`split`: {source} has no {split!r}; it has {', '.join(splits) or 'none'}.")
    chosen = split or (default if default in splits else splits[0] if len(splits) == 1 else None)
    if chosen is None:
        raise ValueError(f"`split`: {source} has {', '.join(splits)}; say which (--split).")
    return chosen


def _column(table: Table, options: Options, option: str, usual: Sequence[str], feature: type | None = None) -> str:
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


def _image_source(value: Any, name: str, folder: str = "") -> ImageSource | None:
    """The image in a cell: a path, or the bytes of a file. `None` if it is empty."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ValueError(f"{name}: an address, {value}. Download the images, and pass a folder of records as `data`.")
    if isinstance(value, str):
        return os.path.join(folder, value)
    return value or None


def _table_images(task: Task, table: Table, column: str) -> LazyImages:
    images = table.dataset.select_columns([column])

    def load(place: int) -> ImageSource:
        image = _image_source(images[place][column], f"{table.where}, row {place}")
        if image is None:
            raise _incomplete(task, f"row {place} of {table.where} has no image in the column {column!r}")
        return image

    return LazyImages(len(images), load)


def _read_table_texts(
    task: Task,
    options: Options,
    table: Table,
    texts_of: Callable[[Any], Sequence[Any]],
    usual_columns: Sequence[str],
    *,
    protocol: Mapping[str, Any],
    normalize: bool = True,
    name: str | None = None,
) -> RetrievalData:
    """A table with an image and its texts in each row."""
    image_column = _column(table, options, "image_column", ("image", "jpg", "jpeg", "png", "webp"), Image)
    text_column = _column(table, options, "text_column", usual_columns)
    rows = _first(task, options, range(len(table.dataset)), table.where)
    table = table._replace(dataset=table.dataset.select(rows))
    return _retrieval(
        task,
        options,
        Gaps(task),
        _table_images(task, table, image_column),
        [f"row {place}" for place in rows],
        [texts_of(value) for value in table.dataset[text_column]],
        protocol={**protocol, "text_column": text_column},
        normalize=normalize,
        id=table.id,
        name=name,
        split=table.split,
        revision=table.revision,
    )


# Long captions.


def _read_dci(task: Task, data: str | None, options: Options) -> RetrievalData:
    folder, split = _folder(task, data), options.split or "all"
    places = ("", "densely_captioned_images", "data/densely_captioned_images")
    splits_file = _find_file(task, folder, *(os.path.join(place, "splits.json") for place in places))
    splits = _read_json(splits_file)
    if not isinstance(splits, dict) or not all(isinstance(names, list) for names in splits.values()):
        raise ValueError(f"{splits_file}: expected lists of annotation files by split.")
    if split not in ("all", *splits):
        raise ValueError(f"`split` must be all, {' or '.join(splits)}, got {split!r}.")
    listed = [name for key, own in splits.items() if split in ("all", key) for name in own]
    files = _first(task, options, listed, str(splits_file))
    root, finder, gaps = splits_file.parent, ImageFinder(), Gaps(task)
    images, names, texts = [], [], []
    for file in files:
        path = root / "annotations" / file
        if not path.is_file():
            gaps.add("annotation files", f"annotations/{file}")
            continue
        annotation = _read_json(path)
        names.append(f"photos/{_field(annotation, 'image', path)}")
        texts.append([f"{_field(annotation, 'short_caption', path)}\n{_field(annotation, 'extra_caption', path)}"])
        images.append(finder.find(root / names[-1]))
        if images[-1] is None:
            gaps.add("images", names[-1])
    gaps.refuse(len(files))
    if options.num_images is None and split == "all":
        _tell_of_others(finder.others(root / "photos", [Path(name).name for name in names]), str(root / "photos"))
    return _retrieval(
        task,
        options,
        gaps,
        images,
        names,
        texts,
        split=split,
        protocol={"captions": "short_caption, a line end, extra_caption"},
    )


# Of each part of ImageInWords: where its images may lie, as LoTLIP's evaluation lays them and as they are unpacked.
IIW_PARTS = {
    "DOCCI_Test": ("docci", "docci/images", "images"),
    "IIW-400": ("docci_aar", "docci/images_aar", "images_aar"),
    "DCI_Test": ("dci", "dci/densely_captioned_images/photos", "densely_captioned_images/photos", "photos"),
}


def _read_iiw(task: Task, data: str | None, options: Options) -> RetrievalData:
    folder = _folder(task, data)
    rows = []
    for part in IIW_PARTS:
        places = ("", "datasets", "imageinwords", "imageinwords/datasets")
        file = _find_file(task, folder, *(os.path.join(place, part, "data.jsonl") for place in places))
        for number, row in enumerate(_read_json_lines(file), start=1):
            key = row["image"] if "image" in row else _field(row, "image/key", f"{file}, entry {number}")
            rows.append((part, str(key), _field(row, "IIW", f"{file}, entry {number}")))
    rows = _first(task, options, rows, str(folder))
    finder, gaps, renamed = ImageFinder(), Gaps(task), []
    images, names = [], []
    for part, key, _ in rows:
        name = key if ".jpg" in key else f"{key}.jpg"
        image = finder.find(*(folder / place / name for place in IIW_PARTS[part]))
        if image is None and part == "IIW-400":
            # The images came to be split anew: LoTLIP's evaluation takes those of the same number, and so do we.
            image = finder.find(*(folder / place / name.replace("test", "train") for place in IIW_PARTS[part]))
            renamed += [name] if image else []
        if image is None:
            gaps.add("images", f"{IIW_PARTS[part][0]}/{name}")
        images.append(image)
        names.append(f"{part}/{name}")
    protocol: dict[str, Any] = {"captions": "IIW", "parts": list(IIW_PARTS)}
    if renamed:
        protocol["images_named_train"] = len(renamed)
        logger.warning("%d images of IIW-400 are there as train, not test: %s.", len(renamed), _shown(renamed))
    return _retrieval(
        task,
        options,
        gaps,
        images,
        names,
        [[text] for _, _, text in rows],
        protocol=protocol,
    )


def _read_sharegpt4v(task: Task, data: str | None, options: Options) -> RetrievalData:
    folder = _folder(task, data)
    files = ("share4v_sam_10k.json", "share-captioner_coco_lcs_sam_1246k_1107.json")
    places = [os.path.join(place, file) for place in ("", "share4v", "data", "data/share4v") for file in files]
    file = _find_file(task, folder, *places)
    wanted = options.num_images or cast(int, task.num_images)
    entries = []
    for entry in _iterate_json_list(file):
        name = str(_field(entry, "image", f"{file}, entry {entry.get('id')}"))
        if not re.fullmatch(r"sa_\d+\.jpg", os.path.basename(name)):
            continue  # of COCO and LAION
        conversation = _field(entry, "conversations", f"{file}, {name}")
        try:
            text = conversation[1]["value"]
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, {name}: there is no conversations[1].value.") from error
        entries.append((name, text))
        if len(entries) == wanted:
            break
    entries = _first(task, options, entries, f"{file} (the part of SAM)")
    finder, gaps, images = ImageFinder(), Gaps(task), []
    # SA-1B is unpacked to folders by the hundreds, which the names in the large file do not tell of
    shards = sorted(path for path in folder.glob("sa_*") if path.is_dir())
    for name, _ in entries:
        image = finder.find(folder / name, folder / "data" / name)
        if image is None:
            base = os.path.basename(name)
            where = (
                folder / "sam/images",
                folder / "images",
                folder,
                *(s / p for s in shards for p in ("images", "")),
            )
            image = finder.find(*(place / base for place in where))
        if image is None:
            gaps.add("images", name)
        images.append(image)
    return _retrieval(
        task,
        options,
        gaps,
        images,
        [name for name, _ in entries],
        [[text] for _, text in entries],
        protocol={"captions": "conversations[1].value", "images": f"the first {len(entries)} of SAM in {file.name}"},
    )


def _read_urban1k(task: Task, data: str | None, options: Options) -> RetrievalData:
    commit, source = None, data
    if source is None or _is_hub_name(source):
        repo_id = source or cast(str, task.hub_id)
        commit = _hub_commit(repo_id, options.revision)
        with _from_hub(repo_id, options.revision):
            files = HfApi().list_repo_files(repo_id, repo_type="dataset", revision=commit)
            archives = [name for name in files if name.endswith(".zip")]
            if len(archives) != 1:
                raise ValueError(f"{repo_id}: expected one zip archive, found {_shown(archives) or 'none'}.")
            source = hf_hub_download(repo_id, archives[0], repo_type="dataset", revision=commit)
    else:
        _refuse_table_options(data, options)
    if os.path.isfile(source) and zipfile.is_zipfile(source):
        folder: Path | zipfile.Path = zipfile.Path(source)
    else:
        folder = _folder(task, source)
    inside = (folder, *(folder / name for name in ("Urban1k", "Urban-1k", "urban1k")))
    root = next((place for place in inside if (place / "caption").is_dir() and (place / "image").is_dir()), None)
    if root is None:
        raise _incomplete(task, f"{source} holds no folders image/ and caption/")
    # by their names without extensions, which are numbers
    captions = {_stem(path): path for path in (root / "caption").iterdir() if path.name.lower().endswith(".txt")}
    pictures = {_stem(path): path for path in (root / "image").iterdir() if _is_image(path.name)}
    ordered = sorted(captions, key=lambda stem: (not stem.isdecimal(), int(stem) if stem.isdecimal() else 0, stem))
    if without := sorted(pictures.keys() - captions.keys()):
        if options.num_images is None and len(ordered) < cast(int, task.num_images):
            Gaps(task, {"captions": [f"caption/{stem}.txt" for stem in without]}).refuse(cast(int, task.num_images))
        _tell_of_others([pictures[stem].name for stem in without], str(root / "image"))
    stems = _first(task, options, ordered, str(root / "caption"))
    gaps = Gaps(task)
    for stem in stems:
        if stem not in pictures:
            gaps.add("images", f"image/{stem}.jpg")
    gaps.refuse(len(stems))
    paths = [pictures[stem] for stem in stems]
    images: Sequence[ImageSource]
    if isinstance(root, Path):
        images = [str(path) for path in paths]
    else:
        images = LazyImages(len(paths), lambda place: paths[place].read_bytes())
    return _retrieval(
        task,
        options,
        gaps,
        images,
        [f"image/{path.name}" for path in paths],
        [[re.split("\r\n|\r|\n", _read_text(captions[stem]), maxsplit=1)[0]] for stem in stems],
        protocol={"captions": "the first line of each file"},
        id=repo_id if commit else None,
        revision=commit,
    )


def _stem(path: Path | zipfile.Path) -> str:
    return unicodedata.normalize("NFC", os.path.splitext(path.name)[0])


def _read_docci(task: Task, data: str | None, options: Options) -> RetrievalData:
    split = options.split or "test"
    if _is_hub_name(data) or (data is not None and os.path.isdir(data) and _is_table(data)):
        return _read_table_texts(
            task,
            options,
            _open_table(task, data, options),
            lambda text: [text],
            ("description", "caption", "text"),
            protocol={},
        )
    _refuse_table_options(data, options)
    folder = _folder(task, data)
    places = [os.path.join(place, "docci_descriptions.jsonlines") for place in ("", "docci", "data")]
    file = _find_file(task, folder, *places)
    rows = _read_json_lines(file)
    for number, row in enumerate(rows, start=1):
        for key in ("split", "image_file", "description"):
            _field(row, key, f"{file}, entry {number}")
    if split not in (found := sorted({str(row["split"]) for row in rows})):
        raise ValueError(f"`split`: {file} has no {split!r}; it has {', '.join(found)}.")
    chosen = _first(task, options, [row for row in rows if row["split"] == split], str(file))
    finder, gaps = ImageFinder(), Gaps(task)
    images = []
    for row in chosen:
        images.append(finder.find(file.parent / "images" / row["image_file"], file.parent / row["image_file"]))
        if images[-1] is None:
            gaps.add("images", f"images/{row['image_file']}")
    others = finder.others(file.parent / "images", [row["image_file"] for row in rows])
    _tell_of_others(others, str(file.parent / "images"))
    return _retrieval(
        task,
        options,
        gaps,
        images,
        [row["image_file"] for row in chosen],
        [[row["description"]] for row in chosen],
        split=split,
        protocol={"captions": "description"},
    )


def _refuse_table_options(data: str | None, options: Options) -> None:
    for option in (*TABLE_OPTIONS, "text_column", "label_column"):
        if getattr(options, option) is not None:
            raise ValueError(f"`{option}` is for data sets on the Hub and tables, and {data} is neither.")


# Short captions.


def _read_karpathy(task: Task, data: str | None, options: Options) -> RetrievalData:
    """MSCOCO and Flickr30k, with Karpathy's split."""
    split = options.split or "test"
    protocol = {"captions": f"the first {CAPTIONS_PER_IMAGE} of each image"}
    if data is None or _is_hub_name(data) or (os.path.isdir(data) and _is_table(data)):
        table = _open_table(task, data, options)
        if "split" in table.dataset.column_names:  # of all images in one split of the Hub
            rows = [place for place, value in enumerate(table.dataset["split"]) if value == split]
            table = table._replace(dataset=table.dataset.select(rows))
        return _read_table_texts(
            task,
            options,
            table,
            partial(_five_captions, table.where),
            ("caption", "captions", "sentences", "txt", "text"),
            protocol=protocol,
            normalize=False,
        )
    _refuse_table_options(data, options)
    folder = _folder(task, data)
    places = ("", "caption_datasets", "annotations", "karpathy")
    file = _find_file(task, folder, *(os.path.join(place, f"dataset_{task.key}.json") for place in places))
    rows = _field(_read_json(file), "images", file)
    if split not in (found := sorted({str(_field(row, "split", file)) for row in rows})):
        raise ValueError(f"`split`: {file} has no {split!r}; it has {', '.join(found)}.")
    chosen = _first(task, options, [row for row in rows if row["split"] == split], str(file))
    finder, gaps = ImageFinder(), Gaps(task)
    images, names, texts = [], [], []
    for row in chosen:
        name = os.path.join(row.get("filepath", ""), _field(row, "filename", file))
        places = (name, os.path.join("images", name))
        if "filepath" not in row:
            places = [os.path.join(f, name) for f in ("flickr30k-images", "flickr30k_images", "images", "")]
        image = finder.find(*(folder / place for place in places))
        captions = _five_captions(f"{file}, {name}", _field(row, "sentences", f"{file}, {name}"))
        if len(captions) < CAPTIONS_PER_IMAGE:
            gaps.add("captions", f"{name}: {len(captions)} of {CAPTIONS_PER_IMAGE}")
        if image is None:
            gaps.add("images", places[0])
        images.append(image)
        names.append(name)
        texts.append(captions)
    gaps.refuse(len(chosen))
    for used in sorted({Path(cast(str, image)).parent for image in images}):
        _tell_of_others(finder.others(used, [row["filename"] for row in rows]), str(used))
    return _retrieval(
        task,
        options,
        gaps,
        images,
        names,
        texts,
        split=split,
        protocol=protocol,
        normalize=False,
    )


def _five_captions(where: str, value: Any) -> list[Any]:
    """The first five captions in a cell: a list of texts or of Karpathy's sentences, or lines of a text."""
    captions = [line for line in value.split("\n") if line.strip()] if isinstance(value, str) else value
    if not isinstance(captions, list):
        raise ValueError(f"{where}: expected a list of captions, got {type(value).__name__}.")
    captions = [caption.get("raw") if isinstance(caption, Mapping) else caption for caption in captions]
    return captions[:CAPTIONS_PER_IMAGE]


# One's own data.


def _pick_captions(value: Any, captions: str) -> list[Any]:
    texts = value if isinstance(value, list) else [value]
    return texts if captions == "all" else texts[:1]


def _read_records(task: Task, data: str | None, options: Options) -> RetrievalData:
    """Images with captions in any form that is trained on."""
    captions = options.captions or "long"
    column = "short_caption" if captions == "short" else "long_captions"
    if data is None:
        raise ValueError(f"`data`: {task.key} needs a folder, files, or a data set on the Hub (--data). {task.source}")
    if _is_hub_name(data) or any(os.path.isfile(os.path.join(data, name)) for name in SAVED_DATASET):
        return _read_table_texts(
            task,
            options,
            _open_table(task, data, options),
            partial(_pick_captions, captions=captions),
            (column,),
            protocol={"captions": captions},
            normalize=captions != "short",
            name=data,
        )
    for option in ("split", "revision", "config"):
        if getattr(options, option) is not None:
            raise ValueError(f"`{option}` is for data sets on the Hub, and {data} is none: its files are one split.")
    text_column, num_images = options.text_column, options.num_images
    mapping = ColumnMapping(image=options.image_column or ColumnMapping.image, long=text_column or column, short=None)
    records = load_records(data, mapping)
    if isinstance(records, IterableDataset):  # shards, whose images are kept on disk where any of them can be read
        files = sorted(Path(data).rglob("*.tar")) if os.path.isdir(data) else sorted(map(Path, glob.glob(data)))
        # other files are other data to the cache
        state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        arguments = {"source": data, "mapping": mapping, "state": state}
        records = cast(Dataset, Dataset.from_generator(_rows, gen_kwargs=arguments))
    gaps = Gaps(task)
    images: list[str | None] = []  # `None` for one that is in the records themselves
    names: list[str] = []
    texts: list[list[Any]] = []
    rows: list[int] = []
    places: dict[str, int] = {}
    for row, record in enumerate(records):
        record = cast(dict[str, Any], record)
        if record.get("error"):
            raise _incomplete(task, record["error"])
        name = str(record["id"])
        image = _image_source(record["image"], f"{data}, {name}")
        own = _pick_captions(record["long_captions"], captions)
        if isinstance(image, str):
            if image in places:  # a row for each caption
                texts[places[image]] += own
                continue
            places[image] = len(images)
        if num_images is not None and len(images) == num_images:
            continue
        if image is None or (isinstance(image, str) and not os.path.isfile(image)):
            gaps.add("images", name)
        images.append(image if isinstance(image, str) else None)
        names.append(name)
        texts.append(own)
        rows.append(row)
    _first(task, options, images, data)

    def load(place: int) -> ImageSource:
        path = images[place]
        if path is not None:
            return path
        return cast(ImageSource, _image_source(cast(Dataset, records)[rows[place]]["image"], names[place]))

    return _retrieval(
        task,
        options,
        gaps,
        LazyImages(len(images), load),
        names,
        texts,
        protocol={"captions": captions, "text_column": text_column or column},
        normalize=captions != "short",
        id=os.path.basename(os.path.normpath(data)),
        name=os.path.basename(os.path.normpath(data)),
    )


def _rows(source: str, mapping: ColumnMapping, state: list[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """The records of shards; `state` is what `datasets` knows their contents by."""
    for record in load_records(source, mapping):
        yield {"error": "", **cast(dict[str, Any], record)}


def _read_scenes(task: Task, data: str | None, options: Options) -> RetrievalData:
    """Scenes that no model was trained on, drawn as they are asked for."""
    split, captions = options.split or "test", options.captions or "long"
    if data is not None:
        raise ValueError(f"`data` {data!r}: scenes are drawn, not read.")
    if split not in ("validation", "test"):
        raise ValueError(f"`split` must be validation or test, which are held out, got {split!r}.")
    scenes = [scene(index, split=split) for index in range(options.num_images or cast(int, task.num_images))]
    texts = [[short_caption(one)] if captions == "short" else long_captions(one) for one in scenes]
    return _retrieval(
        task,
        options,
        Gaps(task),
        LazyImages(len(scenes), lambda place: render(scenes[place])),
        [one.id for one in scenes],
        [_pick_captions(own, captions) for own in texts],
        normalize=captions != "short",
        split=split,
        protocol={"captions": captions},
    )


# Classes.


def _read_classification(task: Task, data: str | None, options: Options) -> ClassificationData:
    """Any folder of one folder a class, or any data set with classes."""
    if data is None or _is_hub_name(data) or not os.path.isdir(data) or _is_table(data):
        return _read_table_classes(task, options, _open_table(task, data, options), name=data)
    _refuse_table_options(data, options)
    folder, split = Path(data), options.split
    if split is not None:
        if not (folder / split).is_dir():
            raise ValueError(f"`split`: {folder} holds no folder {split!r}.")
        folder = folder / split
    name = os.path.basename(os.path.normpath(data))
    classes = _class_folders(folder)
    if (
        classes
        and {one.lower() for one in classes} <= SPLIT_NAMES
        and any(map(_class_folders, map(folder.joinpath, classes)))
    ):
        raise ValueError(f"`split`: {folder} holds {', '.join(classes)}; say which (--split).")
    images, labels = _images_by_class(task, folder, classes)
    own = [one.replace("_", " ") for one in classes]
    return _classification(
        task,
        options,
        _first(task, options, images, data),
        labels,
        _class_names(options.class_names, own, "folder names, _ as space", len(classes), data),
        split=split,
        id=name,
        name=name,
    )


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images_by_class(task: Task, folder: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """The images below the folders of the classes, and the place of each one's class."""
    if not classes:
        raise _incomplete(task, f"{folder} holds no folders of classes")
    found, unreadable = find_images(folder)
    if unreadable:
        raise _incomplete(task, f"{folder}: {_shown([f'{name} {why}' for name, why in unreadable.items()])}")
    places = {name: place for place, name in enumerate(classes)}
    of_class = {name: places.get(name.split("/")[0]) if "/" in name else None for name in found}
    images = {name: place for name, place in of_class.items() if place is not None}
    _tell_of_others([name for name in found if name not in images], str(folder))
    there = set(images.values())
    if empty := [name for name in classes if places[name] not in there]:
        raise _incomplete(task, f"{folder} holds no image of {len(empty)} of {len(classes)} classes: {_shown(empty)}")
    return [str(folder / name) for name in images], list(images.values())


def _read_imagenet(task: Task, data: str | None, options: Options) -> ClassificationData:
    """The validation images, in folders by class or all in one, as Kaggle ships them."""
    root, split = None, options.split or "validation"
    if data is not None and os.path.isdir(data):
        places = ("val", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "")
        root = next((place for place in (Path(data, place) for place in places) if _is_imagenet(place)), None)
    if root is None and (data is None or _is_hub_name(data) or _is_table(data)):
        return _read_table_classes(task, options, _open_table(task, data, options), synonyms=True)
    _refuse_table_options(data, options)
    folder = _folder(task, data)
    if split != "validation":
        raise ValueError(f"`split` of {folder} must be validation, got {split!r}.")
    if root is None:
        raise _incomplete(task, f"{folder} holds neither val/ with folders n01440764, ... nor ILSVRC2012_val_*.JPEG")
    about = [folder, *folder.parents[:1], root.parent]
    mapping_file = next((f for place in about if (f := place / "LOC_synset_mapping.txt").is_file()), None)
    mapping = {} if mapping_file is None else _read_synsets(mapping_file)
    folders = [name for name in _class_folders(root) if WNID.fullmatch(name)]
    if folders:
        images, labels = _images_by_class(task, root, folders)
        wnids = {image: folders[label] for image, label in zip(images, labels, strict=True)}
        classes = list(mapping) or folders
    else:
        solution = next((f for place in about if (f := place / "LOC_val_solution.csv").is_file()), None)
        if solution is None:
            raise _incomplete(task, f"{folder} holds no LOC_val_solution.csv, which tells the class of each image")
        finder, gaps, wnids = ImageFinder(), Gaps(task), {}
        answers = _read_solution(solution)
        chosen = _first(task, options, sorted(answers), str(solution))
        for stem in chosen:
            image = finder.find(root / f"{stem}.JPEG")
            if image is None:
                gaps.add("images", f"{root.name}/{stem}.JPEG")
            else:
                wnids[image] = answers[stem]
        gaps.refuse(len(chosen))
        _tell_of_others(finder.others(root, [f"{stem}.JPEG" for stem in answers]), str(root))
        classes = list(mapping) or sorted(set(answers.values()))
    if unknown := sorted(set(wnids.values()) - set(classes)):
        raise ValueError(f"{mapping_file}: does not name {_shown(unknown)}.")
    if options.num_images is None and len(classes) < IMAGENET_CLASSES:
        raise _incomplete(task, f"{root} has {len(classes)} classes of {IMAGENET_CLASSES}")
    # by the names of the files, which are the numbers of the images: the same order in folders or all in one
    images = sorted(wnids, key=lambda image: os.path.basename(image))
    if options.num_images is None and len(images) < cast(int, task.num_images):
        there = {os.path.splitext(os.path.basename(image))[0] for image in images}
        lacking = [
            name for n in range(1, cast(int, task.num_images) + 1) if (name := f"ILSVRC2012_val_{n:08d}") not in there
        ]
        raise _incomplete(
            task, f"{root} lacks {len(lacking)} of {task.num_images} images: {_shown(lacking)}", first_alone=True
        )
    own = [mapping[wnid] for wnid in classes] if mapping else None
    places = {wnid: place for place, wnid in enumerate(classes)}
    return _classification(
        task,
        options,
        _first(task, options, images, str(root)),
        [places[wnids[image]] for image in images],
        _class_names(
            options.class_names, own, "the first synonyms of LOC_synset_mapping.txt", len(classes), str(folder)
        ),
        split=split,
    )


def _is_imagenet(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return any(WNID.fullmatch(name) or name.startswith("ILSVRC2012_val_") for name in os.listdir(folder))


def _read_synsets(file: Path) -> dict[str, str]:
    """The first synonym of each class of ImageNet, in the order of the classes."""
    synsets = {}
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        wnid, _, synonyms = line.strip().partition(" ")
        if not line.strip():
            continue
        if not WNID.fullmatch(wnid) or not synonyms.strip():
            raise ValueError(
                f"{file}, line {number}: expected a class and its names, as in n01440764 tench, Tinca tinca."
            )
        synsets[wnid] = synonyms.split(",")[0].strip()
    return synsets


def _read_solution(file: Path) -> dict[str, str]:
    """The class of each validation image of ImageNet."""
    rows = csv.DictReader(_read_text(file).splitlines())
    answers = {}
    for number, row in enumerate(rows, start=2):
        wnid = (row.get("PredictionString") or "").split(" ")[0]
        if not row.get("ImageId") or not WNID.fullmatch(wnid):
            raise ValueError(
                f"{file}, line {number}: expected ImageId,PredictionString, the latter starting with a class."
            )
        answers[row["ImageId"]] = wnid
    return answers


def _read_imagenet_v2(task: Task, data: str | None, options: Options) -> ClassificationData:
    """Folders 0 to 999, matched-frequency."""
    places = ("", "imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency")
    root, split = None, options.split or "test"
    if data is not None and os.path.isdir(data):
        root = next((p for p in (Path(data, place) for place in places) if p.is_dir() and _numbered(p)), None)
    if root is None and (data is None or _is_hub_name(data) or _is_table(data)):
        return _read_table_classes(task, options, _open_table(task, data, options))
    _refuse_table_options(data, options)
    folder = _folder(task, data)
    if split != "test":
        raise ValueError(f"`split` of {folder} must be test, got {split!r}.")
    if root is None:
        raise _incomplete(task, f"{folder} holds no folders 0, 1, 2, ...")
    classes = sorted(_numbered(root), key=int)
    expected = IMAGENET_CLASSES if options.num_images is None else int(classes[-1]) + 1
    if lacking := [str(n) for n in range(expected) if str(n) not in set(classes)]:
        raise _incomplete(task, f"{root} lacks {len(lacking)} of the folders 0 to {expected - 1}: {_shown(lacking)}")
    images, labels = _images_by_class(task, root, classes)
    counts = Counter(labels)
    per_class = cast(int, task.num_images) // IMAGENET_CLASSES
    if short := [f"{classes[label]} has {count}" for label, count in sorted(counts.items()) if count < per_class]:
        if options.num_images is None:
            raise _incomplete(task, f"{root} has {per_class} images in each folder; of its folders {_shown(short)}")
    order = sorted(range(len(images)), key=lambda place: (labels[place], images[place]))
    names_file = next((f for place in (root, root.parent) if (f := place / "classnames.txt").is_file()), None)
    own = None if names_file is None else _read_class_names(names_file)
    return _classification(
        task,
        options,
        _first(task, options, [images[place] for place in order], str(root)),
        [labels[place] for place in order],
        _class_names(options.class_names, own, "classnames.txt", len(classes), str(folder)),
        split=split,
    )


def _numbered(folder: Path) -> list[str]:
    return [name for name in _class_folders(folder) if name.isdecimal()]


def _read_table_classes(
    task: Task, options: Options, table: Table, *, synonyms: bool = False, name: str | None = None
) -> ClassificationData:
    """A table with an image and its class in each row."""
    image_column = _column(table, options, "image_column", ("image", "img", "jpg", "jpeg", "png", "webp"), Image)
    label_column = _column(table, options, "label_column", ("label", "cls"), ClassLabel)
    feature = table.dataset.features[label_column]
    rows = _first(task, options, range(len(table.dataset)), table.where)
    values = list(table.dataset[label_column])
    if lacking := [f"row {row}" for row, value in enumerate(values) if value is None or value in ("", -1)]:
        raise _incomplete(task, f"{len(lacking)} rows of {table.where} have no class: {_shown(lacking)}")
    own: list[str] | None
    if isinstance(feature, ClassLabel):
        own, said = [str(one) for one in feature.names], f"those of the column {label_column!r}"
        labels = values
    elif isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        own, said = sorted(set(values)), f"the values of the column {label_column!r}"
        places = {value: place for place, value in enumerate(own)}
        labels = [places[value] for value in values]
    elif isinstance(feature, Value) and "int" in feature.dtype:
        own, said = _names_beside(table), "classnames.txt"
        labels = values
    else:
        raise ValueError(
            f"`label_column`: {label_column!r} of {table.where} holds neither numbers nor names: {feature}."
        )
    if own is not None and said != "classnames.txt":
        own = [one.split(",")[0].strip() if synonyms else one.replace("_", " ") for one in own]
        said += ", the first synonym of each" if synonyms else ", _ as space"
    dataset = table.dataset.select(rows)
    return _classification(
        task,
        options,
        _table_images(task, table._replace(dataset=dataset), image_column),
        labels,
        _class_names(
            options.class_names, own, said, len(own) if own and said != "classnames.txt" else None, table.where
        ),
        split=table.split,
        names=[f"row {row}" for row in rows],
        id=table.id or (os.path.basename(os.path.normpath(name)) if name else None),
        name=name,
        revision=table.revision,
    )


def _names_beside(table: Table) -> list[str] | None:
    """The names in the file `classnames.txt` that some data sets on the Hub have."""
    if table.id is None:
        return None
    with _from_hub(table.id, table.revision):
        try:
            file = hf_hub_download(table.id, "classnames.txt", repo_type="dataset", revision=table.revision)
        except RemoteEntryNotFoundError:
            return None
    return _read_class_names(Path(file))


class ClassNames(NamedTuple):
    """The names of the classes, and where they come from."""

    names: list[str]
    source: str


def _class_names(
    given: str | None, own: list[str] | None, own_source: str, count: int | None, where: str
) -> ClassNames:
    """The names that are asked for, or the data's own; `count` is of how many classes, where that is known."""
    if given is None:
        if own is None:
            raise ValueError(
                f"{where}: its classes have no names. Say them with `class_names` (--class-names): openai, "
                "for the classes of ImageNet, or a file with a name in each line."
            )
        chosen = ClassNames(own, own_source)
    elif given == "openai":
        chosen = _openai_class_names()
    elif not os.path.isfile(given):
        raise FileNotFoundError(f"`class_names`: {given} is no file; pass openai, or a file with a name in each line.")
    else:
        chosen = ClassNames(_read_class_names(Path(given)), f"the file {os.path.basename(given)}")
    if count is not None and len(chosen.names) != count:
        raise ValueError(f"`class_names`: {chosen.source} has {len(chosen.names)} names, and {where} {count} classes.")
    shared = [name for name, times in Counter(chosen.names).items() if times > 1]
    if shared:
        logger.warning(
            "%d names stand for several classes, which nothing can tell apart then: %s.", len(shared), _shown(shared)
        )
    return chosen


def _read_class_names(file: Path) -> list[str]:
    lines = [line.strip() for line in _read_text(file).rstrip().split("\n")]
    if "" in lines:
        raise ValueError(f"{file}, line {lines.index('') + 1}: empty; expected a class name in each line.")
    return lines


def _openai_class_names() -> ClassNames:
    """The names of ImageNet's classes that CLIP was evaluated with."""
    names = open_clip_metadata().IMAGENET_CLASSNAMES
    try:
        release = f" {version('open_clip_torch')}"
    except PackageNotFoundError:  # a checkout on the path
        release = ""
    return ClassNames(list(names), f"openai (open_clip{release})")


def _classification(
    task: Task,
    options: Options,
    images: Sequence[ImageSource],
    labels: Sequence[int],
    class_names: ClassNames,
    *,
    split: str | None,
    names: Sequence[str] | None = None,
    id: str | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> ClassificationData:
    """The images to score, with the labels of as many at least."""
    labels = labels[: len(images)]
    if wrong := sorted({label for label in labels if not 0 <= label < len(class_names.names)}):
        raise ValueError(f"{name or task.name}: class {wrong[0]}, and there are {len(class_names.names)} names.")
    protocol: dict[str, Any] = {"class_names": class_names.source}
    if options.num_images is not None:
        protocol["first_images"] = options.num_images
    if names is None:
        names = ["/".join(Path(cast(str, image)).parts[-2:]) for image in images]
    return ClassificationData(
        id=id or task.id,
        name=name or task.name,
        images=images,
        image_names=names,
        labels=labels,
        class_names=class_names.names,
        split=split,
        revision=revision,
        protocol=protocol,
    )


def _sharegpt4v(size: str, number: int) -> Task:
    return Task(
        key=f"sharegpt4v-{size}",
        name=f"ShareGPT4V-{size}",
        id="Lin-Chen/ShareGPT4V",
        description=f"long captions by ShareGPT4V's captioner of the first {number} images of SAM",
        source=(
            "share-captioner_coco_lcs_sam_1246k_1107.json of Lin-Chen/ShareGPT4V on the Hub, or share4v_sam_10k.json "
            "of github.com/wuw2019/LoTLIP; the images are those of SA-1B, unpacked to sa_000000/images/ and so on, or "
            "to sam/images/."
        ),
        reader=_read_sharegpt4v,
        options=("num_images", "normalize"),
        num_images=number,
        num_texts=number,
    )


TASKS = {
    task.key: task
    for task in (
        Task(
            key="dci",
            name="DCI",
            id="facebook/DCI",
            description="very long captions by people, all splits",
            source=(
                "dci.tar.gz of github.com/facebookresearch/DCI (densely_captioned_images/ with splits.json and "
                "annotations/), and sa_000138.tar of SA-1B, unpacked to densely_captioned_images/photos/."
            ),
            reader=_read_dci,
            options=("num_images", "split", "normalize"),
            num_images=7805,
            num_texts=7805,
            split="all",
        ),
        Task(
            key="iiw",
            name="IIW",
            id="google/imageinwords",
            description="long captions by people: IIW-400, DCI-Test and DOCCI-Test",
            source=(
                "the folders IIW-400, DCI_Test and DOCCI_Test of datasets/ of github.com/google/imageinwords; the "
                "images of DOCCI (google.github.io/docci) in docci/ and docci_aar/ (or as unpacked, images/ and "
                "images_aar/), those of DCI in dci/ (or densely_captioned_images/photos/)."
            ),
            reader=_read_iiw,
            options=("num_images", "normalize"),
            num_images=612,
            num_texts=612,
        ),
        _sharegpt4v("1k", 1000),
        _sharegpt4v("10k", 10_000),
        Task(
            key="urban1k",
            name="Urban1k",
            id="BeichenZhang/Urban1k",
            description="long captions of busy city views, from Long-CLIP",
            source="Urban1k.zip of BeichenZhang/Urban1k on the Hub: image/ and caption/.",
            reader=_read_urban1k,
            options=("num_images", "revision", "normalize"),
            num_images=1000,
            num_texts=1000,
            hub_id="BeichenZhang/Urban1k",
        ),
        Task(
            key="docci",
            name="DOCCI",
            id="google/docci",
            description="long captions by people of images that differ in details",
            source=(
                "google.github.io/docci: docci_descriptions.jsonlines, and docci_images.tar.gz unpacked to images/ "
                "beside it."
            ),
            reader=_read_docci,
            options=("num_images", "split", *TABLE_OPTIONS, "text_column", "normalize"),
            num_images=5000,
            num_texts=5000,
            split="test",
        ),
        Task(
            key="coco",
            name="MSCOCO",
            id="nlphuji/mscoco_2014_5k_test_image_text_retrieval",
            description="five short captions of each image, Karpathy's test split",
            source=(
                "dataset_coco.json of Karpathy's caption_datasets.zip, and val2014.zip of cocodataset.org unpacked to "
                "val2014/ beside it."
            ),
            reader=_read_karpathy,
            options=("num_images", "split", *TABLE_OPTIONS, "text_column", "normalize"),
            num_images=5000,
            num_texts=25_000,
            split="test",
            hub_id="nlphuji/mscoco_2014_5k_test_image_text_retrieval",
            hub_revision="refs/convert/parquet",
        ),
        Task(
            key="flickr30k",
            name="Flickr30k",
            id="nlphuji/flickr_1k_test_image_text_retrieval",
            description="five short captions of each image, Karpathy's test split",
            source=(
                "dataset_flickr30k.json of Karpathy's caption_datasets.zip, and Flickr30k's images (on request) in "
                "flickr30k-images/ beside it."
            ),
            reader=_read_karpathy,
            options=("num_images", "split", *TABLE_OPTIONS, "text_column", "normalize"),
            num_images=1000,
            num_texts=5000,
            split="test",
            hub_id="nlphuji/flickr_1k_test_image_text_retrieval",
            hub_revision="refs/convert/parquet",
        ),
        Task(
            key="imagenet-1k",
            name="ImageNet-1k",
            id="ILSVRC/imagenet-1k",
            description="1000 classes, the validation images",
            source=(
                "image-net.org or Kaggle's imagenet-object-localization-challenge, with val/ in folders by class or "
                "with LOC_val_solution.csv; or ILSVRC/imagenet-1k on the Hub, which asks for an account."
            ),
            reader=_read_imagenet,
            options=("num_images", "split", *TABLE_OPTIONS, "label_column", "class_names"),
            num_images=50_000,
            split="validation",
            hub_id="ILSVRC/imagenet-1k",
        ),
        Task(
            key="imagenet-v2",
            name="ImageNet-V2",
            id="vaishaal/ImageNetV2",
            description="new images of ImageNet's classes, matched-frequency",
            source=(
                "imagenetv2-matched-frequency.tar.gz of vaishaal/ImageNetV2 on the Hub, unpacked; or "
                "clip-benchmark/wds_imagenetv2 on the Hub."
            ),
            reader=_read_imagenet_v2,
            options=("num_images", "split", *TABLE_OPTIONS, "label_column", "class_names"),
            num_images=10_000,
            split="test",
            hub_id="clip-benchmark/wds_imagenetv2",
        ),
        Task(
            key="classification",
            name="classification",
            id="classification",
            description="any folder of one folder a class, or data set with classes",
            source="pass a folder of one folder a class, or the name of a data set on the Hub.",
            reader=_read_classification,
            options=("num_images", "split", *TABLE_OPTIONS, "label_column", "class_names"),
        ),
        Task(
            key="retrieval",
            name="retrieval",
            id="retrieval",
            description="any images with captions, in the forms that are trained on",
            source="see `load_records` for the forms that are read.",
            reader=_read_records,
            options=("num_images", "split", *TABLE_OPTIONS, "text_column", "captions", "normalize"),
        ),
        Task(
            key="scenes",
            name="Scenes",
            id="scenes",
            description="drawn pictures with long captions that no model of the quickstart was trained on",
            source="nowhere: they are drawn.",
            reader=_read_scenes,
            options=("num_images", "split", "captions", "normalize"),
            num_images=500,
            num_texts=500,
            split="test",
        ),
    )
}
