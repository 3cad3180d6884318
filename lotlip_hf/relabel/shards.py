"""Shards of relabelled records, which `records.load_records` reads as they are."""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from ..images import image_extensions, readable_formats

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
# Rows and bytes of images that are in memory at a time, here and in readers
ROW_GROUP, ROW_GROUP_BYTES = 100, 1 << 27
# Of kinds that have several, and of the JPEGs of some cameras; the others' are PIL's.
EXTENSIONS = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "TIFF": ".tif"}
FEATURES = Features(
    {
        "id": Value("string"),
        "image": ImageFeature(),
        "short_caption": Value("string"),
        "long_captions": List(Value("string")),
        "captions": List(
            {
                "model": Value("string"),
                "revision": Value("string"),
                "prompt": Value("string"),
                "settings": Value("string"),
                "attempts": Value("int64"),
                "tokens": Value("int64"),
                "sub_captions": Value("int64"),
                "reasons": List(Value("string")),
                "earlier_reasons": List(Value("string")),
                "dropped": Value("string"),
            }
        ),
    }
)


def write_shard(file: BinaryIO, rows: Iterable[Mapping[str, Any]], format: str, name: str) -> None:
    """
    Writes a shard; the same rows make the same bytes.

    Args:
        file: What to write to.
        rows: Records with the columns of `FEATURES`; `image` is a dictionary of `bytes` and `path`.
        format: `"parquet"`, or `"webdataset"`: a tar of image files, each with a JSON of the other columns.
        name: What the samples' keys in a tar begin with.

    Raises:
        OSError: if it cannot be written.
    """
    if format == "parquet":
        with pq.ParquetWriter(file, FEATURES.arrow_schema) as writer:
            for group in _row_groups(rows):
                writer.write_table(pa.Table.from_pylist(group, schema=FEATURES.arrow_schema))
        return
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, row in enumerate(rows):
            key, image = f"{name}-{number:06d}", row["image"]
            fields = {column: value for column, value in row.items() if column != "image"}
            _add(tar, f"{key}{_extension(image)}", image["bytes"])
            _add(tar, f"{key}.json", json.dumps(fields, ensure_ascii=False).encode())


def _row_groups(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    group: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row["image"]["bytes"] or b"")
        if len(group) == ROW_GROUP or size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no user and no time
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _extension(image: Mapping[str, Any]) -> str:
    extension = os.path.splitext(image["path"] or "")[1].lower()
    if extension in image_extensions():
        return extension
    with Image.open(io.BytesIO(image["bytes"]), formats=readable_formats()) as opened:
        kind = opened.format or ""
    known = (extension for extension, name in Image.registered_extensions().items() if name == kind)
    return EXTENSIONS.get(kind) or next(known)
