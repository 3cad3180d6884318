"""Retrieval on your own images and captions, in any format of the training data."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from datasets import IterableDataset

from ...data.records import ColumnMapping, MissingColumn, find_files, is_hub_name, load_records, read_table
from ...files import MAX_BYTES
from ...images import ImageSource
from .collect import TABLE_OPTIONS, Row, Source, Task
from .files import caption_of
from .tables import is_saved_dataset, stored_image, table_texts


def rows(source: Source) -> Iterator[Row]:
    """Yields the images with their captions, joined from all records of the same image."""
    data, options = source.data or "", source.options
    captions = options.captions or "long"
    column = "short_caption" if captions == "short" else "long_captions"
    source.protocol["captions"] = captions
    if is_hub_name(data) or is_saved_dataset(data):
        yield from table_texts(source, (column,), partial(_pick, captions=captions))
        source.name = data
        return
    if options.config is not None:
        raise ValueError(f"`config` is only for data sets on the Hub, but {data} is not one. Omit it.")
    source.where, source.split = data, options.split
    source.id = source.name = os.path.basename(os.path.normpath(data))
    source.protocol["text_column"] = options.text_column or column
    image_column = options.image_column or ColumnMapping.image
    records = _records(source, ColumnMapping(image=image_column, long=options.text_column or column, short=None))
    found: dict[str | int, Row] = {}
    for number, record in enumerate(records):
        if record["error"]:
            raise source.incomplete(record["error"])
        name = str(record["id"])
        image = stored_image(record["image"], f"{data}, {name}")
        texts = [
            caption_of(text, f"{data}, {name}, column {options.text_column or column!r}")
            for text in _pick(record["long_captions"], captions)
        ]
        key = image if isinstance(image, str) else number
        if key in found:  # another caption of the same image
            texts = [*found[key].texts, *texts]
            name = found[key].name
        is_there = image is not None and (not isinstance(image, str) or os.path.isfile(image))
        load = partial(_load, records, number, name) if is_there else None
        found[key] = Row(name, load=load, texts=texts)
    yield from found.values()


def _records(source: Source, mapping: ColumnMapping) -> Any:
    data, options = cast(str, source.data), source.options
    limits = {"image_root": options.image_root, "max_record_bytes": options.max_record_bytes or MAX_BYTES}
    try:
        records = load_records(data, mapping, options.split, **limits)
        if isinstance(records, IterableDataset):  # shards: `read_table` stores their images on disk for random access
            records = read_table(find_files(data, options.split), mapping, **limits)
    except MissingColumn as error:
        hint = (
            "Pass the columns as `image_column` (--image-column) and `text_column` (--text-column), and the kind of "
            "captions as `captions` (--captions long, short or all)."
        )
        raise MissingColumn(error.problem, error.field, hint) from error
    return records


def _load(records: Any, number: int, name: str) -> ImageSource:
    return cast(ImageSource, stored_image(records[number]["image"], name))


def _pick(value: Any, captions: str) -> list[Any]:
    texts = value if isinstance(value, list) else [value]
    return texts if captions == "all" else texts[:1]


TASK = Task(
    key="retrieval",
    name="retrieval",
    id="retrieval",
    description="your own images with captions",
    source=(
        "use your own images. Pass a folder of images with metadata.jsonl, .csv or .parquet; a file of records "
        "(.jsonl, .json, .csv, .tsv or .parquet); WebDataset shards (.tar); or the id of a data set on the Hub. Pass "
        "--image-column and --text-column if the columns are not image (or file_name) and long_captions."
    ),
    rows=rows,
    options=("num_images", "split", *TABLE_OPTIONS, "text_column", "captions", "normalize", "max_record_bytes"),
)
