"""
Benchmarks, read from the folders that their publishers ship and from the Hub.

`TASKS` holds them by name, and [`load_benchmark`] reads any of them. A data set that lacks images or captions is
refused with what is missing; only `num_images` makes a smaller one, and the results say so.
"""

import csv
import logging
import os
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, cast

from datasets import (
    ClassLabel,
    Dataset,
    Image,
    IterableDataset,
    Value,
)
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    RemoteEntryNotFoundError,
)

from ...data.readers import every_row
from ...data.records import (
    ColumnError,
    ColumnMapping,
    check_inside,
    find_files,
    is_hub_name,
    load_records,
    read_table,
)
from ...files import MAX_BYTES
from ...images import ImageSource, find_images
from ...scenes.dataset import long_captions, render, scene, short_caption
from ..tasks import ClassificationData, RetrievalData
from ..zero_shot import open_clip_metadata
from .sources import (
    SAVED_DATASET,
    SPLIT_NAMES,
    Gaps,
    ImageFinder,
    LazyImages,
    Options,
    Table,
    Task,
    caption_of,
    data_folder,
    field_of,
    find_column,
    find_file,
    first_of,
    from_hub,
    hub_archive,
    hub_commit,
    image_roots,
    incomplete,
    is_image_name,
    is_table,
    open_table,
    read_bytes,
    read_json,
    read_table_texts,
    read_text,
    retrieval_data,
    shown,
    stored_image,
    string_of,
    table_images,
    tell_of_others,
)

logger = logging.getLogger(__name__)

CAPTIONS_PER_IMAGE = 5  # of MSCOCO and Flickr30k; a few images have more, which nobody counts
IMAGENET_CLASSES = 1000
WNID = re.compile(r"n\d{8}")
# Of a retrieval task, beside scoring it.
STUDIES = {
    "length-study": "a retrieval task's recall with its texts cut at one limit of tokens after the other",
    "sentence-ablation": "a retrieval task's recall with its texts less one of their sentences",
}
# Of tasks that are read from tables too: on the Hub, or in a folder.
TABLE_OPTIONS = ("revision", "config", "image_column")


def load_benchmark(
    task: str,
    data: str | os.PathLike | None = None,
    *,
    num_images: int | None = None,
    split: str | None = None,
    revision: str | None = None,
    config: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    class_names: str | os.PathLike | None = None,
    captions: str | None = None,
    normalize: bool | None = None,
    image_root: str | os.PathLike | None = None,
    max_record_bytes: int | None = None,
) -> RetrievalData | ClassificationData:
    """
    Reads a benchmark: images with their texts, or with their classes.

    Each task has some of the options; one that it does not have is refused.

    Args:
        task: A name in `TASKS`, such as `"iiw"`.
        data: The folder that the data set was unpacked to, the publisher's own or the one around it; or the name of a
            data set on the Hub (`owner/name`). By default the task's own on the Hub, where there is one.
        num_images: Take the first so many only, in the order of the benchmark; the results say so. Of folders by class
            the first image of each class is taken, then the second, and so on; a table that is sorted by class gives
            its first classes alone. For `scenes` it is how many there are (500).
        split: Which split; by default the one that is commonly reported.
        revision: Branch, tag or commit of a data set on the Hub.
        config: Configuration of a data set on the Hub that has several.
        image_column: Column of the images, in tables and records.
        text_column: Column of the texts: one, or a list of them.
        label_column: Column of the classes: numbers or names.
        class_names: A file with a class name in each line, in the order of the classes; or `"openai"` for the names
            that CLIP was evaluated with on ImageNet, as open_clip holds them. By default those of the data.
        captions: In `retrieval` and `scenes`: `"long"` (the default) takes the first long caption of each image,
            `"all"` every one, `"short"` the short caption.
        normalize: Whether captions go through [`~lotlip_hf.evaluation.benchmarks.sources.normalize_caption`].
            By default all do but short ones.
        image_root: The folder that images must lie in, links followed; by default the data's own.
        max_record_bytes: In `retrieval`: as in [`~lotlip_hf.data.records.load_records`].

    Returns:
        The data, with what was chosen in its `protocol`.

    Raises:
        IncompleteDataError: if images, captions or classes are missing. It says which, and where to get them.
        FileNotFoundError: if there is no such folder.
        ImportError: if `class_names` is `"openai"` and open_clip is not installed.
        ValueError: if a file cannot be read, an argument is none that the task has, or the Hub does not give the data.

    Example:

    ```python
    >>> from lotlip_hf.evaluation.benchmarks.registry import load_benchmark

    >>> data = load_benchmark("scenes", num_images=8)
    >>> len(data.images), len(data.texts), list(data.text_to_image)
    (8, 8, [0, 1, 2, 3, 4, 5, 6, 7])
    >>> iiw = load_benchmark("iiw", "path/to/iiw")  # doctest: +SKIP
    ```
    """
    if task not in TASKS:
        raise ValueError(
            f"`task` (--task) must be one of {', '.join(TASKS)}, or on the command line a study of a retrieval task, "
            f"which --benchmark names: {', '.join(STUDIES)}; got {task!r}."
        )
    options = Options(
        num_images=num_images,
        split=split,
        revision=revision,
        config=config,
        image_column=image_column,
        text_column=text_column,
        label_column=label_column,
        class_names=None if class_names is None else os.fspath(class_names),
        captions=captions,
        normalize=normalize,
        image_root=None if image_root is None else os.fspath(image_root),
        max_record_bytes=max_record_bytes,
    )
    has = TASKS[task].options if task == "scenes" else (*TASKS[task].options, "image_root")
    for option, value in vars(options).items():
        if value is not None and option not in has:
            raise ValueError(f"`{option}` is no option of {task}; it has {', '.join(has)}.")
    if num_images is not None and num_images < 1:
        raise ValueError(f"`num_images` must be at least 1, got {num_images}.")
    if captions is not None and captions not in ("long", "all", "short"):
        raise ValueError(f'`captions` must be "long", "all" or "short", got {captions!r}.')
    return TASKS[task].reader(TASKS[task], None if data is None else os.fspath(data), options)


