"""MSCOCO and Flickr30k in Karpathy's split, with five short captions per image."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from .collect import TABLE_OPTIONS, Row, Source, Task
from .files import caption_of, field_of, read_json, string_of
from .tables import is_table, table_texts

CAPTIONS_PER_IMAGE = 5  # a few images have more captions, which are ignored


def rows(source: Source) -> Iterator[Row]:
    """Yields the images of a split with their captions, from Karpathy's file or a table."""
    source.protocol["captions"] = f"the first {CAPTIONS_PER_IMAGE} of each image"
    if is_table(source):
        columns = ("caption", "captions", "sentences", "txt", "text")
        yield from table_texts(source, columns, _five_captions, split_column=True)
        return
    folders = ("", "caption_datasets/", "annotations/", "karpathy/")
    file = source.file(*(f"{folder}dataset_{source.task.key}.json" for folder in folders))
    source.where = str(file)
    listed = field_of(read_json(file), "images", file)
    for number, row in enumerate(listed):
        for key in ("split", "filename", *(["filepath"] if isinstance(row, Mapping) and "filepath" in row else [])):
            string_of(row, key, f"{file}, images[{number}]")
    split = source.check_split(row["split"] for row in listed)
    source.known = [row["filename"] for row in listed]
    for row in listed:
        if row["split"] != split:
            continue
        name = os.path.join(row.get("filepath", ""), row["filename"])
        folders = ("", "images") if "filepath" in row else ("flickr30k-images", "flickr30k_images", "images", "")
        captions = _five_captions(field_of(row, "sentences", f"{file}, {name}"))
        paths = [source.folder() / folder / name for folder in folders]
        yield Row(name, paths, texts=[caption_of(caption, f"{file}, {name}") for caption in captions])


def _five_captions(value: Any) -> list[Any]:
    """Returns the first five captions of a cell: strings, Karpathy's sentences, or the lines of a text."""
    captions = [line for line in value.split("\n") if line.strip()] if isinstance(value, str) else value
    captions = [caption.get("raw") if isinstance(caption, Mapping) else caption for caption in captions or ()]
    return captions[:CAPTIONS_PER_IMAGE]


def _task(key: str, name: str, hub_id: str, source: str, num_images: int) -> Task:
    return Task(
        key=key,
        name=name,
        id=hub_id,
        description="five short captions per image, Karpathy's test split",
        source=f"download dataset_{key}.json from Karpathy's caption_datasets.zip, and {source} in the same folder.",
        rows=rows,
        options=("num_images", "split", *TABLE_OPTIONS, "text_column", "normalize"),
        num_images=num_images,
        num_texts=CAPTIONS_PER_IMAGE * num_images,
        captions_per_image=CAPTIONS_PER_IMAGE,
        normalize=False,
        split="test",
        hub_id=hub_id,
        hub_revision="refs/convert/parquet",
    )


COCO = _task(
    "coco",
    "MSCOCO",
    "nlphuji/mscoco_2014_5k_test_image_text_retrieval",
    "unpack val2014.zip from cocodataset.org to val2014/",
    5000,
)
FLICKR30K = _task(
    "flickr30k",
    "Flickr30k",
    "nlphuji/flickr_1k_test_image_text_retrieval",
    "put the images of Flickr30k (on request) into flickr30k-images/",
    1000,
)
