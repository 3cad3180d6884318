"""
Reading data sets as records: an image, a short caption, long captions and an id.

Files are read through the `datasets` library; a `ColumnMapping` says which of their columns is what. `MAPPINGS` holds
those of public data sets of long captions.
"""

import csv
import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet
from datasets import Dataset, Image, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..images import image_extensions
from .sampling import split_sentences

# Extensions of the files that are read, and the kind of file (but for shards, the builder of `datasets` by its name).
BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".jsonlines": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PATH_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")


@dataclass(frozen=True)
class ColumnMapping:
    """
    Which columns of a data set make up a record.

    A column is given by its name, or by the way to a value in it: `conversations[1].value` is the field `value` of the
    second element of the column `conversations`.

    Args:
        image (`str` or `tuple[str, ...]`):
            Column of the images: paths, bytes of files, or images of `datasets`. Of several the first that there is.
            In WebDataset shards it is the image file, whatever the mapping says.
        long (`str` or `tuple[str, ...]`):
            Columns of the long captions, texts or lists of texts; their order numbers the captioners. `*` and `?`
            match parts of a name (`long*_captions`), the columns they match in the order of the data set. `()` reads
            none.
        short (`str` or `tuple[str, ...]`, *optional*):
            Column of the short caption; of several the first that there is. Where `None`, the first sentence of the
            first long caption is the short one.
        id (`str` or `tuple[str, ...]`, *optional*):
            Column of the ids; of several the first that there is. Without one a record's id is the path of its image
            as the data set gives it, in WebDataset shards the shard's name and the sample's key, and else a digest of
            the record.
    """

    image: str | tuple[str, ...] = ("image", "file_name")
    long: str | tuple[str, ...] = "long_captions"
    short: str | tuple[str, ...] | None = "short_caption"
    id: str | tuple[str, ...] | None = "id"


# Recaptioned LAION and COYO come as tables of addresses and captions under several names.
_RECAP_LONG = ColumnMapping(
    image=("image", "Image Path", "image_path", "url", "URL"),
    long=("long*caption*", "*long*caption*"),
    short=("raw_caption", "short_caption", "caption", "TEXT", "text", "alt_text"),
    id=None,
)
MAPPINGS = {
    # Our own names; `file_name` is what image folders with metadata call the image.
    "records": ColumnMapping(),
    # DreamLIP's long captions of CC3M, CC12M and YFCC15M: InstructBLIP, ShareGPT4V, LLaVA.
    "dreamlip": ColumnMapping(
        image=("image", "Image Path"),
        long=("longIB_captions", "longSV_captions", "longLLA_captions"),
        short="raw_caption",
        id=None,
    ),
    "recap-long-laion": _RECAP_LONG,
    "recap-long-coyo": _RECAP_LONG,
    "sharegpt4v": ColumnMapping(image="image", long="conversations[1].value", short=None, id=None),
    "docci": ColumnMapping(image=("image", "image_file"), long="description", short=None, id="example_id"),
    "iiw": ColumnMapping(image=("image", "image/key"), long="IIW", short=None, id=None),
}


