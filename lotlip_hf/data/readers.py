"""
Readers of CSV, TSV, JSON, JSON lines, Parquet and WebDataset files, row by row.

Training, evaluation, relabelling and `lotlip embed` use these readers, also for streams. No types are guessed, the
size of a row is limited to `max_bytes`, and reading continues after a row that cannot be read.
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

# Extension -> kind of the file.
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
PARQUET_RATIO = 100  # largest ratio of uncompressed to compressed bytes; texts have about 10
JSON_CHUNK = 1 << 20  # characters
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # `surrogateescape` decodes invalid bytes to these
SEPARATORS = re.compile(r"[\s,]*")
PATH_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")
# Members of a sample that are texts or JSON, by the last part of their extension.
TEXT_FIELDS = frozenset("txt text transcript cls cls2 index inx id".split())
JSON_FIELDS = frozenset(("json", "jsn"))


class RowError(ValueError):
    """A row cannot be read. The message contains its position and the reason. Later rows can still be read."""


class SizeError(RowError):
    """A row is larger than `max_bytes`."""


class _BrokenFile(ValueError):
    """The rest of a file cannot be read."""


def read_rows(
    file: str | os.PathLike,
    columns: Sequence[str] | None = None,
    texts: Sequence[str] = (),
    max_bytes: int = MAX_BYTES,
) -> Iterator[dict[str, Any] | RowError]:
    """
    Reads the rows of a file in order.

    Values of CSV and TSV files are strings. A `.json` file contains a list of objects, or one object per line. A row
    of a WebDataset shard is a sample: successive members with the same name up to the first dot. The extension of a
    member is its column (`jpg`, `txt`, `input.jpg`). The fields of a sample's only JSON member are columns too. The
    only image of a sample is also the column `image`. `__key__` is the name of the shard and of the sample.

    Args:
        file (`str` or `os.PathLike`): The file. The extension determines the format.
        columns (`Sequence[str]`, *optional*): Columns of a Parquet file to read, or paths into them. Defaults to all
            columns.
        texts (`Sequence[str]`, *optional*): Columns of a CSV or TSV file, or paths into them, in which a JSON list of
            texts is read as a list.
        max_bytes (`int`, *optional*, defaults to `MAX_BYTES`): Maximum size of a row: of a line, an entry of a list,
            or a sample with its image. Larger rows are not read.

    Yields:
        `dict[str, Any]` or `RowError`: A row, or the reason why it cannot be read.

    Raises:
        `ValueError`, `OSError`: If the rest of the file cannot be read.
    """
    extension = os.path.splitext(file)[1].lower()
    with open_regular(file) as opened:
        if extension == ".parquet":
            with pyarrow.parquet.ParquetFile(opened) as table:
                names = table.schema_arrow.names
                wanted = [name for name in names if name in {column_of(path, names) for path in columns or ()}]
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
    Returns the number of rows to read at a time from each row group, so that a column of these rows has at most
    `max_bytes`. Raises `ValueError` if a column looks like a decompression bomb.

    A value is at most as large as its column in the row group. Dictionary encoding stores a value once for many rows.
    """
    batches = []
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        parts = [group.column(number) for number in range(group.num_columns)]
        for part in parts:
            packed, unpacked = max(1, part.total_compressed_size), part.total_uncompressed_size
            repeated = group.num_rows if any("DICTIONARY" in encoding for encoding in part.encodings) else 1
            if unpacked * repeated > max_bytes and unpacked > PARQUET_RATIO * packed:
                raise _BrokenFile(
                    f"column {printable(part.path_in_schema)} decompresses from {packed:,} to {unpacked:,} bytes for "
                    f"{group.num_rows:,} rows"
                )
        largest = max((part.total_uncompressed_size for part in parts), default=1)
        batches.append(max(1, min(PARQUET_BATCH, max_bytes // max(1, largest))))
    return batches


def every_row(
    file: str | os.PathLike, columns: Sequence[str] | None = None, texts: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file like [`read_rows`], but raises `ValueError` if a row cannot be read."""
    try:
        for row in read_rows(file, columns, texts):
            if isinstance(row, RowError):
                raise ValueError(f"{printable(file)}, {row}")
            yield row
    except (pyarrow.ArrowException, tarfile.TarError, _BrokenFile) as error:
        raise ValueError(f"{printable(file)}: cannot be read ({error}).") from error


def column_of(path: str, columns: Collection[str]) -> str | None:
    """Returns the column that a path starts with. Names of columns may have dots; the longest match wins."""
    if path in columns:
        return path
    ends = [match.start() for match in re.finditer(r"[.\[]", path)]
    return next((path[:end] for end in reversed(ends) if path[:end] in columns), None)


def value_of(row: Mapping[str, Any], path: str) -> Any:
    """Returns the value of a column or at a path such as `conversations[1].value`, or `None` if it does not exist."""
    column = column_of(path, row)
    if column is None:
        return None
    value = row[column]
    for name, index in PATH_STEP.findall(path, len(column)) if column != path else ():
        if name:
            value = value.get(name) if isinstance(value, Mapping) else None
        else:
            value = value[int(index)] if isinstance(value, list) and int(index) < len(value) else None
    return value


def _lines(file: BinaryIO, max_bytes: int, newline: str) -> Iterator[str | RowError]:
    """Yields the lines of a UTF-8 file with their line ends. Lines that are too long are skipped."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    number = 0
    while line := text.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            while line and line[-1] not in "\r\n":
                line = text.readline(JSON_CHUNK)
            yield _too_large(f"line {number}", max_bytes)
        elif not line.isascii() and NOT_UTF8.search(line):
            yield RowError(f"line {number}: not valid UTF-8.")
        else:
            yield line


def _too_large(row: str, max_bytes: int) -> SizeError:
    return SizeError(f"{row}: larger than {max_bytes:,} bytes.")


def _starts_object(file: BinaryIO) -> bool:
    """Returns whether a JSON file starts with an object instead of a list."""
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
    """Yields the objects of a JSON list, reading it in chunks. Reading stops at a broken object."""
    decoder, count = json.JSONDecoder(), 0
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")
    buffer = text.read(JSON_CHUNK).lstrip()
    if not buffer.startswith("["):
        raise _BrokenFile("expected a JSON list of objects")
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
            # Double the buffer, so that a long entry is not parsed again for every chunk.
            more = text.read(max(JSON_CHUNK, left))
            if not more:
                raise _BrokenFile(f"broken JSON after {count} entries ({error.msg})") from error
            buffer, position = buffer[position:] + more, 0
            continue
        except (ValueError, RecursionError) as error:  # the number is too long, or the nesting too deep
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise _BrokenFile(f"broken JSON after {count} entries ({reason})") from error
        count += 1
        if NOT_UTF8.search(buffer, position, end):
            yield RowError(f"entry {count}: not valid UTF-8.")
        else:
            yield entry if isinstance(entry, dict) else RowError(f"entry {count}: expected an object.")
        position = end


class _CsvLines:
    """Lines of a CSV file. `size` counts the characters of a row. `is_at_end` is set after the last line."""

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
    csv.field_size_limit(2**31 - 1)  # the default is 128 KiB; `max_bytes` limits rows instead
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
                raise _BrokenFile(f"the header cannot be read: {error}") from error
            yield error if isinstance(error, RowError) else RowError(f"line {lines.number}: {error}.")
            continue
        if not values:
            continue
        if header is None:
            header = values
            if doubles := [name for name, times in Counter(header).items() if name and times > 1]:
                raise _BrokenFile(f"several columns have the name {printable(doubles[0])}")
            continue
        if lines.is_at_end:
            yield RowError(f"line {lines.number}: a quotation mark is not closed.")
        elif any(values[len(header) :]):
            yield RowError(
                f"line {lines.number}: {len(values)} values for {len(header)} columns. Quote values that contain "
                f"{delimiter!r}."
            )
        else:
            values += [None] * (len(header) - len(values))
            row: dict[str, Any] = dict(zip(header, values, strict=False))
            try:
                yield row | {name: _texts(row[name]) for path in texts if (name := column_of(path, row))}
            except ValueError as error:
                yield RowError(f"line {lines.number}: {error}.")


def _texts(cell: str | None) -> str | list[str | None] | None:
    """Parses a JSON list of texts and returns other values unchanged. Lists in Python's notation are errors."""
    text = (cell or "").strip()
    if not (text.startswith("[") and text.endswith("]")):
        return cell
    try:
        value = parse_json(text)
        if isinstance(value, list) and all(isinstance(item, str | None) for item in value):
            return value
    except ValueError as error:
        inner = text[1:-1].strip()
        if inner and inner[0] in "\"'" and inner[-1] in "\"'":
            raise ValueError(f"a list must be valid JSON, got {printable(text[:50])}") from error
    return cell


class _Bounded:
    """Limits the size of each read from a file, because the headers of an archive may contain any size."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= max(self._max_bytes, tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


class _Sample:
    """A sample of a shard. After an `error`, its remaining members are skipped."""

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
        # A field of the JSON member may have the name `image` too.
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
    """Yields the samples of a shard. Members of unknown types are not read."""
    with tarfile.open(fileobj=_Bounded(file, max_bytes), mode="r:") as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
        sample, seen = None, set()
        for member in tar:
            tar.members = []  # tarfile would keep all members in memory
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
                    sample.fail("its members are not adjacent in the archive. Create it with `tar --sort=name`.")
                seen.add(hash(key))
            _add_member(sample, field, tar, member, max_bytes)
        # tarfile does not notice a file that is truncated between two members.
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
        sample.fail(f"it has two members with the extension {printable(field)}.")
    elif member.sparse is not None:
        sample.fail(f"{printable(field)} is a sparse file.")
    elif sample.size > max_bytes:
        sample.fail(f"larger than {max_bytes:,} bytes with {printable(field)}.", SizeError)
    if sample.error is not None:
        return
    content = tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
    try:
        if _is_image(field):
            sample.fields[field] = {"bytes": content, "path": os.path.basename(member.name)}
        else:
            sample.fields[field] = parse_json(content) if _is_json(field) else content.decode("utf-8")
    except ValueError as error:  # invalid JSON or UTF-8
        sample.fail(f"{printable(field)} cannot be read ({error}).")
