"""Validation images of ImageNet, in folders of classes or in the single folder of Kaggle's archive."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from .classes import WNID, class_folders, images_by_class, name_classes
from .collect import TABLE_OPTIONS, Row, Source, Task
from .files import read_text, shown
from .tables import is_table, table_classes

NUM_CLASSES = 1000


def rows(source: Source) -> Iterator[Row]:
    """Yields the images with their classes, in the order of their numbers."""
    if is_table(source):
        yield from table_classes(source, synonyms=True)
        return
    folder = source.folder()
    source.check_split(["validation"])
    folders = (folder / one for one in ("val", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", ""))
    root = next((one for one in folders if _is_imagenet(one)), None)
    if root is None:
        raise source.incomplete(f"{folder} has neither folders val/n01440764, ... nor files ILSVRC2012_val_*.JPEG")
    beside = [folder, *folder.parents[:1], root.parent]
    mapping_file = next((file for one in beside if (file := one / "LOC_synset_mapping.txt").is_file()), None)
    mapping = {} if mapping_file is None else _read_synsets(mapping_file)
    by_stem: dict[str, Path] = {}
    if wnids := [name for name in class_folders(root) if WNID.fullmatch(name)]:
        found = images_by_class(source, root, wnids)
        by_stem = {row.images[0].stem: row.images[0] for row in found}
        answers = {row.images[0].stem: wnids[row.label or 0] for row in found}
    else:
        solution = next((file for one in beside if (file := one / "LOC_val_solution.csv").is_file()), None)
        if solution is None:
            raise source.incomplete(f"{folder} does not contain LOC_val_solution.csv with the classes of the images")
        answers = _read_solution(solution)
        source.known = [f"{stem}.JPEG" for stem in answers]
    classes = list(mapping) or wnids or sorted(set(answers.values()))
    if unknown := sorted(set(answers.values()) - set(classes)):
        raise ValueError(f"{mapping_file} does not contain {shown(unknown)}. Download the file again.")
    if source.is_whole and len(classes) < NUM_CLASSES:
        raise source.incomplete(f"{root} has {len(classes)} of {NUM_CLASSES} classes")
    own = [mapping[wnid] for wnid in classes] if mapping else None
    name_classes(source, own, "the first synonyms of LOC_synset_mapping.txt", len(classes))
    numbers = range(1, (source.task.num_images or 0) + 1) if source.is_whole else ()
    labels = {wnid: label for label, wnid in enumerate(classes)}
    for stem in sorted(answers.keys() | {f"ILSVRC2012_val_{number:08d}" for number in numbers}):
        path = by_stem.get(stem, root / f"{stem}.JPEG")
        yield Row("/".join(path.parts[-2:]), (path,), label=labels.get(answers.get(stem, ""), 0))


def _is_imagenet(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return any(WNID.fullmatch(name) or name.startswith("ILSVRC2012_val_") for name in os.listdir(folder))


def _read_synsets(file: Path) -> dict[str, str]:
    """Reads the first synonym of each ImageNet class, in the order of the classes."""
    synsets = {}
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        wnid, _, synonyms = line.strip().partition(" ")
        if not line.strip():
            continue
        if not WNID.fullmatch(wnid) or not synonyms.strip():
            raise ValueError(
                f"{file}, line {number} is not a class with its names, such as n01440764 tench. Download it again."
            )
        synsets[wnid] = synonyms.split(",")[0].strip()
    return synsets


def _read_solution(file: Path) -> dict[str, str]:
    """Reads the class of each validation image."""
    answers = {}
    for number, row in enumerate(csv.DictReader(read_text(file).splitlines()), start=2):
        wnid = (row.get("PredictionString") or "").split(" ")[0]
        if not row.get("ImageId") or not WNID.fullmatch(wnid):
            raise ValueError(
                f"{file}, line {number} is not ImageId,PredictionString, where PredictionString starts with a class. "
                "Download the file again."
            )
        answers[row["ImageId"]] = wnid
    return answers


TASK = Task(
    key="imagenet-1k",
    name="ImageNet-1k",
    id="ILSVRC/imagenet-1k",
    description="validation images of 1000 classes",
    source=(
        "download image-net.org's or Kaggle's imagenet-object-localization-challenge, with folders of classes in val/ "
        "or with LOC_val_solution.csv; or pass ILSVRC/imagenet-1k on the Hub, which needs an account."
    ),
    rows=rows,
    options=("num_images", "split", *TABLE_OPTIONS, "label_column", "class_names"),
    num_images=50_000,
    split="validation",
    hub_id="ILSVRC/imagenet-1k",
)