def load_records(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    mapping: str | ColumnMapping = "records",
    split: str = "train",
    image_folder: str | os.PathLike | None = None,
    streaming: bool = False,
    **kwargs: Any,
) -> Dataset | IterableDataset:
    """
    Opens a data set whose rows are records, for `LoTLIPCollator`.

    A row is read when it is asked for, as a dictionary with `image`, `short_caption`, `long_captions` and `id`. Images
    are not decoded here, so that the collator can count a broken one or stop at it. So it is with a shard of a local
    stream that ends too soon: its last record holds what is wrong with it, under `error`.

    Args:
        source (`str`, `os.PathLike` or a sequence of them):
            A folder with `metadata.jsonl`, `metadata.csv` or `metadata.parquet` beside the images; a folder of
            WebDataset shards (`*.tar`), Parquet, JSON, JSON lines or CSV files; such files, by name or pattern
            (`shards/*.tar`); or the name of a data set on the Hub.
        mapping (`str` or `ColumnMapping`, *optional*, defaults to `"records"`):
            Which columns to read: a name in `MAPPINGS`, or your own.
        split (`str`, *optional*, defaults to `"train"`):
            The split of a data set on the Hub. Files are one split.
        image_folder (`str` or `os.PathLike`, *optional*):
            What relative paths of images start from; by default the folder of the (first) file that is read.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read in order, without a copy in the cache of `datasets`. WebDataset shards always are.
        kwargs:
            Further arguments of `datasets.load_dataset`, for a data set on the Hub: its configuration, `revision`, ...

    Returns:
        `datasets.Dataset`, or a `datasets.IterableDataset` when streaming, which is shuffled by its `shuffle` and
        divided between workers by shards.

    Raises:
        FileNotFoundError: if there is no such file or folder, or nothing in it that is read.
        ValueError: if a column is missing, `mapping` is unknown, or a file cannot be read.

    Example:

    ```python
    >>> records = load_records("pictures")  # with metadata.jsonl: file_name, short_caption, long_captions
    >>> mapping = ColumnMapping(short="txt", long=("blip", "llava"))  # two fields of the samples' JSON
    >>> shards = load_records("shards/*.tar", mapping)
    >>> docci = load_records("google/docci", "docci", streaming=True)
    ```
    """
    if isinstance(mapping, str):
        if mapping not in MAPPINGS:
            raise ValueError(f"`mapping` must be a ColumnMapping or one of {', '.join(MAPPINGS)}, got {mapping!r}.")
        mapping = MAPPINGS[mapping]
    if isinstance(source, str) and not os.path.exists(source) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        # "pictures/metadata.jsonl" has the form of a name on the Hub too.
        if os.path.splitext(source)[1].lower() not in BUILDERS:
            return _hub_records(source, mapping, split, image_folder, streaming, kwargs)
    if kwargs:
        raise ValueError(f"{', '.join(kwargs)}: only a data set on the Hub takes more arguments, not {source}.")
    files = _find_files(source)
    builder = _builder(files)
    folder = os.path.dirname(files[0]) if image_folder is None else os.fspath(image_folder)
    if builder == "webdataset" or streaming:
        if builder == "webdataset":
            mapping = ColumnMapping("image", mapping.long, mapping.short, (*_alternatives(mapping.id), "__key__"))
        resolved = _resolve(mapping, _first_columns(files), files[0])
        # `datasets` divides the list of files among processes and workers.
        arguments = {"files": files, "mapping": resolved, "image_folder": folder}
        return cast(IterableDataset, IterableDataset.from_generator(_stream, gen_kwargs=arguments))
    try:
        # It takes file names for patterns.
        dataset = cast(Dataset, load_dataset(builder, data_files=[glob.escape(file) for file in files], split="train"))
    except StopIteration as error:
        raise ValueError(f"{', '.join(files)}: no row can be read.") from error
    except DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"{', '.join(files)}: cannot be read as {builder} ({type(reason).__name__}: {reason}). Mend or leave out "
            "the file; `streaming=True` reads the others and lets the collator count it."
        ) from error
    resolved = _resolve(mapping, dataset.column_names, files[0])
    return _undecoded(dataset).with_transform(partial(_to_records, mapping=resolved, image_folder=folder))


def _hub_records(
    name: str,
    mapping: ColumnMapping,
    split: str,
    image_folder: str | os.PathLike | None,
    streaming: bool,
    kwargs: dict[str, Any],
) -> Dataset | IterableDataset:
    dataset = load_dataset(name, split=split, streaming=streaming, **kwargs)
    folder = None if image_folder is None else os.fspath(image_folder)
    if isinstance(dataset, Dataset):
        resolved = _resolve(mapping, dataset.column_names, name)
        return _undecoded(dataset).with_transform(partial(_to_records, mapping=resolved, image_folder=folder))
    dataset = _undecoded(cast(IterableDataset, dataset))
    columns = dataset.column_names or list(next(iter(dataset)))
    resolved = _resolve(mapping, columns, name)
    return dataset.map(partial(to_record, mapping=resolved, image_folder=folder), remove_columns=columns)


def to_record(row: Mapping[str, Any], mapping: ColumnMapping, image_folder: str | None = None) -> dict[str, Any]:
    """
    Makes a record of a row. What is missing or of a wrong type stays so: the collator counts it or stops at it.

    Args:
        row (`Mapping[str, Any]`): column name to value.
        mapping (`ColumnMapping`): one column or way for each field, no patterns.
        image_folder (`str`, *optional*): what a relative path of an image starts from.

    Returns:
        `dict[str, Any]`: `image`, `short_caption`, `long_captions` and `id`.

    Example:

    ```python
    >>> row = {"image": "a.jpg", "conversations": [{"value": "Describe."}, {"value": "A cat. It sleeps."}]}
    >>> to_record(row, MAPPINGS["sharegpt4v"], image_folder="pictures")
    {'image': 'pictures/a.jpg', 'short_caption': 'A cat', 'long_captions': ['A cat. It sleeps.'], 'id': 'a.jpg'}
    ```
    """
    long_captions: list[Any] = []
    for column in _alternatives(mapping.long):
        value = _value(row, column)
        long_captions += value if isinstance(value, list) else ["" if value is None else value]
    if mapping.short is None:
        first = next((caption for caption in long_captions if isinstance(caption, str) and caption.strip()), "")
        short_caption = next(iter(split_sentences(first)), None)
    else:
        short_caption = _value(row, _alternatives(mapping.short)[0])

    image = _value(row, _alternatives(mapping.image)[0])
    path, content = image if isinstance(image, str) else None, image if isinstance(image, bytes) else None
    if isinstance(image, Mapping):
        path, content = image.get("path"), image.get("bytes")
    record_id = None if mapping.id is None else _value(row, _alternatives(mapping.id)[0])
    if record_id is None and content is None:
        record_id = path
    if record_id is None:
        digest = hashlib.blake2b(content or b"", digest_size=16)
        digest.update(repr((short_caption, long_captions)).encode(errors="surrogatepass"))
        record_id = digest.hexdigest()
    if isinstance(path, str) and content is None:
        image = _image_path(path, image_folder)
    return {"image": image, "short_caption": short_caption, "long_captions": long_captions, "id": record_id}