def describe_tasks() -> str:
    """
    What can be evaluated, for a list on the command line.

    Returns:
        A line for each task, its key and what is scored, and for each study of a retrieval task.

    Example:

    ```python
    >>> print(describe_tasks().splitlines()[1])
    iiw                long captions by people: IIW-400, DCI-Test and DOCCI-Test
    ```
    """
    described = {key: task.description for key, task in TASKS.items()} | STUDIES
    width = max(map(len, described)) + 2
    return "\n".join(f"{key:{width}}{description}" for key, description in described.items())


# Long captions.


DCI_CAPTIONS = ("short_caption", "extra_caption")


def _read_dci(task: Task, data: str | None, options: Options) -> RetrievalData:
    folder, split = data_folder(task, data), options.split or "all"
    places = ("", "densely_captioned_images", "data/densely_captioned_images")
    splits_file = find_file(task, folder, *(os.path.join(place, "splits.json") for place in places))
    splits = read_json(splits_file)
    if not isinstance(splits, dict) or not all(map(_is_list_of_strings, splits.values())):
        raise ValueError(f"{splits_file}: expected lists of the names of annotation files by split.")
    if split not in ("all", *splits):
        raise ValueError(f"`split` must be all, {' or '.join(splits)}, got {split!r}.")
    listed = [name for key, own in splits.items() if split in ("all", key) for name in own]
    files = first_of(task, options, listed, str(splits_file))
    root, finder, gaps = splits_file.parent, ImageFinder(image_roots(folder, options)), Gaps(task)
    images, names, texts = [], [], []
    for file in files:
        path = root / "annotations" / file
        if not path.is_file():
            gaps.add("annotation files", f"annotations/{file}")
            continue
        annotation = read_json(path)
        names.append(f"photos/{string_of(annotation, 'image', path)}")
        parts = [caption_of(field_of(annotation, key, path), f"{path}, {key}") for key in DCI_CAPTIONS]
        texts.append([None if None in parts else "\n".join(cast(list[str], parts))])
        images.append(finder.find(root / names[-1]))
        if images[-1] is None:
            gaps.add("images", names[-1])
    gaps.refuse(len(files))
    if options.num_images is None and split == "all":
        tell_of_others(finder.others(root / "photos", [Path(name).name for name in names]), str(root / "photos"))
    return retrieval_data(
        task,
        options,
        gaps,
        images,
        names,
        texts,
        split=split,
        protocol={"captions": "short_caption, a line end, extra_caption"},
    )


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


# Of each part of ImageInWords: where its images may lie, as LoTLIP's evaluation lays them and as they are unpacked.
IIW_PARTS = {
    "DOCCI_Test": ("docci", "docci/images", "images"),
    "IIW-400": ("docci_aar", "docci/images_aar", "images_aar"),
    "DCI_Test": ("dci", "dci/densely_captioned_images/photos", "densely_captioned_images/photos", "photos"),
}


def _read_iiw(task: Task, data: str | None, options: Options) -> RetrievalData:
    folder = data_folder(task, data)
    rows = []
    for part in IIW_PARTS:
        places = ("", "datasets", "imageinwords", "imageinwords/datasets")
        file = find_file(task, folder, *(os.path.join(place, part, "data.jsonl") for place in places))
        for number, row in enumerate(every_row(file), start=1):
            where = f"{file}, entry {number}"
            key = string_of(row, "image" if "image" in row else "image/key", where)
            rows.append((part, key, caption_of(field_of(row, "IIW", where), where)))
    rows = first_of(task, options, rows, str(folder))
    finder, gaps, renamed = ImageFinder(image_roots(folder, options)), Gaps(task), []
    images, names = [], []
    for part, key, _ in rows:
        name = key if ".jpg" in key else f"{key}.jpg"
        image = finder.find(*(folder / place / name for place in IIW_PARTS[part]))
        if image is None and part == "IIW-400":
            # The images came to be split anew: LoTLIP's evaluation takes those of the same number, and so do we.
            image = finder.find(*(folder / place / name.replace("test", "train") for place in IIW_PARTS[part]))
            renamed += [name] if image else []
        if image is None:
            gaps.add("images", f"{IIW_PARTS[part][0]}/{name}")
        images.append(image)
        names.append(f"{part}/{name}")
    protocol: dict[str, Any] = {"captions": "IIW", "parts": list(IIW_PARTS)}
    if renamed:
        protocol["images_named_train"] = len(renamed)
        logger.warning("%d images of IIW-400 are there as train, not test: %s.", len(renamed), shown(renamed))
    return retrieval_data(
        task,
        options,
        gaps,
        images,
        names,
        [[text] for _, _, text in rows],
        protocol=protocol,
    )


