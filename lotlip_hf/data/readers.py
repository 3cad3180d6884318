"""
Rows of files, as they are written: CSV, TSV, JSON, JSON lines, Parquet and WebDataset shards.

Training, evaluation, relabelling and `lotlip embed` read such files here, streaming or not. No type is guessed of a
value, no row takes more memory than `max_bytes`, and after a row that cannot be read the next ones are.
"""

import csv
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from ..files import MAX_BYTES, open_regular, parse_json, printable

# Extensions of the files that are read, and the kind of file.
KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".jsonlines": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
PARQUET_BATCH = 64  # rows
PARQUET_RATIO = 100  # bytes unpacked for one packed; texts come to about ten
JSON_CHUNK = 1 << 20  # characters
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how `surrogateescape` decodes such bytes
SEPARATORS = re.compile(r"[\s,]*")
WAY_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")
# Of the files of a sample, those that hold text and JSON, by the last part of their extension.
TEXT_FIELDS = frozenset("txt text transcript cls cls2 index inx id".split())
JSON_FIELDS = frozenset(("json", "jsn"))


class RowError(ValueError):
    """A row that cannot be read. The message says which and why; the rows after it can be read."""


class SizeError(RowError):
    """A row that is larger than `max_bytes`."""


class _BrokenFile(ValueError):
    """A file whose further rows cannot be found."""


def read_rows(
    file: str | os.PathLike,
    columns: Sequence[str] | None = None,
    texts: Sequence[str] = (),
    max_bytes: int = MAX_BYTES,
) -> Iterator[dict[str, Any] | RowError]:
    """
    Reads the rows of a file in order.

    The values of CSV and TSV files are texts, as they are written. A `.json` file holds a list of objects, or objects
    on lines of their own. A row of a WebDataset shard is a sample: successive members that share a name up to its
    first dot. Each member is a column under its extension (`jpg`, `txt`, `input.jpg`); the fields of the only JSON
    file are columns too, the only image is also the column `image`, and `__key__` names the shard and the sample.

    Args:
        file (`str` or `os.PathLike`): the file; its extension says what it is.
        columns (`Sequence[str]`, *optional*):
            The columns that a Parquet file is read for, or ways into them; by default all.
        texts (`Sequence[str]`, *optional*):
            Columns of texts, or ways into them: a cell of a CSV or TSV file that holds a list in JSON is a list there.
        max_bytes (`int`, *optional*, defaults to 256 MiB):
            The most bytes of a row: a line, an entry of a list, or a shard's sample with its image. A larger one is
            not read.

    Yields:
        `dict[str, Any]` or `RowError`: a row, or why it cannot be read.

    Raises:
        ValueError, OSError: if the rest of the file cannot be read.

    Example:

    ```python
    >>> from lotlip_hf.data.readers import read_rows

    >>> rows = list(read_rows("captions.csv"))  # doctest: +SKIP
    ```
    """
    extension = os.path.splitext(file)[1].lower()
    with open_regular(file) as opened:
        if extension == ".parquet":
            with pyarrow.parquet.ParquetFile(opened) as table:
                names = table.schema_arrow.names
                wanted = [name for name in names if name in {column_of(way, names) for way in columns or ()}]
                for group, rows in enumerate(parquet_batches(table.metadata, max_bytes)):
                    for batch in table.iter_batches(rows, row_groups=[group], columns=wanted or None):
                        yield from batch.to_pylist()
        elif extension == ".tar":
            yield from _tar_rows(opened, os.path.basename(file), max_bytes)
        elif KINDS[extension] == "csv":
            yield from _csv_rows(opened, "\t" if extension == ".tsv" else ",", texts, max_bytes)
        elif extension == ".json" and not _starts_object(opened):
            yield from _list_rows(opened, max_bytes)
        else:
            yield from _line_rows(opened, max_bytes)