def _image_path(path: str, image_folder: str | None) -> str:
    if path.startswith(("http://", "https://")):
        return path
    path = os.path.join(image_folder or "", path)
    if os.path.splitext(path)[1].lower() not in image_extensions() and not os.path.exists(path):
        # A key in place of a name, as ImageInWords has it.
        for extension in (".jpg", ".jpeg", ".png", ".webp"):
            if os.path.exists(path + extension):
                return path + extension
    return path


def _to_records(rows: dict[str, list[Any]], mapping: ColumnMapping, image_folder: str | None) -> dict[str, list[Any]]:
    """The same for a batch, column by column, as `Dataset.with_transform` asks for."""
    number = len(next(iter(rows.values()), []))
    records = [
        to_record({name: column[row] for name, column in rows.items()}, mapping, image_folder) for row in range(number)
    ]
    return {name: [record[name] for record in records] for name in ("image", "short_caption", "long_captions", "id")}


def _alternatives(columns: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if columns is None else (columns,) if isinstance(columns, str) else tuple(columns)


def _value(row: Mapping[str, Any], column: str) -> Any:
    """What a column, or a way into one, holds; `None` where the way ends early."""
    if column in row:
        return row[column]
    value: Any = row
    for name, index in PATH_STEP.findall(column):
        if name:
            value = value.get(name) if isinstance(value, Mapping) else None
        else:
            value = value[int(index)] if isinstance(value, list) and int(index) < len(value) else None
    return value


def _resolve(mapping: ColumnMapping, columns: Sequence[str], source: str) -> ColumnMapping:
    """The mapping with each alternative and pattern replaced by what there is."""

    def is_there(column: str) -> bool:
        return column in columns or re.split(r"[.\[]", column, maxsplit=1)[0] in columns

    def first(field: str, wanted: tuple[str, ...]) -> str:
        found = next((column for column in wanted if is_there(column)), None)
        if found is None:
            raise missing(field, wanted)
        return found

    def missing(field: str, wanted: tuple[str, ...]) -> ValueError:
        return ValueError(
            f"{source}: there is no column {' or '.join(map(repr, wanted))} for `{field}`. There are: "
            f"{', '.join(map(repr, columns))}. Say which to read: ColumnMapping(image=..., long=..., short=...)."
        )

    short = None if mapping.short is None else first("short", _alternatives(mapping.short))
    long: list[str] = []
    for wanted in _alternatives(mapping.long):
        if "*" in wanted or "?" in wanted:
            matched = [column for column in columns if fnmatchcase(column, wanted) and column != short]
            long += [column for column in matched if column not in long]
        elif is_there(wanted):
            long.append(wanted)
        else:
            raise missing("long", (wanted,))
    if not long and mapping.long:
        raise missing("long", _alternatives(mapping.long))
    ids = [column for column in _alternatives(mapping.id) if is_there(column)]
    return ColumnMapping(
        image=first("image", _alternatives(mapping.image)),
        long=tuple(long),
        short=short,
        id=ids[0] if ids else None,
    )


def _undecoded(dataset: Any) -> Any:
    """The data set with its images as they were stored."""
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _find_files(source: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """The files that a source means, sorted by name."""
    if not isinstance(source, str | os.PathLike):
        files = [file for one in source for file in _find_files(one)]
        if not files:
            raise FileNotFoundError("`source` is an empty list of files.")
        return files
    path = Path(source)
    if path.is_dir():
        for name in METADATA_NAMES:
            if (path / name).is_file():
                return [str(path / name)]
        for extensions in ((".tar",), (".parquet",), (".jsonl", ".jsonlines"), (".json",), (".csv", ".tsv")):
            found = (file for file in path.rglob("*") if file.suffix.lower() in extensions)
            # what is hidden is not the user's data: `lotlip search` keeps its index so
            files = sorted(str(file) for file in found if not _is_hidden(file.relative_to(path)))
            if files:
                return files
        raise FileNotFoundError(
            f"{path}: holds neither {', '.join(METADATA_NAMES)} nor files that are read ({', '.join(BUILDERS)})."
        )
    if path.is_file():
        return [str(path)]
    files = sorted(file for file in glob.glob(str(path), recursive=True) if os.path.isfile(file))
    if not files:
        raise FileNotFoundError(f"{path}: no such file or folder, and no data set's name on the Hub (owner/name).")
    return files


def _builder(files: list[str]) -> str:
    extensions = {os.path.splitext(file)[1].lower() for file in files}
    if unknown := sorted(extensions - BUILDERS.keys()):
        raise ValueError(f"{files[0]}: {unknown[0] or 'no extension'} is not one of {', '.join(BUILDERS)}.")
    builders = sorted({BUILDERS[extension] for extension in extensions})
    if len(builders) > 1:
        raise ValueError(f"{files[0]}: the files of one data set must be of one kind, got {' and '.join(builders)}.")
    return builders[0]


def _rows(file: str) -> Iterator[dict[str, Any]]:
    """
    The rows of one file, read in order.

    Not by a stream of `datasets`: inside a DataLoader's worker each such stream divides its files among the workers
    once more, and leaves all but one without any. And its WebDataset reader refuses samples of differing files.
    """
    extension = os.path.splitext(file)[1].lower()
    if extension == ".tar":
        yield from _tar_rows(file)
    elif extension == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    elif extension in (".csv", ".tsv"):
        with open(file, newline="", encoding="utf-8-sig") as lines:
            yield from csv.DictReader(lines, delimiter="\t" if extension == ".tsv" else ",")
    elif extension == ".json":
        with open(file, encoding="utf-8") as text:
            rows = json.load(text)
            if not isinstance(rows, list):
                raise ValueError(f"expected a list of rows, got {type(rows).__name__}")
            yield from rows
    else:
        with open(file, encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def _tar_rows(shard: str) -> Iterator[dict[str, Any]]:
    """
    The samples of a WebDataset shard: successive files that share a name up to its first dot.

    The fields of a sample's JSON are columns, and so is each other file, under its extension; its image is also the
    column `image`. `__key__` is the shard's name and the sample's.
    """
    with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        sample: dict[str, Any] = {}
        for member in tar:
            folder, name = os.path.split(member.name)
            stem, _, extension = name.partition(".")
            content = tar.extractfile(member)
            if content is None or not stem or not extension:
                continue
            key = f"{os.path.basename(shard)}/{os.path.join(folder, stem)}"
            if sample and sample["__key__"] != key:
                yield sample
                sample = {}
            sample["__key__"] = key
            extension = extension.lower()
            if extension == "json":
                # A column of the table that the shard was downloaded from may be called `image` too.
                sample = {**json.loads(content.read()), **sample}
            elif f".{extension}" in image_extensions():
                sample[extension] = sample["image"] = {"bytes": content.read(), "path": name}
            elif extension in ("txt", "cls"):
                sample[extension] = content.read().decode("utf-8")
        # Where a file ends between two members, tarfile takes it for whole.
        file.seek(-min(tarfile.BLOCKSIZE, os.path.getsize(shard)), os.SEEK_END)
        if any(file.read()):
            raise tarfile.ReadError("the archive has no end mark")
        if sample:
            yield sample


def _first_columns(files: list[str]) -> list[str]:
    """The columns of the first file that can be read."""
    errors = []
    for file in files:
        try:
            return [column for column in next(_rows(file)) if isinstance(column, str)]
        except StopIteration:
            errors.append(f"{file}: holds no row")
        except Exception as error:  # whatever the format's library raises
            errors.append(f"{file}: {type(error).__name__}: {error}")
    raise ValueError(f"No row can be read. {'; '.join(errors[:3])}.")


def _stream(files: list[str], mapping: ColumnMapping, image_folder: str) -> Iterator[dict[str, Any]]:
    for file in files:
        number = 0
        rows = _rows(file)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            except Exception as error:  # whatever the format's library raises; the records before it stay
                reason = f"{file}: damaged or truncated after {number} records ({type(error).__name__}: {error})"
                empty = {"image": None, "short_caption": None, "long_captions": []}
                yield {**empty, "id": os.path.basename(file), "error": reason}
                break
            yield to_record(row, mapping, image_folder)
            number += 1
