"""Benchmark tasks, the rows of their readers, and the conversion of rows to a data set."""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

from ...data.sentences import split_full_stops
from ...images import ImageSource
from ..tasks import ClassificationData, Data, IncompleteDataError, Part, PromptData, RetrievalData, SegmentationData
from .files import ImageFinder, shown

logger = logging.getLogger(__name__)

NORMALIZATION = 'split at line ends, "</s>" and full stops; stripped; joined with ". "'
# Options of tasks that can also be read from tables, on the Hub or in a folder.
TABLE_OPTIONS = ("revision", "config", "image_column")


@dataclass(frozen=True)
class Options:
    """
    Options of [`~lotlip_hf.evaluation.benchmarks.registry.load_benchmark`]. `None` selects the default of the task.

    Args:
        num_images (`int`, *optional*): Use only the first images of the benchmark; the results record this number.
            From folders of classes, the first image of each class is used, then the second, and so on. From a table
            sorted by class, only the first classes are used. For `scenes`, the number of scenes (500 by default).
        split (`str`, *optional*): Split. Defaults to the split that papers report.
        revision (`str`, *optional*): Branch, tag or commit of a data set on the Hub.
        config (`str`, *optional*): Configuration of a data set on the Hub.
        image_column (`str`, *optional*): Column of the images in a table or records.
        text_column (`str`, *optional*): Column of the texts, with a text or a list of texts.
        label_column (`str`, *optional*): Column of the classes, with numbers or names.
        class_names (`str` or `os.PathLike`, *optional*): A file with one class name per line, in the order of the
            classes, or `"openai"` for CLIP's names of the ImageNet classes, which need open_clip. Defaults to the
            names in the data.
        captions (`str`, *optional*): For `retrieval` and `scenes`: `"long"` (the default) for the first long caption
            of each image, `"all"` for all long captions, or `"short"` for the short caption.
        normalize (`bool`, *optional*): Whether to normalise captions with [`normalize_caption`]. Defaults to `True`
            for long captions and `False` for short ones.
        image_root (`str` or `os.PathLike`, *optional*): Folder that must contain the images, after links are resolved.
            Defaults to the folder of the data.
        max_record_bytes (`int`, *optional*): Maximum size of a record for `retrieval`, as in
            [`~lotlip_hf.data.records.load_records`].
    """

    num_images: int | None = None
    split: str | None = None
    revision: str | None = None
    config: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    class_names: str | os.PathLike | None = None
    captions: str | None = None
    normalize: bool | None = None
    image_root: str | os.PathLike | None = None
    max_record_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """
    An image of a benchmark, with its texts, its class, its mask or the parts of its prompt.

    Args:
        name (`str`): Name of the image in messages.
        images (`Sequence[Path]`, *optional*): Candidate paths of the image; the first path that exists is used.
        load (`Callable`, *optional*): Function that returns the image if it is not a separate file.
        texts (`Sequence[str | None]`, *optional*): Captions; `None` for a missing caption.
        label (`int`, *optional*): Index of its class.
        mask (`Path`, *optional*): PNG file of the class of each pixel.
        parts (`Sequence[Part]`, *optional*): Parts of its only text, which is a prompt.
    """

    name: str
    images: Sequence[Path] = ()
    load: Callable[[], ImageSource] | None = None
    texts: Sequence[str | None] = ()
    label: int | None = None
    mask: Path | None = None
    parts: Sequence[Part] | None = None


@dataclass(frozen=True)
class Task:
    """
    A benchmark.

    Args:
        key (`str`): Name for `--task`.
        name (`str`): Name for tables.
        id (`str`): Hub id of its data set, or another identifier.
        description (`str`): One-line description.
        source (`str`): Where to download it, and the layout of its folder.
        rows (`Callable[[Source], Iterator[Row]]`): Its reader.
        options (`tuple[str, ...]`): Names of the [`Options`] that it supports.
        num_images (`int`, *optional*): Number of images; fewer are an error.
        num_texts (`int`, *optional*): Number of texts; fewer are an error.
        captions_per_image (`int`, *optional*): Number of texts of each image; fewer are an error.
        normalize (`bool`, *optional*, defaults to `True`): Whether its captions are normalised by default.
        split (`str`, *optional*): Split that papers report.
        hub_id (`str`, *optional*): Data set on the Hub that is read if no data is passed.
        hub_revision (`str`, *optional*): Revision of `hub_id`.
    """

    key: str
    name: str
    id: str
    description: str
    source: str
    rows: "Callable[[Source], Iterator[Row]]"
    options: tuple[str, ...]
    num_images: int | None = None
    num_texts: int | None = None
    captions_per_image: int | None = None
    normalize: bool = True
    split: str | None = None
    hub_id: str | None = None
    hub_revision: str | None = None


