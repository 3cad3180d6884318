"""Shards of relabelled records, which `records.load_records` reads as they are."""

import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from ..images import image_extensions

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
ROW_GROUP = 100  # rows that a reader has in memory at a time: images may be among them
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


def write_shard(path: Path, rows: Sequence[Mapping[str, Any]], format: str) -> None:
    """
    Writes a shard; the same rows make the same bytes.

    Args:
        path: The file, which is there whole or not at all.
        rows: Records with the columns of `FEATURES`; `image` is a dictionary of `bytes` and `path`.
        format: `"parquet"`, or `"webdataset"`: a tar of image files, each with a JSON of the other columns.

    Raises:
        OSError: if it cannot be written.
    """
    if format == "parquet":
        buffer = io.BytesIO()
        table = pa.Table.from_pylist(list(rows), schema=FEATURES.arrow_schema)
        pq.write_table(table, buffer, row_group_size=ROW_GROUP)
        replace_file(path, buffer.getbuffer())
        return
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, row in enumerate(rows):
            key, image = f"{path.stem}-{number:06d}", row["image"]
            fields = {name: value for name, value in row.items() if name != "image"}
            _add(tar, f"{key}{_extension(image)}", image["bytes"])
            _add(tar, f"{key}.json", json.dumps(fields, ensure_ascii=False).encode())
    replace_file(path, buffer.getbuffer())


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """
    Writes a file that is there whole or not at all, whenever the process or the machine stops.

    Args:
        path: The file.
        content: What it is to hold.

    Raises:
        OSError: if it cannot be written.
    """
    # several processes may write the same
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no user and no time
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _extension(image: Mapping[str, Any]) -> str:
    extension = os.path.splitext(image["path"] or "")[1].lower()
    if extension in image_extensions():
        return extension
    with Image.open(io.BytesIO(image["bytes"])) as opened:
        kind = opened.format
    return next(extension for extension, name in Image.registered_extensions().items() if name == kind)
