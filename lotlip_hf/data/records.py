"""
Loads data sets as records ([`~lotlip_hf.data.record.Record`]).

A `ColumnMapping` maps the columns of a data set to the fields of a record. `MAPPINGS` has the mappings of public data
sets of long captions. `readers.read_rows` reads local files, with or without streaming. Without streaming, the records
are copied to a table for random access in the cache of `datasets`.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset
from datasets.utils import are_progress_bars_disabled
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import logging

from ..files import MAX_BYTES, parse_json, printable, replacing
from ..images import find_images, image_extensions, image_source
from ..terminal import progress_bar
from .mappings import MAPPINGS, ColumnMapping, MissingColumn, alternatives, resolve
from .readers import RowError, SizeError, column_of, read_rows, value_of
from .record import FIELDS, OPTIONAL, REGIONS, TEXT, TEXTS, VECTOR, VECTORS, Kind, RequiredFields, problem_of
from .sentences import split_sentences
from .sources import SplitError, find_files, is_hub_name, kind_of

logger = logging.get_logger(__name__)

__all__ = [
    "MAPPINGS",
    "MissingColumn",
    "ColumnMapping",
    "SplitError",
    "find_files",
    "image_records",
    "is_hub_name",
    "load_records",
    "read_table",
    "to_record",
]

FIRST_ROWS = 20  # rows that are read to find the columns
TABLE_ROWS, TABLE_BYTES = 1000, 1 << 26  # maximum size of a block of records that is written to a table
NUMBER_BYTES = 32  # of a number in a list of Python
TABLE_VERSION = 3  # version of the tables in the cache
COLUMNS: dict[Kind, Any] = {
    TEXT: Value("string"),
    TEXTS: List(Value("string")),
    REGIONS: List({"box": List(Value("float64")), "text": Value("string")}),
    VECTOR: List(Value("float32")),
}
FEATURES = Features(
    {
        # A relative `path` starts at the folder of the data file with the index `file` in the list of files.
        "image": {"bytes": Value("large_binary"), "path": Value("string"), "file": Value("int32")},
        **{name: COLUMNS[kind] for name, kind in FIELDS.items()},
        "id": Value("string"),
        "error": Value("string"),
    }
)


def load_records(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    mapping: str | ColumnMapping = "records",
    split: str | None = None,
    image_folder: str | os.PathLike | None = None,
    streaming: bool = False,
    *,
    image_root: str | os.PathLike | None = None,
    max_record_bytes: int = MAX_BYTES,
    **kwargs: Any,
) -> Dataset | IterableDataset:
    """
    Loads a data set as records, for `LoTLIPCollator`.

    A record is a dictionary with `image`, `short_caption`, `long_captions`, `id`, the optional fields that the data
    set has, and `error`, which is `None` or the reason why the record is broken. Texts and ids are not changed. Images
    are not decoded, so that the collator decides whether a broken image stops the run. If a file of a local stream is
    damaged, the last record of the file has an `error` and `is_shard`.

    Images must be in the image folder or in `image_root`, after resolving links. A record with an image outside these
    folders is broken. WebDataset shards and data sets on the Hub can name local image files only if `image_folder` or
    `image_root` is set.

    Args:
        source (`str` or `os.PathLike` or `Sequence`): A folder of images with `metadata.jsonl`, `metadata.csv` or
            `metadata.parquet`; a folder of WebDataset shards (`*.tar`), Parquet, JSON, JSON lines, CSV or TSV files;
            names or patterns of these files (`shards/*.tar`, `shards/{00000..00010}.tar`); or the Hub id of a data
            set.
        mapping (`str` or `ColumnMapping`, *optional*, defaults to `"records"`): The columns to read: a name in
            `MAPPINGS` or a `ColumnMapping`.
        split (`str`, *optional*): The split. Defaults to `"train"` for a data set on the Hub. For local files, a word
            in the names of files and folders determines their split (`train/`, `captions-val.csv`). `"all"` reads all
            splits.
        image_folder (`str` or `os.PathLike`, *optional*): Base folder of relative paths of images. Defaults to the
            folder of the data file.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read in order, without a copy in the cache of
            `datasets`. WebDataset shards are always streamed.
        image_root (`str` or `os.PathLike`, *optional*): Folder that must contain the images. Defaults to the image
            folder.
        max_record_bytes (`int`, *optional*, defaults to `MAX_BYTES`): Maximum size of a line, an entry or a sample.
            Larger ones are not read and become broken records.
        **kwargs (`Any`): Further arguments of `datasets.load_dataset` for a data set on the Hub, such as `name` or
            `revision`.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: The records, as an `IterableDataset` when streaming. The
        workers of a `DataLoader` divide the files.

    Raises:
        `FileNotFoundError`: If a file or folder does not exist, or a folder has no data files.
        `MissingColumn`: If a column is missing.
        `SplitError`: If the files belong to several splits, or not to the requested one.
        `ValueError`: If `mapping` is unknown, or a file cannot be read.

    Example:

    ```python
    >>> from lotlip_hf.data.records import ColumnMapping, load_records

    >>> records = load_records("pictures")  # metadata.jsonl with file_name, short_caption and long_captions
    >>> mapping = ColumnMapping(short="txt", long=("blip", "llava"))  # two fields of the JSON of each sample
    >>> shards = load_records("shards/{00000..00010}.tar", mapping)  # doctest: +SKIP
    >>> docci = load_records("google/docci", "docci", streaming=True)  # doctest: +SKIP
    ```
    """
    if isinstance(mapping, str):
        if mapping not in MAPPINGS:
            raise ValueError(f"`mapping` must be a ColumnMapping or one of {', '.join(MAPPINGS)}, got {mapping!r}.")
        mapping = MAPPINGS[mapping]
    images = _Images(image_folder, image_root)
    if is_hub_name(source):
        return _hub_records(cast(str, source), mapping, split or "train", images, streaming, kwargs)
    if kwargs:
        raise ValueError(f"{', '.join(kwargs)}: only data sets on the Hub accept further arguments, not {source}.")
    files = find_files(source, split)
    if kind_of(files) != "webdataset" and not streaming:
        return read_table(files, mapping, image_folder, image_root, max_record_bytes)
    # `datasets` divides the list of files between processes and workers.
    arguments = {
        "files": files,
        "mapping": _resolve_of(files, mapping, images, max_record_bytes),
        "images": images,
        "max_bytes": max_record_bytes,
    }
    return cast(IterableDataset, IterableDataset.from_generator(_stream, gen_kwargs=arguments))


def image_records(
    folder: str | os.PathLike, image_root: str | os.PathLike | None = None
) -> list[dict[str, Any]] | None:
    """
    Lists the images of a folder that has no table as records without captions. Their ids are the paths in the folder.

    Args:
        folder (`str` or `os.PathLike`): Folder, with its subfolders.
        image_root (`str` or `os.PathLike`, *optional*, defaults to `folder`): Links to files outside of this folder
            are not followed.

    Returns:
        `list[dict[str, Any]]` or `None`: The records, sorted by id. An image that may not be read has an `error`.
        `None` if `folder` is not a folder, or has no images.
    """
    images, unreadable = find_images(folder, image_root) if os.path.isdir(folder) else ({}, {})
    empty = {"short_caption": None, "long_captions": []}
    records = [{"image": os.path.join(folder, name), "id": name, **empty} for name in images]
    records += [{"image": None, "id": name, "error": reason, **empty} for name, reason in unreadable.items()]
    return sorted(records, key=lambda record: record["id"]) or None


@dataclass(frozen=True)
class _Images:
    """The arguments `image_folder` and `image_root` of [`load_records`]."""

    folder: str | os.PathLike | None
    root: str | os.PathLike | None

    def of(self, file: str) -> tuple[str, tuple[str, ...]]:
        """Returns the base folder of image paths in a data file, and the folders that may contain the images."""
        # Shards contain images, so image files named in a shard are not opened by default.
        return self.below(None if file.lower().endswith(".tar") else os.path.dirname(file) or ".")

    def below(self, own: str | None = None) -> tuple[str, tuple[str, ...]]:
        """Returns the same as `of`, with `own` as the default image folder."""
        folder = self.folder or own or self.root
        return ("", ()) if folder is None else (os.fspath(folder), (os.fspath(self.root or folder),))


def _hub_records(
    name: str, mapping: ColumnMapping, split: str, images: _Images, streaming: bool, kwargs: dict[str, Any]
) -> Dataset | IterableDataset:
    dataset = load_dataset(name, split=split, streaming=streaming, **kwargs)
    folder, roots = images.below()
    roots = roots or hub_folders(name)
    if isinstance(dataset, Dataset):
        resolved = resolve(mapping, dataset.column_names, name)
        transform = partial(_to_records, mapping=resolved, folder=folder, roots=roots)
        return undecoded(dataset).with_transform(transform)
    dataset = undecoded(cast(IterableDataset, dataset))
    columns = dataset.column_names or list(next(iter(dataset)))
    resolved = resolve(mapping, columns, name)
    return dataset.map(partial(to_record, mapping=resolved, folder=folder, roots=roots), remove_columns=columns)


def hub_folders(name: str) -> tuple[str, ...]:
    """Returns the folders of a downloaded data set: its folder in the Hub cache, and that of unpacked archives."""
    cached = os.path.join(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="dataset"))
    return cached, os.fspath(datasets.config.DOWNLOADED_DATASETS_PATH)


def read_table(
    files: Sequence[str],
    mapping: ColumnMapping,
    image_folder: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    max_record_bytes: int = MAX_BYTES,
) -> Dataset:
    """
    Copies the records of files to a table for random access, in the cache of `datasets`. The table is made again when
    the files change.

    Args:
        files (`Sequence[str]`): The files, as returned by [`find_files`].
        mapping (`ColumnMapping`): The columns to read.
        image_folder, image_root (`str` or `os.PathLike`, *optional*): See [`load_records`].
        max_record_bytes (`int`, *optional*, defaults to `MAX_BYTES`): See [`load_records`].

    Returns:
        `datasets.Dataset`: The records.

    Raises:
        `ValueError`: If a file is damaged, or a column is missing.
    """
    images = _Images(image_folder, image_root)
    mapping = _resolve_of(files, mapping, images, max_record_bytes)
    state = [(os.path.abspath(file), (status := os.stat(file)).st_size, status.st_mtime_ns) for file in files]
    columns = {field: column for field, column in dataclasses.asdict(mapping).items() if field != "keep"}
    key = json.dumps([TABLE_VERSION, state, columns, max_record_bytes])
    folder = Path(datasets.config.HF_DATASETS_CACHE, "lotlip")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.blake2b(key.encode(errors='surrogateescape'), digest_size=16).hexdigest()}.arrow"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            with replacing(path) as file, pa.ipc.new_stream(file, FEATURES.arrow_schema) as writer:
                for block in _blocks(files, mapping, max_record_bytes):
                    writer.write_batch(pa.RecordBatch.from_pylist(block, schema=FEATURES.arrow_schema))
    folders = tuple(map(images.of, files))
    table = Dataset.from_file(str(path))
    absent = [name for name in OPTIONAL if table.data.column(name).null_count == len(table)]
    return table.remove_columns(absent).with_transform(partial(_from_table, folders=folders))


def first_error(records: Dataset | IterableDataset) -> str | None:
    """Returns the first `error` in a table of [`read_table`], or `None`."""
    if not isinstance(records, Dataset) or records.features.get("image") != FEATURES["image"]:
        return None
    errors = records.select_columns("error").with_format("arrow")[:]["error"].drop_null()
    return errors[0].as_py() if len(errors) else None


def ids_of(records: Dataset) -> Iterator[str]:
    """Yields the ids of a table of records."""
    return (record["id"] for record in without_images(records))


def without_images(records: Any) -> Any:
    """Returns records without their images if they are a table of [`read_table`] or have no transform; else as is."""
    if isinstance(records, Dataset) and "image" in records.features:
        if records.features["image"] == FEATURES["image"] or records.format["type"] is None:
            return records.remove_columns("image")
    return records


def _blocks(files: Sequence[str], mapping: ColumnMapping, max_bytes: int) -> Iterator[list[dict[str, Any]]]:
    """Yields the records of files as rows of a table, in blocks of limited size."""
    block: list[dict[str, Any]] = []
    size = 0
    for number, file in enumerate(files):
        try:
            name, shown = os.path.basename(file), not are_progress_bars_disabled()
            for record in progress_bar(
                _read(file, mapping, max_bytes), desc=name, unit="record", shown=shown, delay=2
            ):
                stored, path = image_source(record["image"])
                content = stored if isinstance(stored, bytes) else None
                image = {"bytes": content, "path": path, "file": number}
                block.append({**record, "image": None if stored is None else image})
                texts = [record["id"], record["error"]]
                for name, kind in FIELDS.items():
                    texts += [] if record.get(name) is None else kind.texts(record[name])
                size += len(content or b"") + sum(len(text) for text in texts if text)
                size += sum(NUMBER_BYTES * len(record.get(name) or ()) for name in VECTORS)
                if len(block) == TABLE_ROWS or size > TABLE_BYTES:
                    yield block
                    block, size = [], 0
        except Exception as error:  # libraries raise exceptions of any class on a damaged file
            raise ValueError(
                f"{file} cannot be read as {kind_of([file])} ({type(error).__name__}: {error}). Repair or remove the "
                "file, or set `streaming=True` and `on_error='skip'` to skip it."
            ) from error
    if block:
        yield block


def _from_table(rows: dict[str, list[Any]], folders: Sequence[tuple[str, tuple[str, ...]]]) -> dict[str, list[Any]]:
    """Converts rows of a table to records, with paths of image files that can be opened."""
    records = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    for record in records:
        image = record.get("image")
        if image is not None:
            record["image"] = {"bytes": image["bytes"], "path": image["path"]}
            _locate(record, *folders[image["file"]])
    return {name: [record[name] for record in records] for name in rows}


def to_record(
    row: Mapping[str, Any], mapping: ColumnMapping, folder: str = "", roots: tuple[str, ...] = ()
) -> dict[str, Any]:
    """
    Converts a row to a record, with a mapping without patterns. Missing values and wrong types remain, because the
    collator checks them.
    """
    record = _fields(row, mapping)
    _locate(record, folder, roots)
    return record


def _fields(row: Mapping[str, Any], mapping: ColumnMapping) -> dict[str, Any]:
    """Converts a row to a record, with the image as it is stored."""
    long_captions: list[Any] = []
    for column in alternatives(mapping.long):
        value = value_of(row, column)
        values = value if isinstance(value, list) else ["" if value is None else value]
        long_captions += map(_whole, values)
    if mapping.short is None:
        first = next((caption for caption in long_captions if isinstance(caption, str) and caption.strip()), "")
        short_caption = next(iter(split_sentences(first)), None)
    else:
        short_caption = _whole(_as_text(value_of(row, alternatives(mapping.short)[0])))

    image = value_of(row, alternatives(mapping.image)[0])
    source, path = image_source(image)
    content = source if isinstance(source, bytes) else None
    record_id = None if mapping.id is None else _as_text(value_of(row, alternatives(mapping.id)[0]))
    if record_id in (None, "") and content is None:
        record_id = path
    if record_id in (None, ""):
        digest = hashlib.blake2b(content or b"", digest_size=16)
        digest.update(repr((short_caption, long_captions)).encode(errors="surrogatepass"))
        record_id = digest.hexdigest()
    record = {
        "image": None if image == "" else image,
        "short_caption": short_caption,
        "long_captions": long_captions,
        "id": record_id,
        "error": None,
    }
    if mapping.keep:
        record["kept"] = {column: value_of(row, column) for column in mapping.keep}
    for name, column in mapping.optional.items():
        value = value_of(row, column)
        if value is None or value == "":
            continue
        value = OPTIONAL_READERS[OPTIONAL[name]](value)
        if name in VECTORS or OPTIONAL[name].is_valid(value):
            record[name] = value
        else:  # the column may have another meaning
            logger.warning_once(
                f"Column {column!r} is ignored in rows where it is not {OPTIONAL[name].expected}, as `{name}` must "
                f"be; for example {printable(repr(value)[:80])}."
            )
    return record


def _as_text(value: Any) -> Any:
    """Converts numbers to texts. In tables, ids and captions can be numbers."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value) if math.isfinite(value) else None
    return value