def _read_sharegpt4v(task: Task, data: str | None, options: Options) -> RetrievalData:
    folder = data_folder(task, data)
    files = ("share4v_sam_10k.json", "share-captioner_coco_lcs_sam_1246k_1107.json")
    places = [os.path.join(place, file) for place in ("", "share4v", "data", "data/share4v") for file in files]
    file = find_file(task, folder, *places)
    wanted = options.num_images or cast(int, task.num_images)
    entries = []
    for entry in every_row(file):
        name = string_of(entry, "image", f"{file}, entry {entry.get('id')}")
        if not re.fullmatch(r"sa_\d+\.jpg", os.path.basename(name)):
            continue  # of COCO and LAION
        conversation = field_of(entry, "conversations", f"{file}, {name}")
        try:
            text = conversation[1]["value"]
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, {name}: there is no conversations[1].value.") from error
        entries.append((name, caption_of(text, f"{file}, {name}")))
        if len(entries) == wanted:
            break
    entries = first_of(task, options, entries, f"{file} (the part of SAM)")
    finder, gaps, images = ImageFinder(image_roots(folder, options)), Gaps(task), []
    # SA-1B is unpacked to folders by the hundreds, which the names in the large file do not tell of
    shards = sorted(path for path in folder.glob("sa_*") if path.is_dir())
    for name, _ in entries:
        image = finder.find(folder / name, folder / "data" / name)
        if image is None:
            base = os.path.basename(name)
            where = (
                folder / "sam/images",
                folder / "images",
                folder,
                *(s / p for s in shards for p in ("images", "")),
            )
            image = finder.find(*(place / base for place in where))
        if image is None:
            gaps.add("images", name)
        images.append(image)
    return retrieval_data(
        task,
        options,
        gaps,
        images,
        [name for name, _ in entries],
        [[text] for _, text in entries],
        protocol={"captions": "conversations[1].value", "images": f"the first {len(entries)} of SAM in {file.name}"},
    )


def _read_urban1k(task: Task, data: str | None, options: Options) -> RetrievalData:
    commit, source = None, data
    if source is None or is_hub_name(source):
        repo_id = source or cast(str, task.hub_id)
        commit = hub_commit(repo_id, options.revision)
        source = hub_archive(repo_id, options.revision, commit)
    else:
        _refuse_table_options(data, options)
    if os.path.isfile(source) and zipfile.is_zipfile(source):
        folder: Path | zipfile.Path = zipfile.Path(source)
    else:
        folder = data_folder(task, source)
    inside = (folder, *(folder / name for name in ("Urban1k", "Urban-1k", "urban1k")))
    root = next((place for place in inside if (place / "caption").is_dir() and (place / "image").is_dir()), None)
    if root is None:
        raise incomplete(task, f"{source} holds no folders image/ and caption/")
    # by their names without extensions, which are numbers
    captions = {_stem(path): path for path in (root / "caption").iterdir() if path.name.lower().endswith(".txt")}
    pictures = {_stem(path): path for path in (root / "image").iterdir() if is_image_name(path.name)}
    ordered = sorted(captions, key=lambda stem: (not stem.isdecimal(), int(stem) if stem.isdecimal() else 0, stem))
    if without := sorted(pictures.keys() - captions.keys()):
        if options.num_images is None and len(ordered) < cast(int, task.num_images):
            Gaps(task, {"captions": [f"caption/{stem}.txt" for stem in without]}).refuse(cast(int, task.num_images))
        tell_of_others([pictures[stem].name for stem in without], str(root / "image"))
    stems = first_of(task, options, ordered, str(root / "caption"))
    gaps = Gaps(task)
    for stem in stems:
        if stem not in pictures:
            gaps.add("images", f"image/{stem}.jpg")
    gaps.refuse(len(stems))
    paths = [pictures[stem] for stem in stems]
    images: Sequence[ImageSource]
    if isinstance(root, Path):
        images = [str(path) for path in paths]
        for image in images:
            check_inside(image, image_roots(folder, options))
    else:
        images = LazyImages(len(paths), lambda place: read_bytes(paths[place]))
    return retrieval_data(
        task,
        options,
        gaps,
        images,
        [f"image/{path.name}" for path in paths],
        [[re.split("\r\n|\r|\n", read_text(captions[stem]), maxsplit=1)[0]] for stem in stems],
        protocol={"captions": "the first line of each file"},
        id=repo_id if commit else None,
        revision=commit,
    )


def _stem(path: Path | zipfile.Path) -> str:
    return unicodedata.normalize("NFC", os.path.splitext(path.name)[0])


def _read_docci(task: Task, data: str | None, options: Options) -> RetrievalData:
    split = options.split or "test"
    if is_hub_name(data) or (data is not None and os.path.isdir(data) and is_table(data)):
        return read_table_texts(
            task,
            options,
            open_table(task, data, options),
            lambda text: [text],
            ("description", "caption", "text"),
            protocol={},
        )
    _refuse_table_options(data, options)
    folder = data_folder(task, data)
    places = [os.path.join(place, "docci_descriptions.jsonlines") for place in ("", "docci", "data")]
    file = find_file(task, folder, *places)
    rows = list(every_row(file))
    for number, row in enumerate(rows, start=1):
        where = f"{file}, entry {number}"
        for key in ("split", "image_file"):
            string_of(row, key, where)
        caption_of(field_of(row, "description", where), where)
    if split not in (found := sorted({row["split"] for row in rows})):
        raise ValueError(f"`split`: {file} has no {split!r}; it has {', '.join(found)}.")
    chosen = first_of(task, options, [row for row in rows if row["split"] == split], str(file))
    finder, gaps = ImageFinder(image_roots(folder, options)), Gaps(task)
    images = []
    for row in chosen:
        images.append(finder.find(file.parent / "images" / row["image_file"], file.parent / row["image_file"]))
        if images[-1] is None:
            gaps.add("images", f"images/{row['image_file']}")
    others = finder.others(file.parent / "images", [row["image_file"] for row in rows])
    tell_of_others(others, str(file.parent / "images"))
    return retrieval_data(
        task,
        options,
        gaps,
        images,
        [row["image_file"] for row in chosen],
        [[row["description"]] for row in chosen],
        split=split,
        protocol={"captions": "description"},
    )


def _refuse_table_options(data: str | None, options: Options) -> None:
    for option in (*TABLE_OPTIONS, "text_column", "label_column"):
        if getattr(options, option) is not None:
            raise ValueError(f"`{option}` is for data sets on the Hub and tables, and {data} is neither.")


# Short captions.


