"""Classes of images: folders of classes, and class names for prompts."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...images import find_images
from ..zero_shot import open_clip_metadata
from .collect import ClassNames, Row, Source
from .files import read_text, shown

logger = logging.getLogger(__name__)

WNID = re.compile(r"n\d{8}")


def name_classes(source: Source, own: list[str] | None, own_source: str, count: int | None) -> None:
    """
    Sets the `classes` of a source to the names in the option `class_names` or in the data.

    Args:
        source (`Source`): The data of the task.
        own (`list[str]`, *optional*): Class names in the data.
        own_source (`str`): Description of the source of `own`, for the protocol.
        count (`int`, *optional*): Number of classes, if known.
    """
    given, where = source.options.class_names, source.where
    if given is None:
        wnid = next((name for name in own or () if WNID.match(name)), None)
        if own is None or wnid is not None:
            raise ValueError(
                f"The classes of {where} have {'no names' if wnid is None else f'WordNet ids ({wnid}) as names'}. "
                "Pass `class_names` (--class-names): openai for the classes of ImageNet, or a file with one name per "
                "line in the order of the classes."
            )
        chosen = ClassNames(own, own_source)
    elif given == "openai":
        chosen = _openai_class_names()
    else:
        chosen = ClassNames(read_class_names(Path(given)), f"the file {os.path.basename(given)}")
    if count is not None and len(chosen.names) != count:
        raise ValueError(
            f"{where} has {count} classes, but {len(chosen.names)} names ({chosen.source}). Pass `class_names` "
            "(--class-names) with one name for each class."
        )
    if shared := [name for name, times in Counter(chosen.names).items() if times > 1]:
        logger.warning("%d names are shared by several classes: %s.", len(shared), shown(shared))
    source.classes = chosen


def read_class_names(file: Path) -> list[str]:
    """Reads class names from a file with one on each line."""
    lines = [line.strip() for line in read_text(file).rstrip().split("\n")]
    if "" in lines:
        raise ValueError(f"{file}, line {lines.index('') + 1} is empty. Write a class name on each line.")
    return lines


def _openai_class_names() -> ClassNames:
    """Returns CLIP's names of the ImageNet classes."""
    names = open_clip_metadata().IMAGENET_CLASSNAMES
    try:
        release = f" {version('open_clip_torch')}"
    except PackageNotFoundError:  # open_clip is on the path but not installed
        release = ""
    return ClassNames(list(names), f"openai (open_clip{release})")


def class_folders(folder: Path) -> list[str]:
    """Returns the names of the folders in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def images_by_class(source: Source, folder: Path, classes: Sequence[str]) -> list[Row]:
    """Finds the images in the folders of the classes; a class without images is an error."""
    found, unreadable = find_images(folder, source.options.image_root)
    if unreadable:
        raise source.incomplete(f"{folder}: {shown([f'{name} {why}' for name, why in unreadable.items()])}")
    labels = {name: label for label, name in enumerate(classes)}
    of_class = {name: labels.get(name.split("/")[0]) if "/" in name else None for name in found}
    if others := [name for name, label in of_class.items() if label is None]:
        logger.warning("%s: %d images without a class are ignored: %s.", folder, len(others), shown(others))
    if empty := [name for name, label in labels.items() if label not in of_class.values()]:
        raise source.incomplete(f"{folder} has no images for {len(empty)} of {len(classes)} classes: {shown(empty)}")
    rows = [(name, label) for name, label in of_class.items() if label is not None]
    return [Row("/".join(Path(folder, name).parts[-2:]), (folder / name,), label=label) for name, label in rows]


def evenly(source: Source, rows: Sequence[Row]) -> Iterator[Row]:
    """Yields all rows; with `num_images`, first one row of each class, then a second one of each, and so on."""
    if source.options.num_images is None:
        yield from rows
        return
    source.protocol["order"] = "the first image of each class, then the second, ..."
    seen: Counter[int | None] = Counter()
    order = []
    for index, row in enumerate(rows):
        order.append((seen[row.label], row.label, index))
        seen[row.label] += 1
    yield from (rows[index] for *_, index in sorted(order))
