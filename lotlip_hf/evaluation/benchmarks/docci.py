"""DOCCI: long captions, written by people, of images that differ in details."""

from collections.abc import Iterator

from ...data.readers import every_row
from .collect import TABLE_OPTIONS, Row, Source, Task
from .files import caption_of, field_of, string_of
from .tables import is_table, table_texts


def rows(source: Source) -> Iterator[Row]:
    """Yields the images and descriptions of a split, from DOCCI's files or a table."""
    if is_table(source):
        yield from table_texts(source, ("description", "caption", "text"), lambda text: [text])
        return
    file = source.file(*(f"{folder}docci_descriptions.jsonlines" for folder in ("", "docci/", "data/")))
    source.where = str(file)
    source.protocol["captions"] = "description"
    found = []
    for number, row in enumerate(every_row(file), start=1):
        where = f"{file}, entry {number}"
        name, text = string_of(row, "image_file", where), caption_of(field_of(row, "description", where), where)
        paths = (file.parent / "images" / name, file.parent / name)
        found.append((string_of(row, "split", where), Row(name, paths, texts=[text])))
    split = source.check_split(split for split, _ in found)
    source.known = [row.name for _, row in found]
    yield from (row for own, row in found if own == split)


TASK = Task(
    key="docci",
    name="DOCCI",
    id="google/docci",
    description="long captions, written by people, of images that differ in details",
    source=(
        "download docci_descriptions.jsonlines and docci_images.tar.gz from google.github.io/docci. Unpack the images "
        "to images/ in the same folder."
    ),
    rows=rows,
    options=("num_images", "split", *TABLE_OPTIONS, "text_column", "normalize"),
    num_images=5000,
    num_texts=5000,
    split="test",
)