def _read_karpathy(task: Task, data: str | None, options: Options) -> RetrievalData:
    """MSCOCO and Flickr30k, with Karpathy's split."""
    split = options.split or "test"
    protocol = {"captions": f"the first {CAPTIONS_PER_IMAGE} of each image"}
    if data is None or is_hub_name(data) or (os.path.isdir(data) and is_table(data)):
        table = open_table(task, data, options)
        if "split" in table.dataset.column_names:  # of all images in one split of the Hub
            rows = [place for place, value in enumerate(table.dataset["split"]) if value == split]
            table = table._replace(dataset=table.dataset.select(rows))
        return read_table_texts(
            task,
            options,
            table,
            partial(_five_captions, table.where),
            ("caption", "captions", "sentences", "txt", "text"),
            protocol=protocol,
            captions_per_image=CAPTIONS_PER_IMAGE,
            normalize=False,
        )
    _refuse_table_options(data, options)
    folder = data_folder(task, data)
    places = ("", "caption_datasets", "annotations", "karpathy")
    file = find_file(task, folder, *(os.path.join(place, f"dataset_{task.key}.json") for place in places))
    rows = field_of(read_json(file), "images", file)
    if not isinstance(rows, list):
        raise ValueError(f"{file}: expected a list of images, got {type(rows).__name__}.")
    for number, row in enumerate(rows):
        for key in ("split", "filename", *(["filepath"] if isinstance(row, Mapping) and "filepath" in row else [])):
            string_of(row, key, f"{file}, images[{number}]")
    if split not in (found := sorted({row["split"] for row in rows})):
        raise ValueError(f"`split`: {file} has no {split!r}; it has {', '.join(found)}.")
    chosen = first_of(task, options, [row for row in rows if row["split"] == split], str(file))
    finder, gaps = ImageFinder(image_roots(folder, options)), Gaps(task)
    images, names, texts = [], [], []
    for row in chosen:
        name = os.path.join(row.get("filepath", ""), row["filename"])
        places = (name, os.path.join("images", name))
        if "filepath" not in row:
            places = [os.path.join(f, name) for f in ("flickr30k-images", "flickr30k_images", "images", "")]
        image = finder.find(*(folder / place for place in places))
        where = f"{file}, {name}"
        captions = _five_captions(where, field_of(row, "sentences", where))
        if image is None:
            gaps.add("images", places[0])
        images.append(image)
        names.append(name)
        texts.append([caption_of(caption, where) for caption in captions])
    for used in sorted({Path(image).parent for image in images if image is not None}):
        tell_of_others(finder.others(used, [row["filename"] for row in rows]), str(used))
    return retrieval_data(
        task,
        options,
        gaps,
        images,
        names,
        texts,
        split=split,
        protocol=protocol,
        captions_per_image=CAPTIONS_PER_IMAGE,
        normalize=False,
    )


def _five_captions(where: str, value: Any) -> list[Any]:
    """The first five captions in a cell: a list of texts or of Karpathy's sentences, or lines of a text."""
    captions = [line for line in value.split("\n") if line.strip()] if isinstance(value, str) else value
    captions = [] if captions is None else captions
    if not isinstance(captions, list):
        raise ValueError(f"{where}: expected a list of captions, got {type(value).__name__}.")
    captions = [caption.get("raw") if isinstance(caption, Mapping) else caption for caption in captions]
    return captions[:CAPTIONS_PER_IMAGE]


# One's own data.


def _pick_captions(value: Any, captions: str) -> list[Any]:
    texts = value if isinstance(value, list) else [value]
    return texts if captions == "all" else texts[:1]


def _read_records(task: Task, data: str | None, options: Options) -> RetrievalData:
    """Images with captions in any form that is trained on."""
    captions = options.captions or "long"
    column = "short_caption" if captions == "short" else "long_captions"
    if data is None:
        raise ValueError(f"`data`: {task.key} needs a folder, files, or a data set on the Hub (--data). {task.source}")
    if is_hub_name(data) or any(os.path.isfile(os.path.join(data, name)) for name in SAVED_DATASET):
        return read_table_texts(
            task,
            options,
            open_table(task, data, options),
            partial(_pick_captions, captions=captions),
            (column,),
            protocol={"captions": captions},
            normalize=captions != "short",
            name=data,
        )
    for option in ("revision", "config"):
        if getattr(options, option) is not None:
            raise ValueError(f"`{option}` is for data sets on the Hub, and {data} is none.")
    text_column, num_images = options.text_column, options.num_images
    mapping = ColumnMapping(image=options.image_column or ColumnMapping.image, long=text_column or column, short=None)
    try:
        limits = {
            "image_root": options.image_root,
            "max_record_bytes": options.max_record_bytes or MAX_BYTES,
        }
        records = load_records(data, mapping, options.split, **limits)
        if isinstance(records, IterableDataset):  # shards, whose images are kept on disk where any of them can be read
            records = read_table(find_files(data, options.split), mapping, **limits)
    except ColumnError as error:
        hint = (
            "Say which to read: `image_column` (--image-column) and `text_column` (--text-column); `captions` "
            "(--captions long, short or all) says which kind."
        )
        raise ColumnError(error.problem, error.field, hint) from error
    gaps = Gaps(task)
    images: list[str | None] = []  # `None` for one that is in the records themselves
    names: list[str] = []
    texts: list[list[str | None]] = []
    rows: list[int] = []
    places: dict[str, int] = {}
    for row, record in enumerate(records):
        record = cast(dict[str, Any], record)
        if record.get("error"):
            raise incomplete(task, record["error"])
        name = str(record["id"])
        image = stored_image(record["image"], f"{data}, {name}")
        picked = _pick_captions(record["long_captions"], captions)
        own = [caption_of(text, f"{data}, {name}, column {text_column or column!r}") for text in picked]
        if isinstance(image, str):
            if image in places:  # a row for each caption
                texts[places[image]] += own
                continue
            places[image] = len(images)
        if num_images is not None and len(images) == num_images:
            continue
        if image is None or (isinstance(image, str) and not os.path.isfile(image)):
            gaps.add("images", name)
        images.append(image if isinstance(image, str) else None)
        names.append(name)
        texts.append(own)
        rows.append(row)
    first_of(task, options, images, data)

    def load(place: int) -> ImageSource:
        path = images[place]
        if path is not None:
            return path
        return cast(ImageSource, stored_image(cast(Dataset, records)[rows[place]]["image"], names[place]))

    return retrieval_data(
        task,
        options,
        gaps,
        LazyImages(len(images), load),
        names,
        texts,
        protocol={"captions": captions, "text_column": text_column or column},
        normalize=captions != "short",
        split=options.split,
        id=os.path.basename(os.path.normpath(data)),
        name=os.path.basename(os.path.normpath(data)),
    )


