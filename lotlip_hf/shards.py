"""
Embeds the images of a data set of any size into Parquet shards, with any number of processes.

Each file of the data set is a part, and the images of a folder are one part. Successive records of a part become a
shard, so the rows of a shard do not depend on the number of processes. A shard is written when it is complete, and
another run continues with the shards that are missing.
"""

import hashlib
import io
import itertools
import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset

from .data.mappings import ColumnMapping
from .data.records import image_records, load_records
from .data.sources import find_files, is_hub_name
from .embed import embedding_schema
from .encoder import Encoder
from .files import MAX_BYTES, open_regular, printable, replacing
from .images import ImageError, image_source
from .terminal import progress_bar

logger = logging.getLogger(__name__)

SHARD_SIZE = 10_000  # records
SHARD_NAME = re.compile(r"part-(\d{5,})-(\d{5,})\.parquet")
SKIPPED = "_{}.skipped.jsonl"  # list of a shard's broken records; readers of Parquet folders ignore names with _
# With fewer parts than this per process, each process reads all parts, and the processes divide the shards instead.
ENOUGH_PARTS = 4
# A shard of this many records or more, all broken, stops the run: a folder or disk is missing.
ALL_BROKEN = 100
OWN_COLUMNS = ("id", "embedding")


class Part(NamedTuple):
    """
    A part of a data set: a file, or a folder of images.

    Args:
        source (`dict[str, Any]`): What identifies the part and its contents, as JSON values.
        records (`Callable`): Function that reads the records.
    """

    source: dict[str, Any]
    records: Callable[[], Iterable[Mapping[str, Any]]]


class Source(NamedTuple):
    """
    A data set to embed, from [`open_source`].

    Args:
        parts (`list[Part]`): Parts, in order.
        length (`Callable`): Function that counts the records, or returns `None` if it would have to read them.
        kept (`dict[str, pyarrow.DataType]`): Types of the columns that are copied to the shards.
    """

    parts: list[Part]
    length: Callable[[], int | None]
    kept: dict[str, pa.DataType]


class _Shard(NamedTuple):
    """What a finished shard contains: its records, its rows, and whether its part ends there."""

    records: int
    rows: int
    is_last: bool


def open_source(
    data: str | os.PathLike,
    *,
    keep: Sequence[str] = (),
    split: str | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
    image_folder: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    max_record_bytes: int = MAX_BYTES,
) -> Source:
    """
    Opens a data set to embed its images. Its captions are not needed.

    Args:
        data (`str` or `os.PathLike`): Folder of images, with or without a table; tables or shards, as a folder, a file
            or a pattern; or the Hub id of a data set. See [`~lotlip_hf.data.records.load_records`].
        keep (`Sequence[str]`, *optional*): Columns to copy to the shards, as `name` for texts or `name:type` with a
            type of Arrow: `year:int64`, `score:float32`.
        split (`str`, *optional*): The split, as in `load_records`.
        image_column (`str`, *optional*): Column of the images. Defaults to `image` or `file_name`.
        id_column (`str`, *optional*): Column of the ids. Defaults to `id`, or else the path of the image, the name of
            the sample, or a digest.
        image_folder, image_root (`str` or `os.PathLike`, *optional*): As in `load_records`.
        max_record_bytes (`int`, *optional*, defaults to `MAX_BYTES`): As in `load_records`.

    Returns:
        [`Source`]: The data set.

    Raises:
        `FileNotFoundError`: If a file or folder does not exist, or a folder has no data files and no images.
        `MissingColumn`: If a column is missing.
        `SplitError`: If the files belong to several splits, or not to the requested one.
        `ValueError`: If `keep` is wrong, or no row can be read.
    """
    kept = _kept_types(keep)
    columns = ColumnMapping(long=(), short=None, keep=tuple(kept))
    mapping = columns.with_columns(image=image_column, id=id_column)
    options = {"image_column": image_column, "id_column": id_column}
    try:
        records = load_records(
            data,
            mapping,
            split,
            image_folder,
            streaming=True,
            image_root=image_root,
            max_record_bytes=max_record_bytes,
        )
    except FileNotFoundError:
        listed = image_records(data, image_root)
        if listed is None:
            raise
        if kept:
            raise ValueError(f"--keep: the folder {printable(data)} has images alone, no table of columns.") from None
        names = json.dumps([record["id"] for record in listed]).encode()
        digest = hashlib.blake2b(names, digest_size=16).hexdigest()
        return Source([Part({"images": digest}, lambda: listed)], lambda: len(listed), kept)
    records = cast(IterableDataset, records)
    count = records.num_shards
    if is_hub_name(data):
        sources = [{"data": data, "split": split, "file": f"{part + 1} of {count}"} for part in range(count)]
        stated = (records.info.splits or {}).get(str(records.split))
        length = partial(getattr, stated, "num_examples", None)
    else:
        files = find_files(data, split)
        sources = [{"file": os.path.basename(file), "bytes": os.path.getsize(file)} for file in files]
        length = partial(_length_of, files)

    def reader(part: int) -> Callable[[], Iterable[Mapping[str, Any]]]:
        return lambda: records.shard(count, part)

    return Source([Part({**sources[part], **options}, reader(part)) for part in range(count)], length, kept)


