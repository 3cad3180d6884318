"""ImageNet-V2 (matched-frequency): new images of the ImageNet classes, in folders 0 to 999."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .classes import class_folders, evenly, images_by_class, name_classes, read_class_names
from .collect import TABLE_OPTIONS, Row, Source, Task
from .files import shown
from .imagenet import NUM_CLASSES
from .tables import is_table, table_classes


def rows(source: Source) -> Iterator[Row]:
    """Yields the images with their classes."""
    if is_table(source):
        yield from table_classes(source)
        return
    folder = source.folder()
    source.check_split(["test"])
    names = ("", "imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency")
    root = next((one for name in names if (one := folder / name).is_dir() and _numbered(one)), None)
    if root is None:
        raise source.incomplete(f"{folder} does not contain the folders 0, 1, 2, ...")
    classes = _numbered(root)
    expected = NUM_CLASSES if source.is_whole else int(classes[-1]) + 1
    if missing := [str(number) for number in range(expected) if str(number) not in set(classes)]:
        raise source.incomplete(f"{root} lacks {len(missing)} of the folders 0 to {expected - 1}: {shown(missing)}")
    found = images_by_class(source, root, classes)
    counts = Counter(classes[row.label or 0] for row in found)
    per_class = (source.task.num_images or 0) // NUM_CLASSES
    short = [f"{name} has {count}" for name, count in counts.items() if count < per_class]
    if short and source.is_whole:
        raise source.incomplete(f"each folder in {root} must have {per_class} images, but {shown(short)}")
    beside = next((file for one in (root, root.parent) if (file := one / "classnames.txt").is_file()), None)
    own = None if beside is None else read_class_names(beside)
    name_classes(source, own, "classnames.txt", len(classes))
    yield from evenly(source, sorted(found, key=lambda row: (row.label, row.images[0])))


def _numbered(folder: Path) -> list[str]:
    return sorted((name for name in class_folders(folder) if name.isdecimal()), key=int)


TASK = Task(
    key="imagenet-v2",
    name="ImageNet-V2",
    id="vaishaal/ImageNetV2",
    description="new images of the ImageNet classes, matched-frequency",
    source=(
        "download and unpack imagenetv2-matched-frequency.tar.gz from vaishaal/ImageNetV2 on the Hub, or pass "
        "clip-benchmark/wds_imagenetv2, which is on the Hub."
    ),
    rows=rows,
    options=("num_images", "split", *TABLE_OPTIONS, "label_column", "class_names"),
    num_images=10_000,
    split="test",
    hub_id="clip-benchmark/wds_imagenetv2",
)