def _read_scenes(task: Task, data: str | None, options: Options) -> RetrievalData:
    """Scenes that no model was trained on, drawn as they are asked for."""
    split, captions = options.split or "test", options.captions or "long"
    if data is not None:
        raise ValueError(f"`data` {data!r}: scenes are drawn, not read.")
    if split not in ("validation", "test"):
        raise ValueError(f"`split` must be validation or test, which are held out, got {split!r}.")
    scenes = [scene(index, split=split) for index in range(options.num_images or cast(int, task.num_images))]
    texts = [[short_caption(one)] if captions == "short" else long_captions(one) for one in scenes]
    return retrieval_data(
        task,
        options,
        Gaps(task),
        LazyImages(len(scenes), lambda place: render(scenes[place])),
        [one.id for one in scenes],
        [_pick_captions(own, captions) for own in texts],
        normalize=captions != "short",
        split=split,
        protocol={"captions": captions},
    )


# Classes.


def _read_classification(task: Task, data: str | None, options: Options) -> ClassificationData:
    """Any folder of one folder a class, or any data set with classes."""
    if data is None or is_hub_name(data) or not os.path.isdir(data) or is_table(data):
        return _read_table_classes(task, options, open_table(task, data, options), name=data)
    _refuse_table_options(data, options)
    folder, split = Path(data), options.split
    if split is not None:
        if not (folder / split).is_dir():
            raise ValueError(f"`split`: {folder} holds no folder {split!r}.")
        folder = folder / split
    name = os.path.basename(os.path.normpath(data))
    classes = _class_folders(folder)
    if (
        classes
        and {one.lower() for one in classes} <= SPLIT_NAMES
        and any(map(_class_folders, map(folder.joinpath, classes)))
    ):
        raise ValueError(f"`split`: {folder} holds {', '.join(classes)}; say which (--split).")
    images, labels = _images_by_class(task, folder, classes, options)
    own = [one.replace("_", " ") for one in classes]
    places = _evenly(labels) if options.num_images is not None else range(len(images))
    return _classification(
        task,
        options,
        first_of(task, options, [images[place] for place in places], data),
        [labels[place] for place in places],
        _class_names(options.class_names, own, "folder names, _ as space", len(classes), data),
        split=split,
        id=name,
        name=name,
        evenly=True,
    )


def _evenly(labels: Sequence[int]) -> list[int]:
    """The places of all labels: the first of each class, in the order of the classes, then the second of each, ..."""
    seen: Counter[int] = Counter()
    order = []
    for place, label in enumerate(labels):
        order.append((seen[label], label, place))
        seen[label] += 1
    return [place for _, _, place in sorted(order)]


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images_by_class(
    task: Task, folder: Path, classes: Sequence[str], options: Options
) -> tuple[list[str], list[int]]:
    """The images below the folders of the classes, and the place of each one's class."""
    if not classes:
        raise incomplete(task, f"{folder} holds no folders of classes")
    found, unreadable = find_images(folder, options.image_root)
    if unreadable:
        raise incomplete(task, f"{folder}: {shown([f'{name} {why}' for name, why in unreadable.items()])}")
    places = {name: place for place, name in enumerate(classes)}
    of_class = {name: places.get(name.split("/")[0]) if "/" in name else None for name in found}
    images = {name: place for name, place in of_class.items() if place is not None}
    tell_of_others([name for name in found if name not in images], str(folder))
    there = set(images.values())
    if empty := [name for name in classes if places[name] not in there]:
        raise incomplete(task, f"{folder} holds no image of {len(empty)} of {len(classes)} classes: {shown(empty)}")
    return [str(folder / name) for name in images], list(images.values())


