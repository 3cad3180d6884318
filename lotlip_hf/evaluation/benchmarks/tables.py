"""Tables: data sets that the `datasets` library can open, on the Hub or in a folder."""

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Image, Value, load_dataset, load_dataset_builder
from datasets.arrow_reader import ArrowReader
from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError

from ...data.readers import KINDS, every_row
from ...data.records import hub_folders, is_hub_name, locate_image, undecoded
from ...data.sources import kind_of
from ...images import ImageSource, image_source
from .classes import name_classes, read_class_names
from .collect import Row, Source
from .files import caption_of, is_image_name
from .hub import from_hub, hub_commit, not_kept, reason_of

# Files that `save_to_disk` writes for one split and for several.
SAVED_DATASET = ("state.json", "dataset_dict.json")
NUMBER = re.compile("0|[1-9][0-9]*")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")


class Table(NamedTuple):
    """
    A split of a data set, with undecoded images. Paths of images are relative to `folder`. `is_text` is true if all
    values are strings, as in CSV.
    """

    dataset: Dataset
    folder: str
    is_text: bool


def is_table(source: Source) -> bool:
    """Whether the data set is on the Hub, in a file, or in a folder of Parquet, Arrow or tar files without images."""
    data = source.data
    if data is None or is_hub_name(data) or os.path.isfile(data) or is_saved_dataset(data):
        return True
    found = False
    for _, _, names in os.walk(data):
        if any(map(is_image_name, names)):
            return False
        found = found or any(name.endswith((".parquet", ".arrow", ".tar")) for name in names)
    return found


