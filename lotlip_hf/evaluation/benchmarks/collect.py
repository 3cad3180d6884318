"""What a benchmark is, what its reader yields, and how the rows become a data set to score."""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

from ...data.sentences import split_full_stops
from ...images import ImageSource
from ..tasks import ClassificationData, IncompleteDataError, RetrievalData
from .files import ImageFinder, shown

logger = logging.getLogger(__name__)

NORMALIZATION = 'split at line ends, "</s>" and full stops; stripped; joined with ". "'
# Of tasks that are read from tables too: on the Hub, or in a folder.
TABLE_OPTIONS = ("revision", "config", "image_column")


@dataclass(frozen=True)
class Options:
    """
    The options of [`~lotlip_hf.evaluation.benchmarks.registry.load_benchmark`]; with `None` the task decides.

    Args:
        num_images (`int`, *optional*):
            Take the first so many only, in the order of the benchmark; the results say so. Of folders by class the
            first image of each class is taken, then the second, and so on; a table that is sorted by class gives its
            first classes alone. For `scenes` it is how many there are (500).
        split (`str`, *optional*): the split; by default the one that is commonly reported.
        revision (`str`, *optional*): branch, tag or commit of a data set on the Hub.
        config (`str`, *optional*): configuration of a data set on the Hub that has several.
        image_column (`str`, *optional*): column of the images, in tables and records.
        text_column (`str`, *optional*): column of the texts: one, or a list of them.
        label_column (`str`, *optional*): column of the classes: numbers or names.
        class_names (`str` or `os.PathLike`, *optional*):
            A file with a class name in each line, in the order of the classes; or `"openai"` for the names that CLIP
            was evaluated with on ImageNet, as open_clip holds them. By default those of the data.
        captions (`str`, *optional*):
            In `retrieval` and `scenes`: `"long"` (the default) takes the first long caption of each image, `"all"`
            every one, `"short"` the short caption.
        normalize (`bool`, *optional*):
            Whether captions go through [`normalize_caption`]. By default all do but short ones.
        image_root (`str` or `os.PathLike`, *optional*):
            The folder that images must lie in, links followed; by default the data's own.
        max_record_bytes (`int`, *optional*):
            In `retrieval`: as in [`~lotlip_hf.data.records.load_records`].
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
    An image of a benchmark, with its texts or its class.

    Args:
        name (`str`): what messages call the image.
        images (`Sequence[Path]`): the files that it may be, the first that is there counts.
        load (`Callable`, *optional*): gives the image, where it is no file of its own.
        texts (`Sequence[str | None]`): its captions; `None` for one that is missing.
        label (`int`, *optional*): the index of its class.
    """

    name: str
    images: Sequence[Path] = ()
    load: Callable[[], ImageSource] | None = None
    texts: Sequence[str | None] = ()
    label: int | None = None


@dataclass(frozen=True)
class Task:
    """
    A benchmark.

    Args:
        key (`str`): what `--task` calls it.
        name (`str`): what a table calls it.
        id (`str`): what its data set is called on the Hub, or a name of its own.
        description (`str`): what is scored, in a line.
        source (`str`): where to get it, and how its folder is laid out.
        rows (`Callable[[Source], Iterator[Row]]`): its reader.
        options (`tuple[str, ...]`): the names of the [`Options`] that it has.
        num_images (`int`, *optional*): images of the whole; fewer are refused.
        num_texts (`int`, *optional*): texts of the whole; fewer are refused.
        captions_per_image (`int`, *optional*): texts of each image; fewer are refused.
        normalize (`bool`, *optional*, defaults to `True`): whether its captions are normalised by default.
        split (`str`, *optional*): the split that it is scored on.
        hub_id (`str`, *optional*): the data set on the Hub that is read if no data is given.
        hub_revision (`str`, *optional*): the revision of it.
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
    """The names of the classes, and where they come from."""

    names: list[str]
    source: str


@dataclass
class Source:
    """
    What a task is read from, and what its reader learns of it.

    Args:
        task, data, options: as `load_benchmark` was given them.
        where (`str`): what messages call it.
        roots (`tuple[str, ...]`): the folders that images must lie in.
        id, name, split, revision: of the data, if not the task's.
        protocol (`dict[str, Any]`): how the rows were chosen.
        classes (`ClassNames`, *optional*): of a classification task.
        known (`Collection[str]`, *optional*):
            Names of image files that are of the benchmark, scored or not: other images beside them are told of.
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
        """Whether all of the split that is commonly reported is to be scored."""
        return self.options.num_images is None and self.options.split in (None, self.task.split)

    def folder(self) -> Path:
        """The folder that was given."""
        if not os.path.isdir(self.data or ""):
            raise FileNotFoundError(f"{self.data}: no such folder. {self.task.name}: {self.where_to_get_it}")
        for option in (*TABLE_OPTIONS, "text_column", "label_column"):
            if getattr(self.options, option) is not None:
                raise ValueError(f"`{option}` is for data sets on the Hub and tables, and {self.data} is neither.")
        self.where = self.data or ""
        self.roots = (os.fspath(self.options.image_root or self.where),)
        self.split = self.options.split or self.task.split
        return Path(self.where)

    def file(self, *names: str) -> Path:
        """The first of these files in the folder that is there."""
        folder = self.folder()
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise self.incomplete(f"{folder} holds no {names[0]}, neither at the top nor where else it may be")

    def check_split(self, splits: Iterable[str]) -> str:
        """The split to read, if it is one of those that there are."""
        splits = sorted(set(splits))
        if self.split not in splits:
            raise ValueError(f"`split`: {self.where} has no {self.split!r}; it has {', '.join(splits)}.")
        return self.split

    @property
    def where_to_get_it(self) -> str:
        """A sentence for messages."""
        return f"Where to get it: {self.task.source}"

    def incomplete(self, problem: str, *, first_alone: bool = False) -> IncompleteDataError:
        """The error for what is missing; with `first_alone` it tells of `num_images`, which may do without."""
        advice = " To score the first N images alone: num_images=N (--num-images N)." if first_alone else ""
        return IncompleteDataError(
            f"{self.task.name} is not complete: {problem}. Nothing is scored on what is there. "
            f"{self.where_to_get_it}{advice}"
        )