def _whole(caption: Any) -> Any:
    """Replaces unpaired surrogates, which JSON can contain but tokenizers reject."""
    return caption.encode(errors="replace").decode() if isinstance(caption, str) and not caption.isascii() else caption


def _regions(value: Any) -> Any:
    """Reduces regions to the fields of a `Region`."""
    if not isinstance(value, list) or not all(isinstance(region, Mapping) for region in value):
        return value
    return [{"box": region.get("box"), "text": _whole(region.get("text"))} for region in value]


def _vector(value: Any) -> Any:
    """Parses the JSON list of a cell of a CSV file."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except ValueError:
        return value


OPTIONAL_READERS: dict[Kind, Callable[[Any], Any]] = {
    TEXT: lambda value: _whole(_as_text(value)),
    TEXTS: lambda value: list(map(_whole, value if isinstance(value, list) else [value])),
    REGIONS: _regions,
    VECTOR: _vector,
}


def _locate(record: dict[str, Any], folder: str, roots: tuple[str, ...]) -> None:
    """Replaces the path of an image by the path of its file, or sets `error` if the file may not be read."""
    path = image_source(record["image"]).source
    if not isinstance(path, str):
        return
    try:
        record["image"] = locate_image(path, folder, roots)
    except ValueError as error:
        record["image"] = None
        if record.get("error") is None:
            record["error"] = f"record {printable(record.get('id', path))}: {error}"


def locate_image(path: str, folder: str, roots: Sequence[str]) -> str:
    """
    Returns the file for the path of an image in a data set. Relative paths start at `folder`. Raises `ValueError` if
    the file is outside of all `roots`, after resolving links. The file need not exist. URLs are returned unchanged.
    """
    if path.startswith(("http://", "https://")):
        return path
    if not roots:
        raise ValueError(
            f"the image {printable(path)} is a local file. To read local files, pass their folder as `--image-folder` "
            "(`image_folder`) or `--image-root` (`image_root`)"
        )
    file = os.path.join(folder, path)
    check_inside(file, roots)
    if os.path.splitext(file)[1].lower() not in image_extensions() and not os.path.exists(file):
        # ImageInWords has names of images without an extension.
        for extension in (".jpg", ".jpeg", ".png", ".webp"):
            if os.path.exists(file + extension):
                check_inside(file + extension, roots)
                return file + extension
    return file


@lru_cache  # resolving links takes about as long as reading a record
def _real(root: str) -> str:
    return os.path.realpath(root)


def check_inside(file: str, roots: Sequence[str]) -> None:
    """Raises `ValueError` if an image is not in one of the folders `roots`, after resolving links."""
    here = os.getcwd()  # `abspath` would shorten `link/..` before the link is resolved
    real = os.path.realpath(os.path.join(here, file))
    if not any(f"{real}/".startswith(os.path.join(_real(os.path.join(here, root)), "")) for root in roots):
        raise ValueError(
            f"the image {printable(file)} is outside of {printable(roots[0])}. To allow another folder, pass "
            "`--image-root` (`image_root`)"
        )


def _to_records(
    rows: dict[str, list[Any]], mapping: ColumnMapping, folder: str, roots: tuple[str, ...]
) -> dict[str, list[Any]]:
    """Converts a batch of rows to records, column by column, for `Dataset.with_transform`."""
    batch = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    records = [to_record(row, mapping, folder, roots) for row in batch]
    present = [name for name, column in mapping.optional.items() if column_of(column, rows)]
    return {
        name: [record.get(name) for record in records] for name in (*RequiredFields.__annotations__, "error", *present)
    }


def _resolve_of(
    files: Sequence[str], mapping: ColumnMapping, images: _Images, max_bytes: int, rows: int | None = FIRST_ROWS
) -> ColumnMapping:
    """
    Resolves a mapping for local files with the columns of the first readable rows. Rows of JSON may lack columns, so
    all rows are read if a column is missing in the first ones.
    """
    columns: dict[str, None] = {}
    errors: list[str] = []
    fields = 0
    for file in files:
        try:
            for row in itertools.islice(read_rows(file, max_bytes=max_bytes), rows):
                if isinstance(row, RowError):
                    errors.append(f"{printable(file)}, {row}")
                    continue
                columns |= dict.fromkeys(row)
                fields = max(fields, len(row.keys() - {"image", "__key__"}))
        except Exception as error:  # libraries raise exceptions of any class on a damaged file
            errors.append(f"{printable(file)}: {type(error).__name__}: {error}")
        if columns and rows is not None:
            break
        errors += [] if errors else [f"{printable(file)} has no rows"]
    if not columns:
        raise ValueError(f"No row can be read. {'; '.join(errors[:3])}")
    if kind_of(files) != "webdataset":
        try:
            return resolve(mapping, list(columns), files[0])
        except MissingColumn:
            if rows is None or kind_of(files) != "json":
                raise
            return _resolve_of(files, mapping, images, max_bytes, rows=None)
    named = alternatives(mapping.image)
    members = tuple(name for name in named if f".{name.rpartition('.')[2]}".lower() in image_extensions())
    paths = () if not images.of(files[0])[1] else named
    mapping = dataclasses.replace(
        mapping, image=(*members, "image", *paths), id=(*alternatives(mapping.id), "__key__")
    )
    try:
        return resolve(mapping, list(columns), files[0])
    except MissingColumn as error:
        if fields > 1:
            raise
        raise MissingColumn(
            f"{error.problem} The first samples have only one member each, but the members of a sample must be "
            "adjacent in the archive. Create it with `tar --sort=name`.",
            error.field,
        ) from error


def undecoded(dataset: Any) -> Any:
    """Returns the data set with images that are not decoded."""
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset


def _read(file: str, mapping: ColumnMapping, max_bytes: int) -> Iterator[dict[str, Any]]:
    """Yields the records of a file, with images as they are stored. Broken records have only an `id` and `error`."""
    texts = [*alternatives(mapping.long), *alternatives(mapping.short)]
    texts += [column for name, column in mapping.optional.items() if OPTIONAL[name] is TEXTS]
    columns = (*texts, *alternatives(mapping.image), *alternatives(mapping.id), *mapping.optional.values())
    columns += mapping.keep
    for number, row in enumerate(read_rows(file, columns, texts, max_bytes), 1):
        record_id = f"{os.path.basename(file)}, row {number}"
        if isinstance(row, RowError):
            hint = " Increase `--max-record-bytes` (`max_record_bytes`)." if isinstance(row, SizeError) else ""
            yield _broken(record_id, f"{printable(file)}, {row}{hint}")
            continue
        record = _fields(row, mapping)
        if record["image"] is None and "__key__" in row:
            fields = ", ".join(name for name in row if name != "__key__")
            record["error"] = (
                f"sample {printable(record['id'])} has no {alternatives(mapping.image)[0]}, only "
                f"{printable(fields)}. If it has several images, name one with `--image-column`. The members of a "
                "sample must be adjacent in the archive."
            )
        problem = _problem(record)
        yield record if problem is None else _broken(record_id, f"{printable(file)}, row {number}: {problem}")


def _problem(record: Mapping[str, Any]) -> str | None:
    """Returns a description of the first field with a wrong type, or `None`."""
    image = record["image"]
    source, path = image_source(image)
    if image is not None and not isinstance(source, str | bytes):
        return f"the image must be a path or the bytes of a file, got {printable(repr(image)[:50])}"
    if not isinstance(record["id"], str):
        return f"the id must be a text, got {printable(repr(record['id'])[:50])}"
    try:
        f"{record['id']}{path}".encode()
    except UnicodeEncodeError:
        return "the id or path is not valid Unicode"
    return problem_of(record)


def _broken(record_id: str, error: str) -> dict[str, Any]:
    return {"image": None, "short_caption": None, "long_captions": [], "id": record_id, "error": error}


def _stream(files: list[str], mapping: ColumnMapping, images: _Images, max_bytes: int) -> Iterator[dict[str, Any]]:
    for file in files:
        number, folders = 0, images.of(file)
        try:
            for record in _read(file, mapping, max_bytes):
                _locate(record, *folders)
                yield record
                number += 1
        except Exception as error:  # libraries raise exceptions of any class on a damaged file
            reason = (
                f"{printable(file)}: damaged or truncated after {number} records ({type(error).__name__}: {error})"
            )
            yield {**_broken(os.path.basename(file), reason), "is_shard": True}