def is_saved_dataset(folder: str) -> bool:
    """Whether the folder was written by `save_to_disk`."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in SAVED_DATASET)


def open_table(source: Source) -> Table:
    """Opens the requested split, else that of the task, else the only one. Other splits are not downloaded."""
    task, options, data = source.task, source.options, source.data
    revision, commit = options.revision, None
    if data is None:
        data, revision = task.hub_id or "", revision or task.hub_revision
    on_hub = is_hub_name(data)
    if on_hub:
        commit = hub_commit(data, revision)
    if commit is not None and constants.HF_HUB_OFFLINE:
        dataset, chosen = _kept_split(source, data, commit)
    else:
        dataset, chosen = _load_split(source, data, commit)
    if options.split is None and task.split not in (None, chosen) and task.num_images not in (None, len(dataset)):
        raise ValueError(
            f"{data} only has the split {chosen!r} with {len(dataset)} images, but {task.name} is the split "
            f"{task.split!r} with {task.num_images}. To score it anyway, pass --split {chosen}."
        )
    source.where, source.split = f"{data} (split {chosen})", chosen
    folder = "" if on_hub else data if os.path.isdir(data) else os.path.dirname(data) or "."
    if on_hub:
        source.id, source.revision = data, commit
    roots = (os.fspath(options.image_root),) if options.image_root else hub_folders(data) if on_hub else (folder,)
    source.roots = roots
    return Table(undecoded(dataset), folder, KINDS.get(os.path.splitext(data)[1].lower()) == "csv")


@contextmanager
def _opening(data: str) -> Iterator[None]:
    """Adds the name of the data set to errors in this context."""
    try:
        yield
    except Exception as error:
        reason = error.__cause__ or error
        hint = ""
        if is_hub_name(data) and isinstance(reason, RuntimeError | ValueError):
            # the data set has a loading script, or `datasets` fell back to a cached revision
            hint = (
                " If the data set has a loading script, which `datasets` does not run, try "
                "revision='refs/convert/parquet' (--data-revision)."
            )
        raise ValueError(f"{data} cannot be opened ({type(reason).__name__}: {reason_of(reason)}).{hint}") from error


def _kept_split(source: Source, data: str, commit: str) -> tuple[Dataset, str]:
    """Opens a split of a data set on the Hub from the cache, which only contains complete splits."""
    kept = {}  # split -> folder and info
    for file in sorted(Path(datasets.config.HF_DATASETS_CACHE).glob(f"*/*/*/{commit}/dataset_info.json")):
        info = DatasetInfo.from_directory(str(file.parent))
        if info.config_name == (source.options.config or "default"):
            kept |= {str(split): (file.parent, info) for split in info.splits or {}}
    if not kept:
        raise not_kept(data, f"the commit {commit}")
    chosen = _choose_split(source, list(kept), f"{data} in the cache")
    folder, info = kept[chosen]
    with _opening(data):
        parts = ArrowReader(str(folder), info).read(info.dataset_name, chosen, list(info.splits.values()))
        return Dataset(**parts), chosen


def _load_split(source: Source, data: str, commit: str | None) -> tuple[Dataset, str]:
    if is_saved_dataset(data):
        with _opening(data):
            saved = datasets.load_from_disk(data)
        splits = saved if isinstance(saved, DatasetDict) else DatasetDict({_split_of(source, saved.split): saved})
        chosen = _choose_split(source, list(map(str, splits)), data)
        return splits[chosen], chosen
    if os.path.isfile(data):
        kind, chosen = kind_of([data]), _split_of(source, None)
        with _opening(data):
            if kind in ("csv", "json"):
                return _read_table(data), chosen
            dataset = load_dataset(kind, data_files={chosen: glob.escape(data)}, split=chosen)
        return cast(Dataset, dataset), chosen
    with _opening(data):
        builder = load_dataset_builder(data, source.options.config, revision=commit)
    data_files = {str(name): list(files) for name, files in cast(Any, builder.config.data_files or {}).items()}
    chosen = _choose_split(source, list(data_files), data)
    # load only the files of this split; `datasets` interprets local names as patterns
    files = {chosen: [file if commit else glob.escape(file) for file in data_files[chosen]]}
    with _opening(data):
        builder = load_dataset_builder(
            data, source.options.config, data_files=files, features=builder.info.features, revision=commit
        )
        if commit is not None and builder.hash != commit:
            # without a connection, `datasets` falls back to any cached revision
            raise ConnectionError(f"the commit {commit} cannot be downloaded")
        builder.download_and_prepare(verification_mode="no_checks")  # the card describes all splits
        return cast(Dataset, builder.as_dataset(split=chosen)), chosen


def _split_of(source: Source, own: object) -> str:
    """Returns the name of the only split of a file or folder."""
    return str(own or source.options.split or source.task.split or "train")


def _read_table(file: str) -> Dataset:
    """Reads a CSV or JSON table without conversion of its values."""
    rows = list(every_row(file))
    columns = dict.fromkeys(column for row in rows for column in row)
    return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})


def _choose_split(source: Source, splits: Sequence[str], where: str) -> str:
    split, default = source.options.split, source.task.split
    chosen = split or (default if default in splits else splits[0] if len(splits) == 1 else None)
    if chosen is None or chosen not in splits:
        other = f", but not {split!r}" if split else ""
        raise ValueError(f"{where} has the splits {', '.join(splits) or '-'}{other}. Pass one as `split` (--split).")
    return chosen


def _find_column(source: Source, table: Table, option: str, usual: Sequence[str], feature: type | None = None) -> str:
    """Returns the column that the option names, or the first of `usual` that exists, or the only one of `feature`."""
    given = getattr(source.options, option)
    columns = table.dataset.column_names
    usual = usual if given is None else (given,)
    of_feature = [name for name in columns if feature and isinstance(table.dataset.features[name], feature)]
    found = next((name for name in usual if name in columns), None)
    if found is None and given is None and len(of_feature) == 1:
        found = of_feature[0]
    if found is None:
        raise ValueError(
            f"{source.where} has the columns {', '.join(columns)}, but not {' or '.join(usual)}. Pass one as "
            f"`{option}` (--{option.replace('_', '-')})."
        )
    return found


def stored_image(value: Any, name: str, locate: Callable[[str], str] = str) -> ImageSource | None:
    """Returns the image in a cell: bytes, or a path that `locate` resolves; `None` if the cell is empty."""
    value = image_source(value).source
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ValueError(f"{name}: the image is a URL, {value}. Download the images and pass their folder as `data`.")
    return locate(value) if isinstance(value, str) and value else value or None


def _image_loader(source: Source, table: Table) -> Callable[[int], ImageSource]:
    """Returns a function that loads the image of a row, and raises an error if it is missing."""
    column = _find_column(source, table, "image_column", IMAGE_COLUMNS, Image)
    images = table.dataset.select_columns([column])
    locate = partial(locate_image, folder=table.folder, roots=source.roots)

    def load(row: int) -> ImageSource:
        image = stored_image(images[row][column], f"{source.where}, row {row}", locate)
        if image is None:
            raise source.incomplete(f"row {row} of {source.where} has no image in the column {column!r}")
        return image

    return load


def table_texts(
    source: Source, usual_columns: Sequence[str], texts_of: Callable[[Any], Sequence[Any]], split_column: bool = False
) -> Iterator[Row]:
    """
    Yields the rows of a table with an image and its texts in each.

    Args:
        source (`Source`): The data of the task.
        usual_columns (`Sequence[str]`): Usual names of the column of the texts.
        texts_of (`Callable`): Function that returns the texts in a cell.
        split_column (`bool`, *optional*, defaults to `False`): Whether to filter rows by a column `split`, if any.
    """
    table = open_table(source)
    if split_column and "split" in table.dataset.column_names:
        rows = [row for row, split in enumerate(table.dataset["split"]) if split == source.split]
        table = table._replace(dataset=table.dataset.select(rows))
    load = _image_loader(source, table)
    column = _find_column(source, table, "text_column", usual_columns)
    source.protocol["text_column"] = column
    for row, value in enumerate(table.dataset[column]):
        texts = [caption_of(text, f"{source.where}, row {row}, column {column!r}") for text in texts_of(value)]
        yield Row(f"row {row}", load=partial(load, row), texts=texts)


def table_classes(source: Source, synonyms: bool = False) -> Iterator[Row]:
    """Yields the images of a table with their classes; `synonyms` reduces a class name to its first synonym."""
    table = open_table(source)
    load = _image_loader(source, table)
    column = _find_column(source, table, "label_column", ("label", "cls"), ClassLabel)
    feature = table.dataset.features[column]
    labels = [None if value in (None, "", -1) else value for value in table.dataset[column]]
    own, own_source = None, "classnames.txt"
    if isinstance(feature, ClassLabel):
        own, own_source = [str(one) for one in feature.names], f"those of the column {column!r}"
    elif table.is_text and all(NUMBER.fullmatch(label or "0") for label in labels):
        labels = [None if label is None else int(label) for label in labels]
    elif isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        own = sorted({label for label in labels if label is not None})
        own_source = f"the values of the column {column!r}"
        numbers = {label: number for number, label in enumerate(own)}
        labels = [numbers.get(label) for label in labels]
    elif isinstance(feature, Value) and "int" in feature.dtype:
        own = _names_beside(source)
    else:
        raise ValueError(
            f"The column {column!r} of {source.where} contains neither numbers nor names, but {feature}. Pass another "
            "column as `label_column` (--label-column)."
        )
    count = None
    if own_source != "classnames.txt":
        own = [one.split(",")[0].strip() if synonyms else one.replace("_", " ") for one in own or ()]
        own_source += ", the first synonym of each" if synonyms else ", _ as space"
        count = len(own)
    name_classes(source, own, own_source, count)
    for row, label in enumerate(labels):
        yield Row(f"row {row}", load=partial(load, row), label=label)


def _names_beside(source: Source) -> list[str] | None:
    """Reads the class names in `classnames.txt` of a data set on the Hub, if it exists."""
    if source.id is None:
        return None
    where = {"repo_id": source.id, "filename": "classnames.txt", "repo_type": "dataset", "revision": source.revision}
    if try_to_load_from_cache(**where) is _CACHED_NO_EXIST:
        return None
    with from_hub(source.id, source.revision):
        try:
            file = hf_hub_download(**where)
        except RemoteEntryNotFoundError:
            return None
    return read_class_names(Path(file))
