"""Classes of images: folders of one folder a class, and the names that stand in prompts."""

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
    Gives a source the names of its classes: those that are asked for, or the data's own.

    Args:
        source (`Source`): what is read; its `classes` are set.
        own (`list[str]`, *optional*): the names in the data.
        own_source (`str`): where those come from.
        count (`int`, *optional*): how many classes there are, if that is known.
    """
    given, where = source.options.class_names, source.where
    if given is None:
        wnid = next((name for name in own or () if WNID.match(name)), None)
        if own is None or wnid is not None:
            raise ValueError(
                f"{where}: its classes have {'no names' if wnid is None else f'WordNet ids, {wnid!r}, not words'}. "
                "Say them with `class_names` (--class-names): openai, for the classes of ImageNet, or a file with a "
                "name in each line, in the order of the classes."
            )
        chosen = ClassNames(own, own_source)
    elif given == "openai":
        chosen = _openai_class_names()
    else:
        chosen = ClassNames(read_class_names(Path(given)), f"the file {os.path.basename(given)}")
    if count is not None and len(chosen.names) != count:
        raise ValueError(f"`class_names`: {chosen.source} has {len(chosen.names)} names, and {where} {count} classes.")
    if shared := [name for name, times in Counter(chosen.names).items() if times > 1]:
        logger.warning("%d class names stand for several classes: %s.", len(shared), shown(shared))
    source.classes = chosen


def read_class_names(file: Path) -> list[str]:
    """The lines of a file, none of them empty."""
    lines = [line.strip() for line in read_text(file).rstrip().split("\n")]
    if "" in lines:
        raise ValueError(f"{file}, line {lines.index('') + 1}: empty; expected a class name in each line.")
    return lines


def _openai_class_names() -> ClassNames:
    """The names of ImageNet's classes that CLIP was evaluated with."""
    names = open_clip_metadata().IMAGENET_CLASSNAMES
    try:
        release = f" {version('open_clip_torch')}"
    except PackageNotFoundError:  # a checkout on the path
        release = ""
    return ClassNames(list(names), f"openai (open_clip{release})")


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def images_by_class(source: Source, folder: Path, classes: Sequence[str]) -> list[Row]:
    """The images below the folders of the classes; a class without any is an error."""
    found, unreadable = find_images(folder, source.options.image_root)
    if unreadable:
        raise source.incomplete(f"{folder}: {shown([f'{name} {why}' for name, why in unreadable.items()])}")
    labels = {name: label for label, name in enumerate(classes)}
    of_class = {name: labels.get(name.split("/")[0]) if "/" in name else None for name in found}
    if others := [name for name, label in of_class.items() if label is None]:
        logger.warning("%s: %d images are not of the benchmark and left out: %s.", folder, len(others), shown(others))
    if empty := [name for name, label in labels.items() if label not in of_class.values()]:
        raise source.incomplete(f"{folder} holds no image of {len(empty)} of {len(classes)} classes: {shown(empty)}")
    rows = [(name, label) for name, label in of_class.items() if label is not None]
    return [Row("/".join(Path(folder, name).parts[-2:]), (folder / name,), label=label) for name, label in rows]


def evenly(source: Source, rows: Sequence[Row]) -> Iterator[Row]:
    """All rows, if all are scored; else the first of each class, in the order of the classes, then the second, ..."""
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
