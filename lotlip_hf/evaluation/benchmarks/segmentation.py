"""Segmentation of your own images, in a folder of images and masks."""

import os
from collections.abc import Iterator

from ...images import find_images
from .classes import name_classes, read_class_names
from .collect import Row, Source, Task
from .files import shown


def rows(source: Source) -> Iterator[Row]:
    """Yields the images with their masks."""
    folder = source.file("classes.txt").parent
    source.id = source.name = folder.resolve().name
    name_classes(source, read_class_names(folder / "classes.txt"), "classes.txt", None)
    found, unreadable = find_images(folder / "images", source.options.image_root)
    found_masks, unreadable_masks = find_images(folder / "masks", source.options.image_root)
    if unreadable := unreadable | unreadable_masks:
        raise source.incomplete(f"{folder}: {shown([f'{name} {why}' for name, why in unreadable.items()])}")
    masks = {name: os.path.splitext(name)[0] + ".png" for name in found}
    if missing := [name for name, mask in masks.items() if mask not in found_masks]:
        raise source.incomplete(f"of {len(found)} images, {len(missing)} have no mask ({shown(missing)})")
    for name, mask in masks.items():
        yield Row(name, (folder / "images" / name,), mask=folder / "masks" / mask)


TASK = Task(
    key="segmentation",
    name="segmentation",
    id="segmentation",
    description="your own images with masks of classes",
    source=(
        "use your own images. Pass a folder with images/, masks/ (for each image a PNG file of the same name and size "
        "with the index of the class of each pixel, 255 to ignore it) and classes.txt (a name on each line)."
    ),
    rows=rows,
    options=("num_images", "class_names"),
)