class LazyImages(Sequence[ImageSource]):
    """
    Images of which some are read when they are asked for.

    Args:
        images (`Sequence`): paths, and functions that give an image.
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
    Normalises a caption as the official LoTLIP evaluation does: split at every line end, `</s>` and full stop, those
    of abbreviations and numbers included; strip; drop what is empty; join with `". "`.

    Args:
        text (`str`): a caption.

    Returns:
        `str`: the caption, without a full stop at its end; empty if nothing else was in it.

    Example:

    ```python
    >>> normalize_caption("A 3.5 m boat...\\nIt is red. ")
    'A 3. 5 m boat. It is red'
    ```
    """
    return ". ".join(split_full_stops(text))


def collect(source: Source) -> RetrievalData | ClassificationData:
    """
    The rows of a benchmark as a data set: images are found, captions normalised, and what is missing is an error.

    Args:
        source (`Source`): what to read.

    Returns:
        `RetrievalData` or `ClassificationData`.

    Raises:
        IncompleteDataError: if images, captions or classes are missing; it names the first of each.
    """
    task, options = source.task, source.options
    try:
        rows = list(islice(task.rows(source), options.num_images))
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # of another form than the reader takes
        raise source.incomplete(f"its files are not as published ({type(error).__name__}: {error})") from error
    _check_count(source, len(rows))
    missing: dict[str, list[str]] = {}
    finder = ImageFinder(source.roots)
    images: list[Any] = [row.load or finder.find(*row.images) for row in rows]
    for row, image in zip(rows, images, strict=True):
        if image is None:
            name = os.path.relpath(row.images[0], source.data) if row.images else row.name
            missing.setdefault("images", []).append(name)
        if source.classes is not None and row.label is None:
            missing.setdefault("classes", []).append(row.name)
    texts, text_to_image = [], []
    normalize = task.normalize and options.captions != "short" if options.normalize is None else options.normalize
    for index, row in enumerate(rows if source.classes is None else ()):
        if len(row.texts) < (task.captions_per_image or 1):
            wanted = task.captions_per_image
            said = f"{row.name}: {len(row.texts)} of {wanted}" if wanted else row.name
            missing.setdefault("captions", []).append(said)
        for text in row.texts:
            text = normalize_caption(text) if normalize and text is not None else text
            if text is None or not text.strip():
                missing.setdefault("captions", []).append(f"{row.name}: {'none' if text is None else 'empty'}")
                continue
            texts.append(text)
            text_to_image.append(index)
    if missing:
        lacks = (f"{len(names)} {kind} are missing ({shown(names)})" for kind, names in missing.items())
        raise source.incomplete(f"of {len(rows)} images, {', and '.join(lacks)}", first_alone=True)
    if source.known is not None and options.num_images is None:
        _tell_of_others(source, finder, images)
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
    if source.classes is not None:
        labels = [cast(int, row.label) for row in rows]
        if wrong := sorted({label for label in labels if not 0 <= label < len(source.classes.names)}):
            raise ValueError(f"{source.where}: class {wrong[0]}, and there are {len(source.classes.names)} names.")
        source.protocol["class_names"] = source.classes.source
        return ClassificationData(labels=labels, class_names=source.classes.names, **common)
    if source.is_whole and task.num_texts is not None and len(texts) < task.num_texts:
        problem = f"its {len(rows)} images have {len(texts)} texts, not {task.num_texts}"
        raise source.incomplete(problem, first_alone=True)
    source.protocol["normalization"] = NORMALIZATION if normalize else None
    source.protocol["num_duplicate_texts"] = len(texts) - len(set(texts))
    return RetrievalData(texts=texts, text_to_image=text_to_image, **common)


def _check_count(source: Source, count: int) -> None:
    wanted, expected = source.options.num_images, source.task.num_images if source.is_whole else None
    if count < (least := wanted or expected or 1):
        raise source.incomplete(f"{source.where} has {count} images of {least}", first_alone=True)
    if expected is not None and count > expected:
        logger.warning("%s has %d images, not the %d that are reported on.", source.where, count, expected)


def _tell_of_others(source: Source, finder: ImageFinder, images: Sequence[Any]) -> None:
    """Logs images beside those of the benchmark."""
    paths = [Path(image) for image in images if isinstance(image, str)]
    known = {*(path.name for path in paths), *(source.known or ())}
    for folder in sorted({path.parent for path in paths}):
        if others := finder.others(folder, known):
            logger.warning(
                "%s: %d images are not of the benchmark and left out: %s.", folder, len(others), shown(others)
            )