def parquet_batches(metadata: pyarrow.parquet.FileMetaData, max_bytes: int = MAX_BYTES) -> list[int]:
    """
    How many rows of each row group may be read at a time, so that none has more than `max_bytes`; a `ValueError` if a
    column is packed so well that it is made to fill the memory.

    A cell takes up to as many bytes as its column's part of a row group has unpacked; a dictionary stores it once for
    many rows.
    """
    batches = []
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        parts = [group.column(number) for number in range(group.num_columns)]
        for part in parts:
            packed, unpacked = max(1, part.total_compressed_size), part.total_uncompressed_size
            repeated = group.num_rows if any("DICTIONARY" in one for one in part.encodings) else 1
            if unpacked * repeated > max_bytes and unpacked > PARQUET_RATIO * packed:
                raise _BrokenFile(
                    f"column {printable(part.path_in_schema)} unpacks {packed:,} bytes to {unpacked:,}, for "
                    f"{group.num_rows:,} rows"
                )
        largest = max((part.total_uncompressed_size for part in parts), default=1)
        batches.append(max(1, min(PARQUET_BATCH, max_bytes // max(1, largest))))
    return batches


def every_row(
    file: str | os.PathLike, columns: Sequence[str] | None = None, texts: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The rows of a file, as [`read_rows`]; one that cannot be read is a `ValueError` that names the file."""
    try:
        for row in read_rows(file, columns, texts):
            if isinstance(row, RowError):
                raise ValueError(f"{printable(file)}, {row}")
            yield row
    except (pyarrow.ArrowException, tarfile.TarError, _BrokenFile) as error:
        raise ValueError(f"{printable(file)}: cannot be read ({error}).") from error


def column_of(way: str, columns: Collection[str]) -> str | None:
    """The column that a way starts in: of several the one with the longest name, which may hold dots itself."""
    if way in columns:
        return way
    ends = [match.start() for match in re.finditer(r"[.\[]", way)]
    return next((way[:end] for end in reversed(ends) if way[:end] in columns), None)


def value_of(row: Mapping[str, Any], way: str) -> Any:
    """The value in a column or a way into one, such as `conversations[1].value`; `None` if the way ends early."""
    column = column_of(way, row)
    if column is None:
        return None
    value = row[column]
    for name, index in WAY_STEP.findall(way, len(column)) if column != way else ():
        if name:
            value = value.get(name) if isinstance(value, Mapping) else None
        else:
            value = value[int(index)] if isinstance(value, list) and int(index) < len(value) else None
    return value


def _lines(file: BinaryIO, max_bytes: int, newline: str) -> Iterator[str | RowError]:
    """The lines of a text in UTF-8, with their ends; one that is too long is passed over."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    number = 0
    while line := text.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            while line and line[-1] not in "\r\n":
                line = text.readline(JSON_CHUNK)
            yield _too_large(f"line {number}", max_bytes)
        elif not line.isascii() and NOT_UTF8.search(line):
            yield RowError(f"line {number}: not valid Unicode (UTF-8).")
        else:
            yield line


def _too_large(what: str, max_bytes: int) -> SizeError:
    return SizeError(f"{what}: larger than {max_bytes:,} bytes.")


def _starts_object(file: BinaryIO) -> bool:
    """Whether a JSON file starts with an object, not with a list of them."""
    start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return start.startswith(b"{")


def _line_rows(file: BinaryIO, max_bytes: int) -> Iterator[dict[str, Any] | RowError]:
    for number, line in enumerate(_lines(file, max_bytes, newline="\n"), 1):
        if isinstance(line, RowError):
            yield line
        elif line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                yield RowError(f"line {number}: not valid JSON ({error}).")
                continue
            if isinstance(row, dict):
                yield row
            else:
                yield RowError(f"line {number}: expected an object, got {printable(line.strip()[:50])}.")


def _list_rows(file: BinaryIO, max_bytes: int) -> Iterator[dict[str, Any] | RowError]:
    """The objects of a list in JSON, which is not read at once. Behind a broken one nothing can be found."""
    decoder, count = json.JSONDecoder(), 0
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")
    buffer = text.read(JSON_CHUNK).lstrip()
    if not buffer.startswith("["):
        raise _BrokenFile("expected a list of rows in JSON")
    position = 1
    while True:
        position = SEPARATORS.match(buffer, position).end()  # pyright: ignore[reportOptionalMemberAccess]
        if buffer.startswith("]", position):
            return
        try:
            entry, end = decoder.raw_decode(buffer, position)
        except json.JSONDecodeError as error:
            left = len(buffer) - position
            if left > max_bytes:
                raise _BrokenFile(f"entry {count + 1} is larger than {max_bytes:,} bytes") from error
            # as much again: an entry of many chunks is not parsed once for each
            more = text.read(max(JSON_CHUNK, left))
            if not more:
                raise _BrokenFile(f"broken JSON after {count} entries ({error.msg})") from error
            buffer, position = buffer[position:] + more, 0
            continue
        except (ValueError, RecursionError) as error:  # numbers too long and lists too deep for Python
            reason = "nested too deep" if isinstance(error, RecursionError) else error
            raise _BrokenFile(f"broken JSON after {count} entries ({reason})") from error
        count += 1
        if NOT_UTF8.search(buffer, position, end):
            yield RowError(f"entry {count}: not valid Unicode (UTF-8).")
        else:
            yield entry if isinstance(entry, dict) else RowError(f"entry {count}: expected an object.")
        position = end


class _CsvLines:
    """The lines of a CSV file; `size` counts the characters of a row, `is_at_end` says that one lacks lines."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._lines, self._max_bytes = _lines(file, max_bytes, newline=""), max_bytes
        self.size, self.number, self.is_at_end = 0, 0, False

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            self.is_at_end = True
            raise
        self.number += 1
        if isinstance(line, RowError):
            raise line
        self.size += len(line)
        if self.size > self._max_bytes:
            raise _too_large(f"the row that ends on line {self.number}", self._max_bytes)
        return line


def _csv_rows(
    file: BinaryIO, delimiter: str, texts: Sequence[str], max_bytes: int
) -> Iterator[dict[str, Any] | RowError]:
    csv.field_size_limit(2**31 - 1)  # Python's limit is 128 KiB; rows have their own
    lines = _CsvLines(file, max_bytes)
    reader, header = csv.reader(lines, delimiter=delimiter), None
    while True:
        lines.size = 0
        try:
            values = next(reader)
        except StopIteration:
            return
        except (csv.Error, RowError) as error:
            if header is None:
                raise _BrokenFile(f"its header cannot be read: {error}") from error
            yield error if isinstance(error, RowError) else RowError(f"line {lines.number}: {error}.")
            continue
        if not values:
            continue
        if header is None:
            header = values
            if doubles := [name for name, times in Counter(header).items() if name and times > 1]:
                raise _BrokenFile(f"several columns are called {printable(doubles[0])}")
            continue
        if lines.is_at_end:  # it was asked for more lines
            yield RowError(f"line {lines.number}: a quotation mark is not closed.")
        elif any(values[len(header) :]):
            yield RowError(
                f"line {lines.number}: {len(values)} values for {len(header)} columns; a value that holds "
                f"{delimiter!r} goes between quotation marks."
            )
        else:
            values += [None] * (len(header) - len(values))
            row: dict[str, Any] = dict(zip(header, values, strict=False))
            try:
                yield row | {name: _texts(row[name]) for way in texts if (name := column_of(way, row))}
            except ValueError as error:
                yield RowError(f"line {lines.number}: {error}.")


def _texts(cell: str | None) -> str | list[str | None] | None:
    """A cell's text, or the list of texts in JSON that it holds; as Python or NumPy print a list it is refused."""
    text = (cell or "").strip()
    if not (text.startswith("[") and text.endswith("]")):
        return cell
    try:
        value = parse_json(text)
        if isinstance(value, list) and all(isinstance(one, str | None) for one in value):
            return value
    except ValueError as error:
        inner = text[1:-1].strip()
        if inner and inner[0] in "\"'" and inner[-1] in "\"'":
            raise ValueError(f"a list must be written in JSON, got {printable(text[:50])}") from error
    return cell


class _Bounded:
    """A file whose single reads are bounded: an archive's headers may give any size."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= max(self._max_bytes, tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


class _Sample:
    """A sample while its members are read; after an `error` its other members are skipped."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.fields: dict[str, Any] = {}
        self.size = 0
        self.error: RowError | None = None

    def row(self) -> dict[str, Any] | RowError:
        if self.error is not None:
            return self.error
        objects = {name: value for name, value in self.fields.items() if isinstance(value, dict) and _is_json(name)}
        images = [name for name in self.fields if _is_image(name)]
        # A column of the table that the shard was downloaded from may be called `image` too.
        columns = next(iter(objects.values())) if len(objects) == 1 else objects.get("json", {})
        row = {**columns, **self.fields, "__key__": self.key}
        if len(images) == 1:
            row["image"] = self.fields[images[0]]
        elif images:
            row.pop("image", None)
        return row

    def fail(self, reason: str, kind: type[RowError] = RowError) -> None:
        self.error = kind(f"sample {printable(self.key)}: {reason}")


def _is_json(field: str) -> bool:
    return field.rpartition(".")[2] in JSON_FIELDS


def _is_image(field: str) -> bool:
    from ..images import image_extensions  # slow: imports torch

    return f".{field.rpartition('.')[2]}" in image_extensions()


def _tar_rows(file: BinaryIO, shard: str, max_bytes: int) -> Iterator[dict[str, Any] | RowError]:
    """The samples of a shard. Members are told by their headers before any of their bytes is read."""
    with tarfile.open(fileobj=_Bounded(file, max_bytes), mode="r:") as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
        sample, seen = None, set()
        for member in tar:
            tar.members = []  # it would keep all
            if member.size < 0:
                raise tarfile.ReadError("a member of a negative size")
            folder, name = os.path.split(member.name)
            stem, _, field = name.partition(".")
            if not member.isreg() or not stem or not field:
                continue
            key, field = f"{shard}/{os.path.join(folder, stem)}", field.lower()
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample.row()
                sample = _Sample(key)
                if hash(key) in seen:
                    sample.fail(
                        "its members are not side by side in the archive, as those of a sample must be; `tar "
                        "--sort=name` writes them so."
                    )
                seen.add(hash(key))
            _add_member(sample, field, tar, member, max_bytes)
        # Where a file ends between two members, or no member follows, tarfile takes it for whole.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the archive has no end mark")
        if sample is not None:
            yield sample.row()


def _add_member(sample: _Sample, field: str, tar: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int) -> None:
    kind = field.rpartition(".")[2]
    if sample.error is not None or not (kind in TEXT_FIELDS or _is_json(field) or _is_image(field)):
        return
    sample.size += member.size
    if field in sample.fields:
        sample.fail(f"it has two members {printable(field)}.")
    elif member.sparse is not None:
        sample.fail(f"{printable(field)} is a sparse file.")
    elif sample.size > max_bytes:
        sample.fail(f"with {printable(field)} larger than {max_bytes:,} bytes.", SizeError)
    if sample.error is not None:
        return
    content = tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
    try:
        if _is_image(field):
            sample.fields[field] = {"bytes": content, "path": os.path.basename(member.name)}
        else:
            sample.fields[field] = parse_json(content) if _is_json(field) else content.decode("utf-8")
    except ValueError as error:  # not UTF-8, too
        sample.fail(f"{printable(field)} cannot be read ({error}).")