def _read_imagenet(task: Task, data: str | None, options: Options) -> ClassificationData:
    """The validation images, in folders by class or all in one, as Kaggle ships them."""
    root, split = None, options.split or "validation"
    if data is not None and os.path.isdir(data):
        places = ("val", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "")
        root = next((place for place in (Path(data, place) for place in places) if _is_imagenet(place)), None)
    if root is None and (data is None or is_hub_name(data) or is_table(data)):
        return _read_table_classes(task, options, open_table(task, data, options), synonyms=True)
    _refuse_table_options(data, options)
    folder = data_folder(task, data)
    if split != "validation":
        raise ValueError(f"`split` of {folder} must be validation, got {split!r}.")
    if root is None:
        raise incomplete(task, f"{folder} holds neither val/ with folders n01440764, ... nor ILSVRC2012_val_*.JPEG")
    about = [folder, *folder.parents[:1], root.parent]
    mapping_file = next((f for place in about if (f := place / "LOC_synset_mapping.txt").is_file()), None)
    mapping = {} if mapping_file is None else _read_synsets(mapping_file)
    folders = [name for name in _class_folders(root) if WNID.fullmatch(name)]
    if folders:
        images, labels = _images_by_class(task, root, folders, options)
        wnids = {image: folders[label] for image, label in zip(images, labels, strict=True)}
        classes = list(mapping) or folders
    else:
        solution = next((f for place in about if (f := place / "LOC_val_solution.csv").is_file()), None)
        if solution is None:
            raise incomplete(task, f"{folder} holds no LOC_val_solution.csv, which tells the class of each image")
        finder, gaps, wnids = ImageFinder(image_roots(folder, options)), Gaps(task), {}
        answers = _read_solution(solution)
        chosen = first_of(task, options, sorted(answers), str(solution))
        for stem in chosen:
            image = finder.find(root / f"{stem}.JPEG")
            if image is None:
                gaps.add("images", f"{root.name}/{stem}.JPEG")
            else:
                wnids[image] = answers[stem]
        gaps.refuse(len(chosen))
        tell_of_others(finder.others(root, [f"{stem}.JPEG" for stem in answers]), str(root))
        classes = list(mapping) or sorted(set(answers.values()))
    if unknown := sorted(set(wnids.values()) - set(classes)):
        raise ValueError(f"{mapping_file}: does not name {shown(unknown)}.")
    if options.num_images is None and len(classes) < IMAGENET_CLASSES:
        raise incomplete(task, f"{root} has {len(classes)} classes of {IMAGENET_CLASSES}")
    # by the names of the files, which are the numbers of the images: the same order in folders or all in one
    images = sorted(wnids, key=lambda image: os.path.basename(image))
    if options.num_images is None and len(images) < cast(int, task.num_images):
        there = {os.path.splitext(os.path.basename(image))[0] for image in images}
        lacking = [
            name for n in range(1, cast(int, task.num_images) + 1) if (name := f"ILSVRC2012_val_{n:08d}") not in there
        ]
        raise incomplete(
            task, f"{root} lacks {len(lacking)} of {task.num_images} images: {shown(lacking)}", first_alone=True
        )
    own = [mapping[wnid] for wnid in classes] if mapping else None
    places = {wnid: place for place, wnid in enumerate(classes)}
    return _classification(
        task,
        options,
        first_of(task, options, images, str(root)),
        [places[wnids[image]] for image in images],
        _class_names(
            options.class_names, own, "the first synonyms of LOC_synset_mapping.txt", len(classes), str(folder)
        ),
        split=split,
    )