class ClassNames(NamedTuple):
    """Names of the classes, and a description of their origin."""

    names: list[str]
    source: str


@dataclass
class Source:
    """
    The data of a task. `load_benchmark` sets `task`, `data` and `options`; the reader sets the other fields. `id`,
    `name`, `split` and `revision` replace those of the task.

    Args:
        where (`str`): Name of the data in messages.
        roots (`tuple[str, ...]`): Folders that must contain the images.
        protocol (`dict[str, Any]`): Settings that determine the rows.
        classes (`ClassNames`, *optional*): Classes of a classification task.
        known (`Collection[str]`, *optional*): Names of all image files of the benchmark. A warning lists other images
            in the same folders.
    """

    task: Task
    data: str | None
    options: Options
    where: str = ""
    roots: tuple[str, ...] = ()
    id: str | None = None
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    classes: ClassNames | None = None
    known: Collection[str] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the evaluation covers the whole split that papers report."""
        return self.options.num_images is None and self.options.split in (None, self.task.split)

    def folder(self) -> Path:
        """Returns the folder in `data`, and sets the fields that depend on it."""
        if not os.path.isdir(self.data or ""):
            raise FileNotFoundError(f"{self.data}: no such folder. Pass the folder of {self.task.name}. {self.advice}")
        for option in (*TABLE_OPTIONS, "text_column", "label_column"):
            if getattr(self.options, option) is not None:
                raise ValueError(f"`{option}` is only for data sets on the Hub and tables. Omit it for {self.data}.")
        self.where = self.data or ""
        self.roots = (os.fspath(self.options.image_root or self.where),)
        self.split = self.options.split or self.task.split
        return Path(self.where)

    def file(self, *names: str) -> Path:
        """Returns the first of these files that exists in the folder."""
        folder = self.folder()
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise self.incomplete(f"{folder} contains none of {', '.join(names)}")

    def check_split(self, splits: Iterable[str]) -> str:
        """Returns the split to read, or raises an error if it does not exist."""
        splits = sorted(set(splits))
        if self.split not in splits:
            raise ValueError(f"{self.where} has no split {self.split!r}. Pass `--split` {' or '.join(splits)}.")
        return self.split

    @property
    def advice(self) -> str:
        """Advice on how to get the data."""
        return f"Where to get it: {self.task.source}"

    def incomplete(self, problem: str, *, suggest_part: bool = False) -> IncompleteDataError:
        """Makes the error for incomplete data; with `suggest_part`, its message suggests `num_images`."""
        part = " To score only the first N images, pass num_images=N (--num-images N)." if suggest_part else ""
        return IncompleteDataError(
            f"{self.task.name} is incomplete, so nothing is scored: {problem}. {self.advice}{part}"
        )


class LazyImages(Sequence[ImageSource]):
    """
    A sequence of images. An item that is a function is called on access and returns the image.

    Args:
        images (`Sequence`): Paths, and functions that return an image.
    """

    def __init__(self, images: Sequence[str | Callable[[], ImageSource]]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        image = self._images[index]
        return image() if callable(image) else image


def normalize_caption(text: str) -> str:
    """
    Normalises a caption like the official LoTLIP evaluation: splits it at every line end, `</s>` and full stop (also
    in abbreviations and numbers), strips the parts, and joins those that are not empty with `". "`.

    Args:
        text (`str`): The caption.

    Returns:
        `str`: The normalised caption without a final full stop, or `""` if no part is left.

    Example:

    ```python
    >>> normalize_caption("A 3.5 m boat...\\nIt is red. ")
    'A 3. 5 m boat. It is red'
    ```
    """
    return ". ".join(split_full_stops(text))


def collect(source: Source) -> Data:
    """
    Reads a benchmark, finds its images and normalises its captions.

    Args:
        source (`Source`): The data of the task.

    Returns:
        `RetrievalData`, `ClassificationData`, `SegmentationData` or `PromptData`: The data set.

    Raises:
        `IncompleteDataError`: If images, captions or classes are missing; the message names the first of each.
        `ValueError`: If a class has no name.
    """
    task, options = source.task, source.options
    try:
        rows = list(islice(task.rows(source), options.num_images))
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # JSON of an unexpected structure
        raise source.incomplete(f"a file is not in the published format ({type(error).__name__}: {error})") from error
    _check_count(source, len(rows))
    missing: dict[str, list[str]] = {}
    finder = ImageFinder(source.roots)
    images: list[Any] = [row.load or finder.find(*row.images) for row in rows]
    for row, image in zip(rows, images, strict=True):
        if image is None:
            name = os.path.relpath(row.images[0], source.roots[0]) if row.images else row.name
            missing.setdefault("images", []).append(name)
        if source.classes is not None and row.label is None and row.mask is None:
            missing.setdefault("classes", []).append(row.name)
    texts, text_to_image = [], []
    normalize = task.normalize and options.captions != "short" if options.normalize is None else options.normalize
    for index, row in enumerate(rows if source.classes is None else ()):
        if len(row.texts) < (task.captions_per_image or 1):
            wanted = task.captions_per_image
            missing.setdefault("captions", []).append(
                f"{row.name}: {len(row.texts)} of {wanted}" if wanted else row.name
            )
        for text in row.texts:
            text = normalize_caption(text) if normalize and text is not None else text
            if text is None or not text.strip():
                missing.setdefault("captions", []).append(f"{row.name}: {'none' if text is None else 'empty'}")
                continue
            texts.append(text)
            text_to_image.append(index)
    if missing:
        parts = (f"{len(names)} {kind} are missing ({shown(names)})" for kind, names in missing.items())
        raise source.incomplete(f"of {len(rows)} images, {', and '.join(parts)}", suggest_part=True)
    if source.known is not None and options.num_images is None:
        _warn_of_others(source, finder, images)
    common: dict[str, Any] = {
        "id": source.id or task.id,
        "name": source.name or task.name,
        "images": LazyImages(images) if any(map(callable, images)) else images,
        "image_names": [row.name for row in rows],
        "split": source.split,
        "revision": source.revision,
        "protocol": source.protocol,
    }
    if options.num_images is not None:
        source.protocol["first_images"] = options.num_images
    masks = [row.mask for row in rows if row.mask is not None]
    if source.classes is not None and masks:
        source.protocol["class_names"] = source.classes.source
        return SegmentationData(masks=masks, class_names=source.classes.names, **common)
    if source.classes is not None:
        labels = [cast(int, row.label) for row in rows]
        if wrong := sorted({label for label in labels if not 0 <= label < len(source.classes.names)}):
            raise ValueError(
                f"{source.where} has class {wrong[0]}, but only {len(source.classes.names)} names. Pass `class_names` "
                "(--class-names)."
            )
        source.protocol["class_names"] = source.classes.source
        return ClassificationData(labels=labels, class_names=source.classes.names, **common)
    parts = [row.parts for row in rows if row.parts is not None]
    if parts:
        return PromptData(prompts=texts, parts=parts, **common)
    if source.is_whole and task.num_texts is not None and len(texts) < task.num_texts:
        problem = f"its {len(rows)} images have {len(texts)} texts instead of {task.num_texts}"
        raise source.incomplete(problem, suggest_part=True)
    source.protocol["normalization"] = NORMALIZATION if normalize else None
    source.protocol["num_duplicate_texts"] = len(texts) - len(set(texts))
    return RetrievalData(texts=texts, text_to_image=text_to_image, **common)


def _check_count(source: Source, count: int) -> None:
    wanted, expected = source.options.num_images, source.task.num_images if source.is_whole else None
    if count < (least := wanted or expected or 1):
        raise source.incomplete(f"{source.where} has {count} of {least} images", suggest_part=True)
    if expected is not None and count > expected:
        logger.warning("%s has %d images; published results use %d.", source.where, count, expected)


def _warn_of_others(source: Source, finder: ImageFinder, images: Sequence[Any]) -> None:
    """Warns of images that are in the folders but not in the benchmark."""
    paths = [Path(image) for image in images if isinstance(image, str)]
    known = {*(path.name for path in paths), *(source.known or ())}
    for folder in sorted({path.parent for path in paths}):
        if others := finder.others(folder, known):
            logger.warning(
                "%s: %d images do not belong to the benchmark and are ignored: %s.", folder, len(others), shown(others)
            )
