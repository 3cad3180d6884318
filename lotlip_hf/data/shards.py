"""Shards of relabelled records, which `records.load_records` reads as they are."""

import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from ..images import image_extensions

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
ROW_GROUP = 100  # rows that are in memory at a time, here and in readers: images may be among them
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
        rows = iter(rows)
        with pq.ParquetWriter(file, FEATURES.arrow_schema) as writer:
            while some := list(itertools.islice(rows, ROW_GROUP)):
                writer.write_table(pa.Table.from_pylist(some, schema=FEATURES.arrow_schema))
        return
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, row in enumerate(rows):
            key, image = f"{name}-{number:06d}", row["image"]
            fields = {column: value for column, value in row.items() if column != "image"}
            _add(tar, f"{key}{_extension(image)}", image["bytes"])
            _add(tar, f"{key}.json", json.dumps(fields, ensure_ascii=False).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no user and no time
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _extension(image: Mapping[str, Any]) -> str:
    extension = os.path.splitext(image["path"] or "")[1].lower()
    if extension in image_extensions():
        return extension
    with Image.open(io.BytesIO(image["bytes"])) as opened:
        kind = opened.format or ""
    known = (extension for extension, name in Image.registered_extensions().items() if name == kind)
    return EXTENSIONS.get(kind) or next(known)