def _is_imagenet(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return any(WNID.fullmatch(name) or name.startswith("ILSVRC2012_val_") for name in os.listdir(folder))


def _read_synsets(file: Path) -> dict[str, str]:
    """The first synonym of each class of ImageNet, in the order of the classes."""
    synsets = {}
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        wnid, _, synonyms = line.strip().partition(" ")
        if not line.strip():
            continue
        if not WNID.fullmatch(wnid) or not synonyms.strip():
            raise ValueError(
                f"{file}, line {number}: expected a class and its names, as in n01440764 tench, Tinca tinca."
            )
        synsets[wnid] = synonyms.split(",")[0].strip()
    return synsets


def _read_solution(file: Path) -> dict[str, str]:
    """The class of each validation image of ImageNet."""
    rows = csv.DictReader(read_text(file).splitlines())
    answers = {}
    for number, row in enumerate(rows, start=2):
        wnid = (row.get("PredictionString") or "").split(" ")[0]
        if not row.get("ImageId") or not WNID.fullmatch(wnid):
            raise ValueError(
                f"{file}, line {number}: expected ImageId,PredictionString, the latter starting with a class."
            )
        answers[row["ImageId"]] = wnid
    return answers


def _read_imagenet_v2(task: Task, data: str | None, options: Options) -> ClassificationData:
    """Folders 0 to 999, matched-frequency."""
    places = ("", "imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency")
    root, split = None, options.split or "test"
    if data is not None and os.path.isdir(data):
        root = next((p for p in (Path(data, place) for place in places) if p.is_dir() and _numbered(p)), None)
    if root is None and (data is None or is_hub_name(data) or is_table(data)):
        return _read_table_classes(task, options, open_table(task, data, options))
    _refuse_table_options(data, options)
    folder = data_folder(task, data)
    if split != "test":
        raise ValueError(f"`split` of {folder} must be test, got {split!r}.")
    if root is None:
        raise incomplete(task, f"{folder} holds no folders 0, 1, 2, ...")
    classes = sorted(_numbered(root), key=int)
    expected = IMAGENET_CLASSES if options.num_images is None else int(classes[-1]) + 1
    if lacking := [str(n) for n in range(expected) if str(n) not in set(classes)]:
        raise incomplete(task, f"{root} lacks {len(lacking)} of the folders 0 to {expected - 1}: {shown(lacking)}")
    images, labels = _images_by_class(task, root, classes, options)
    counts = Counter(labels)
    per_class = cast(int, task.num_images) // IMAGENET_CLASSES
    if short := [f"{classes[label]} has {count}" for label, count in sorted(counts.items()) if count < per_class]:
        if options.num_images is None:
            raise incomplete(task, f"{root} has {per_class} images in each folder; of its folders {shown(short)}")
    order = sorted(range(len(images)), key=lambda place: (labels[place], images[place]))
    if options.num_images is not None:
        order = [order[place] for place in _evenly([labels[place] for place in order])]
    names_file = next((f for place in (root, root.parent) if (f := place / "classnames.txt").is_file()), None)
    own = None if names_file is None else _read_class_names(names_file)
    return _classification(
        task,
        options,
        first_of(task, options, [images[place] for place in order], str(root)),
        [labels[place] for place in order],
        _class_names(options.class_names, own, "classnames.txt", len(classes), str(folder)),
        split=split,
        evenly=True,
    )


def _numbered(folder: Path) -> list[str]:
    return [name for name in _class_folders(folder) if name.isdecimal()]


def _read_table_classes(
    task: Task, options: Options, table: Table, *, synonyms: bool = False, name: str | None = None
) -> ClassificationData:
    """A table with an image and its class in each row."""
    image_column = find_column(table, options, "image_column", ("image", "img", "jpg", "jpeg", "png", "webp"), Image)
    label_column = find_column(table, options, "label_column", ("label", "cls"), ClassLabel)
    feature = table.dataset.features[label_column]
    rows = first_of(task, options, range(len(table.dataset)), table.where)
    values = list(table.dataset[label_column])
    if lacking := [f"row {row}" for row, value in enumerate(values) if value is None or value in ("", -1)]:
        raise incomplete(task, f"{len(lacking)} rows of {table.where} have no class: {shown(lacking)}")
    own: list[str] | None
    if isinstance(feature, ClassLabel):
        own, said = [str(one) for one in feature.names], f"those of the column {label_column!r}"
        labels = values
    elif table.is_text and all(value.isdecimal() and str(int(value)) == value for value in values):
        own, said = None, ""
        labels = list(map(int, values))
    elif isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        own, said = sorted(set(values)), f"the values of the column {label_column!r}"
        places = {value: place for place, value in enumerate(own)}
        labels = [places[value] for value in values]
    elif isinstance(feature, Value) and "int" in feature.dtype:
        own, said = _names_beside(table), "classnames.txt"
        labels = values
    else:
        raise ValueError(
            f"`label_column`: {label_column!r} of {table.where} holds neither numbers nor names: {feature}."
        )
    if own is not None and said != "classnames.txt":
        own = [one.split(",")[0].strip() if synonyms else one.replace("_", " ") for one in own]
        said += ", the first synonym of each" if synonyms else ", _ as space"
    dataset = table.dataset.select(rows)
    return _classification(
        task,
        options,
        table_images(task, table._replace(dataset=dataset), image_column),
        labels,
        _class_names(
            options.class_names, own, said, len(own) if own and said != "classnames.txt" else None, table.where
        ),
        split=table.split,
        names=[f"row {row}" for row in rows],
        id=table.id or (os.path.basename(os.path.normpath(name)) if name else None),
        name=name,
        revision=table.revision,
    )


def _names_beside(table: Table) -> list[str] | None:
    """The names in the file `classnames.txt` that some data sets on the Hub have."""
    if table.id is None:
        return None
    where = {"repo_id": table.id, "filename": "classnames.txt", "repo_type": "dataset", "revision": table.revision}
    if try_to_load_from_cache(**where) is _CACHED_NO_EXIST:
        return None
    with from_hub(table.id, table.revision):
        try:
            file = hf_hub_download(**where)
        except RemoteEntryNotFoundError:
            return None
    return _read_class_names(Path(file))


class ClassNames(NamedTuple):
    """The names of the classes, and where they come from."""

    names: list[str]
    source: str


def _class_names(
    given: str | None, own: list[str] | None, own_source: str, count: int | None, where: str
) -> ClassNames:
    """The names that are asked for, or the data's own; `count` is of how many classes, where that is known."""
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
    elif not os.path.isfile(given):
        raise FileNotFoundError(f"`class_names`: {given} is no file; pass openai, or a file with a name in each line.")
    else:
        chosen = ClassNames(_read_class_names(Path(given)), f"the file {os.path.basename(given)}")
    if count is not None and len(chosen.names) != count:
        raise ValueError(f"`class_names`: {chosen.source} has {len(chosen.names)} names, and {where} {count} classes.")
    shared = [name for name, times in Counter(chosen.names).items() if times > 1]
    if shared:
        logger.warning(
            "%d names stand for several classes, which nothing can tell apart then: %s.", len(shared), shown(shared)
        )
    return chosen


def _read_class_names(file: Path) -> list[str]:
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


def _classification(
    task: Task,
    options: Options,
    images: Sequence[ImageSource],
    labels: Sequence[int],
    class_names: ClassNames,
    *,
    split: str | None,
    names: Sequence[str] | None = None,
    id: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    evenly: bool = False,
) -> ClassificationData:
    """The images to score, with the labels of as many at least; `evenly` is whether the first are of all classes."""
    labels = labels[: len(images)]
    if wrong := sorted({label for label in labels if not 0 <= label < len(class_names.names)}):
        raise ValueError(f"{name or task.name}: class {wrong[0]}, and there are {len(class_names.names)} names.")
    protocol: dict[str, Any] = {"class_names": class_names.source}
    if options.num_images is not None:
        protocol["first_images"] = options.num_images
        if evenly:
            protocol["order"] = "the first image of each class, then the second, ..."
    if names is None:
        names = ["/".join(Path(cast(str, image)).parts[-2:]) for image in images]
    return ClassificationData(
        id=id or task.id,
        name=name or task.name,
        images=images,
        image_names=names,
        labels=labels,
        class_names=class_names.names,
        split=split,
        revision=revision,
        protocol=protocol,
    )


def _sharegpt4v(size: str, number: int) -> Task:
    return Task(
        key=f"sharegpt4v-{size}",
        name=f"ShareGPT4V-{size}",
        id="Lin-Chen/ShareGPT4V",
        description=f"long captions by ShareGPT4V's captioner of the first {number} images of SAM",
        source=(
            "share-captioner_coco_lcs_sam_1246k_1107.json of Lin-Chen/ShareGPT4V on the Hub, or share4v_sam_10k.json "
            "of github.com/wuw2019/LoTLIP; the images are those of SA-1B, unpacked to sa_000000/images/ and so on, or "
            "to sam/images/."
        ),
        reader=_read_sharegpt4v,
        options=("num_images", "normalize"),
        num_images=number,
        num_texts=number,
    )


TASKS = {
    task.key: task
    for task in (
        Task(
            key="dci",
            name="DCI",
            id="facebook/DCI",
            description="very long captions by people, all splits",
            source=(
                "dci.tar.gz of github.com/facebookresearch/DCI (densely_captioned_images/ with splits.json and "
                "annotations/), and sa_000138.tar of SA-1B, unpacked to densely_captioned_images/photos/."
            ),
            reader=_read_dci,
            options=("num_images", "split", "normalize"),
            num_images=7805,
            num_texts=7805,
            split="all",
        ),
        Task(
            key="iiw",
            name="IIW",
            id="google/imageinwords",
            description="long captions by people: IIW-400, DCI-Test and DOCCI-Test",
            source=(
                "the folders IIW-400, DCI_Test and DOCCI_Test of datasets/ of github.com/google/imageinwords; the "
                "images of DOCCI (google.github.io/docci) in docci/ and docci_aar/ (or as unpacked, images/ and "
                "images_aar/), those of DCI in dci/ (or densely_captioned_images/photos/)."
            ),
            reader=_read_iiw,
            options=("num_images", "normalize"),
            num_images=612,
            num_texts=612,
        ),
        _sharegpt4v("1k", 1000),
        _sharegpt4v("10k", 10_000),
        Task(
            key="urban1k",
            name="Urban1k",
            id="BeichenZhang/Urban1k",
            description="long captions of busy city views, from Long-CLIP",
            source="Urban1k.zip of BeichenZhang/Urban1k on the Hub: image/ and caption/.",
            reader=_read_urban1k,
            options=("num_images", "revision", "normalize"),
            num_images=1000,
            num_texts=1000,
            hub_id="BeichenZhang/Urban1k",
        ),
        Task(
            key="docci",
            name="DOCCI",
            id="google/docci",
            description="long captions by people of images that differ in details",
            source=(
                "google.github.io/docci: docci_descriptions.jsonlines, and docci_images.tar.gz unpacked to images/ "
                "beside it."
            ),
            reader=_read_docci,
            options=("num_images", "split", *TABLE_OPTIONS, "text_column", "normalize"),
            num_images=5000,
            num_texts=5000,
            split="test",
        ),
        Task(
            key="coco",
            name="MSCOCO",
            id="nlphuji/mscoco_2014_5k_test_image_text_retrieval",
            description="five short captions of each image, Karpathy's test split",
            source=(
                "dataset_coco.json of Karpathy's caption_datasets.zip, and val2014.zip of cocodataset.org unpacked to "
                "val2014/ beside it."
            ),
            reader=_read_karpathy,
            options=("num_images", "split", *TABLE_OPTIONS, "text_column", "normalize"),
            num_images=5000,
            num_texts=25_000,
            split="test",
            hub_id="nlphuji/mscoco_2014_5k_test_image_text_retrieval",
            hub_revision="refs/convert/parquet",
        ),
        Task(
            key="flickr30k",
            name="Flickr30k",
            id="nlphuji/flickr_1k_test_image_text_retrieval",
            description="five short captions of each image, Karpathy's test split",
            source=(
                "dataset_flickr30k.json of Karpathy's caption_datasets.zip, and Flickr30k's images (on request) in "
                "flickr30k-images/ beside it."
            ),
            reader=_read_karpathy,
            options=("num_images", "split", *TABLE_OPTIONS, "text_column", "normalize"),
            num_images=1000,
            num_texts=5000,
            split="test",
            hub_id="nlphuji/flickr_1k_test_image_text_retrieval",
            hub_revision="refs/convert/parquet",
        ),
        Task(
            key="imagenet-1k",
            name="ImageNet-1k",
            id="ILSVRC/imagenet-1k",
            description="1000 classes, the validation images",
            source=(
                "image-net.org or Kaggle's imagenet-object-localization-challenge, with val/ in folders by class or "
                "with LOC_val_solution.csv; or ILSVRC/imagenet-1k on the Hub, which asks for an account."
            ),
            reader=_read_imagenet,
            options=("num_images", "split", *TABLE_OPTIONS, "label_column", "class_names"),
            num_images=50_000,
            split="validation",
            hub_id="ILSVRC/imagenet-1k",
        ),
        Task(
            key="imagenet-v2",
            name="ImageNet-V2",
            id="vaishaal/ImageNetV2",
            description="new images of ImageNet's classes, matched-frequency",
            source=(
                "imagenetv2-matched-frequency.tar.gz of vaishaal/ImageNetV2 on the Hub, unpacked; or "
                "clip-benchmark/wds_imagenetv2 on the Hub."
            ),
            reader=_read_imagenet_v2,
            options=("num_images", "split", *TABLE_OPTIONS, "label_column", "class_names"),
            num_images=10_000,
            split="test",
            hub_id="clip-benchmark/wds_imagenetv2",
        ),
        Task(
            key="classification",
            name="classification",
            id="classification",
            description="any folder of one folder a class, or data set with classes",
            source="it is your own. Pass a folder of one folder a class, or the name of a data set on the Hub.",
            reader=_read_classification,
            options=("num_images", "split", *TABLE_OPTIONS, "label_column", "class_names"),
        ),
        Task(
            key="retrieval",
            name="retrieval",
            id="retrieval",
            description="any images with captions, in the forms that are trained on",
            source=(
                "it is your own. Pass a folder of images with metadata.jsonl, .csv or .parquet; a file of records "
                "(.jsonl, .json, .csv, .tsv or .parquet); WebDataset shards (.tar); or the name of a data set on the "
                "Hub. Columns of other names than image, or file_name, and long_captions are named with "
                "--image-column and --text-column."
            ),
            reader=_read_records,
            options=(
                "num_images",
                "split",
                *TABLE_OPTIONS,
                "text_column",
                "captions",
                "normalize",
                "max_record_bytes",
            ),
        ),
        Task(
            key="scenes",
            name="Scenes",
            id="scenes",
            description="drawn pictures with long captions that no model of the quickstart was trained on",
            source="nowhere: they are drawn.",
            reader=_read_scenes,
            options=("num_images", "split", "captions", "normalize"),
            num_images=500,
            num_texts=500,
            split="test",
        ),
    )
}