def embed_source(
    encoder: Encoder,
    source: Source,
    output: str | os.PathLike,
    *,
    shard_size: int = SHARD_SIZE,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> tuple[int, int]:
    """
    Embeds the images of a data set into a folder of Parquet shards.

    The columns of a shard are `id`, `embedding` (normalised, float32 [P]) and those of `keep`. Its name,
    `part-00012-00003.parquet`, contains the number of the part and of the shard in it. Records with a broken image or
    value are skipped, and listed in `_part-00012-00003.skipped.jsonl` with `index` (in the part, from 0), `id` and
    `reason`.

    The same call continues an interrupted one, and so does a call with another number of processes.

    Args:
        encoder (`Encoder`): Dual encoder.
        source (`Source`): Data set, from [`open_source`].
        output (`str` or `os.PathLike`): Folder for the shards. It is created if it is missing.
        shard_size (`int`, *optional*, defaults to 10000): Number of records in a shard, skipped ones included. The
            last shard of a part has fewer.
        batch_size (`int`, *optional*, defaults to 32): Number of images in a batch.
        rank (`int`, *optional*, defaults to 0): Index of this process, which writes its own shards.
        world_size (`int`, *optional*, defaults to 1): Number of processes.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar of this process.

    Returns:
        `tuple[int, int]`: Number of embedded and of skipped records in the shards of this process.

    Raises:
        `ValueError`: If `output` has shards of another model, of other data or made with other options; or if none of
            the images of a whole shard, 100 or more, can be read.
        `OSError`: If a shard cannot be written.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.shards import embed_source, open_source

    >>> embedded, skipped = embed_source(load_encoder("checkpoint"), open_source("pictures"), "embeddings")
    ```
    """
    folder, parts = Path(output), source.parts
    folder.mkdir(parents=True, exist_ok=True)
    is_shared = len(parts) < ENOUGH_PARTS * world_size

    def is_own(part: int, chunk: int) -> bool:
        return (part + chunk if is_shared else part) % world_size == rank

    own_parts = range(len(parts)) if is_shared else range(rank, len(parts), world_size)
    dim = encoder.encode_images([], progress=False).shape[1]
    schema = embedding_schema(encoder, encoder.fingerprint("image"), dim, {"id": pa.string()}, source.kept)
    made_of = [json.dumps({**part.source, "shard_size": shard_size}) for part in parts]
    shards: dict[tuple[int, int], _Shard] = {}
    for part, chunk in _shards_in(folder):
        if part >= len(parts):
            raise _other_run(folder / shard_name(part, chunk), f"the data has only {len(parts)} parts")
        if part in own_parts:
            shards[part, chunk] = _read_shard(folder / shard_name(part, chunk), schema, made_of[part])
    embedded = sum(shard.rows for key, shard in shards.items() if is_own(*key))
    handled = sum(shard.records for key, shard in shards.items() if is_own(*key))
    skipped = handled - embedded

    ends = {part: chunk + 1 for (part, chunk), shard in shards.items() if shard.is_last}
    length = source.length() if progress else None
    total = None if length is None else -(-length // world_size)
    settings = {"total": total, "initial": handled, "desc": "Embedding images"}
    with progress_bar(unit="image", shown=progress, **settings) as bar:
        for part in own_parts:
            end = ends.get(part)
            before = (
                chunk for chunk in reversed(range(end or 0)) if is_own(part, chunk) and (part, chunk) not in shards
            )
            missing = next(before, None)  # the last one
            if end is not None and missing is None:
                continue
            stream = iter(parts[part].records())
            record = next(stream, None)
            for chunk in itertools.count() if missing is None else range(missing + 1):
                if record is None:
                    break
                records = itertools.islice(itertools.chain([record], stream), shard_size)
                if not is_own(part, chunk) or (part, chunk) in shards:
                    deque(records, maxlen=0)
                    record = next(stream, None)
                    continue
                table, broken = _embed(encoder, records, chunk * shard_size, schema, batch_size, bar)
                if not len(table) and len(broken) == shard_size >= ALL_BROKEN:
                    raise ValueError(
                        f"None of {shard_size} images can be read; the first is {printable(broken[0]['id'])}: "
                        f"{printable(broken[0]['reason'])}. Check --image-folder and --image-column."
                    )
                record = next(stream, None)
                about = {"source": made_of[part], "records": str(len(table) + len(broken))}
                about["last"] = "yes" if record is None else "no"
                _write_shard(folder / shard_name(part, chunk), table, broken, about)
                embedded, skipped = embedded + len(table), skipped + len(broken)
    return embedded, skipped


def shard_name(part: int, chunk: int) -> str:
    """Returns the file name of a shard, by the number of its part and its number in the part."""
    return f"part-{part:05d}-{chunk:05d}.parquet"


def _shards_in(folder: Path) -> list[tuple[int, int]]:
    names = (SHARD_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted((int(name[1]), int(name[2])) for name in names if name)


def _kept_types(keep: Sequence[str]) -> dict[str, pa.DataType]:
    """Returns the types of columns, given as `name` or `name:type`."""
    kept: dict[str, pa.DataType] = {}
    for one in keep:
        name, _, alias = one.rpartition(":") if ":" in one else (one, "", "string")
        if name in OWN_COLUMNS or name in kept:
            raise ValueError(f"--keep {one}: the shards have a column {name!r} already. Leave it out.")
        try:
            empty, file = pa.table({name: pa.array([], pa.type_for_alias(alias))}), io.BytesIO()
            pq.write_table(empty, file)
            kept[name] = pq.read_schema(file).field(name).type  # of `timestamp[s]`, Parquet makes `timestamp[ms]`
        except (ValueError, pa.ArrowNotImplementedError):
            raise ValueError(
                f"--keep {one}: unknown type {alias!r}. Pass {name}:string, {name}:int64, {name}:float64, {name}:bool "
                "or another type of Arrow."
            ) from None
    return kept


def _length_of(files: Sequence[str]) -> int | None:
    """Number of records in files, if it is cheap to find."""
    length = 0
    for file in files:
        kind = os.path.splitext(file)[1].lower()
        with open_regular(file) as opened:
            if kind == ".parquet":
                try:
                    length += pq.read_metadata(opened).num_rows
                except pa.ArrowException:  # a record of the stream has the reason
                    return None
            elif kind in (".jsonl", ".jsonlines"):
                length += sum(block.count(b"\n") for block in iter(lambda: opened.read(1 << 20), b""))
            else:
                return None
    return length


def _embed(
    encoder: Encoder,
    records: Iterable[Mapping[str, Any]],
    start: int,
    schema: pa.Schema,
    batch_size: int,
    bar: Any,
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Embeds the records of a shard. Returns its rows, and the broken records."""
    read: list[tuple[int, str, list[pa.Scalar]]] = []
    broken: list[dict[str, Any]] = []
    kept = [field for field in schema if field.name not in OWN_COLUMNS]

    def skip(index: int, name: str, reason: str) -> None:
        broken.append({"index": index, "id": name, "reason": reason})
        bar.update()

    def sources() -> Iterator[Any]:
        for index, record in enumerate(records, start):
            name = str(record["id"]).encode(errors="backslashreplace").decode()
            image = image_source(record["image"]).source
            values: list[pa.Scalar] = []
            reason = record.get("error")
            if reason is None and not isinstance(image, str | bytes):
                reason = f"the image must be a path or the bytes of a file, got {printable(repr(image)[:50])}"
            for field in kept if reason is None else ():
                value = record["kept"][field.name]
                try:
                    values.append(_cast(value, field.type))
                except (pa.ArrowException, OverflowError, TypeError, ValueError):
                    reason = f"{field.name} must be {field.type}, got {printable(repr(value)[:80])}"
                    break
            if reason is not None:
                skip(index, name, reason)
                continue
            read.append((index, name, values))
            yield image

    good: list[int] = []
    embeddings: list[np.ndarray] = []
    for number, result in encoder.image_rows(sources(), batch_size=batch_size):
        if isinstance(result, ImageError):
            skip(*read[number][:2], result.reason)
            continue
        bar.update()
        good.append(number)
        embeddings.append(result)
    dim = schema.field("embedding").type.list_size
    vectors = np.concatenate(embeddings) if embeddings else np.zeros(0, np.float32)
    columns = [pa.array([read[number][1] for number in good], pa.string())]
    columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors), dim))
    columns += [pa.array([read[one][2][column] for one in good], field.type) for column, field in enumerate(kept)]
    return pa.table(columns, schema=schema), sorted(broken, key=lambda one: one["index"])


def _cast(value: Any, kind: pa.DataType) -> pa.Scalar:
    """Converts the value of a column to its type. Lists and objects become JSON."""
    if value is None or (value == "" and kind != pa.string()):  # an empty cell of a CSV file
        return pa.scalar(None, kind)
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False)
    return pa.scalar(value).cast(kind)


def _write_shard(path: Path, table: pa.Table, broken: list[dict[str, Any]], about: dict[str, str]) -> None:
    """Writes a shard. The list of broken records is written first, as a shard that exists is complete."""
    listed = path.with_name(SKIPPED.format(path.stem))
    listed.unlink(missing_ok=True)
    if broken:
        with replacing(listed) as file:
            file.writelines(json.dumps(one).encode() + b"\n" for one in broken)
    with replacing(path) as file:
        pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **about}), file)


def _read_shard(path: Path, schema: pa.Schema, source: str) -> _Shard:
    """Reads what a shard contains. Raises a `ValueError` if it is not of this model, data and options."""
    try:
        with open_regular(path) as file, pq.ParquetFile(file) as opened:
            found, rows = opened.schema_arrow, opened.metadata.num_rows
        about = {key.decode(): value.decode() for key, value in (found.metadata or {}).items()}
        shard = _Shard(int(about.get("records", 0)), rows, about.get("last") == "yes")
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({printable(error)}). Delete it, and run the same command again."
        ) from error
    wanted = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    if about.get("fingerprint") != wanted["fingerprint"]:
        raise _other_run(path, f"its model is {about.get('model')}, or was prepared differently")
    if about.get("source") != source:
        raise _other_run(path, f"it was made of {about.get('source')}, now it would be of {source}")
    if not found.equals(schema):
        raise _other_run(path, f"its columns are {', '.join(found.names)}, or have other types")
    return shard


def _other_run(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} belongs to another run: {printable(reason)}. Choose another --output.")
