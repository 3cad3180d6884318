"""Classification of your own images, in folders of classes or a table."""

import os
from collections.abc import Iterator

from .classes import class_folders, evenly, images_by_class, name_classes
from .collect import TABLE_OPTIONS, Row, Source, Task
from .tables import is_table, table_classes

SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


def rows(source: Source) -> Iterator[Row]:
    """Yields the images with their classes."""
    data = source.data or ""
    if is_table(source):
        yield from table_classes(source)
        source.name = source.data
        source.id = source.id or os.path.basename(os.path.normpath(data))
        return
    folder, split = source.folder(), source.options.split
    if split is not None:
        folder = folder / split
    source.id = source.name = os.path.basename(os.path.normpath(data))
    classes = class_folders(folder)
    if (
        classes
        and {one.lower() for one in classes} <= SPLIT_NAMES
        and any(class_folders(folder / one) for one in classes)
    ):
        raise ValueError(f"{folder} has the splits {', '.join(classes)}. Pass one as `split` (--split).")
    found = images_by_class(source, folder, classes)
    own = [one.replace("_", " ") for one in classes]
    name_classes(source, own, "folder names, _ as space", len(classes))
    yield from evenly(source, found)


TASK = Task(
    key="classification",
    name="classification",
    id="classification",
    description="your own images with classes",
    source="use your own images. Pass a folder with one folder for each class, or the id of a data set on the Hub.",
    rows=rows,
    options=("num_images", "split", *TABLE_OPTIONS, "label_column", "class_names"),
)
