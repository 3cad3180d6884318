"""The training and evaluation records of a run."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from random import Random

from datasets import Dataset, IterableDataset

from ..data.collator import read_record
from ..data.kept import KeptIds, keep_records
from ..data.record import VECTORS, Record, RecordError, check_record
from ..data.records import (
    MissingColumn,
    SplitError,
    first_error,
    ids_of,
    is_hub_name,
    load_records,
    without_images,
)
from ..files import printable
from ..images import set_max_image_pixels
from ..scenes.dataset import scenes_dataset
from .config import SCENES, TrainingConfig

READ_TOGETHER = 100  # records
# Advice if the column of a field is missing.
COLUMN_HINTS = {
    "image": "Name the column with `--image-column`.",
    "short": "Name the column with `--short-column` (`none` uses the first sentence of each long caption).",
    "teacher_image_embeds": "Name the column with `--teacher-image-column`.",
    "teacher_text_embeds": "Name the column with `--teacher-text-column`.",
    "long": "Name the columns with `--long-columns`, or train on short captions only with `--num-long-texts 0`.",
}


def load_data(config: TrainingConfig) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """
    Loads the records of a run. With `on_error="raise"` the first record is read, so that an error in all records is
    found before a model is loaded.

    Args:
        config (`TrainingConfig`): Options of the run. Only the group "The data", `seed`, `eval_data` and `eval_share`
            are used. `keep` applies to the training records, before `eval_share`.

    Returns:
        `tuple`: The training records, and the evaluation records or `None`.

    Raises:
        `ValueError`: If `data` is not set, a column is missing, a file cannot be read, there is no record, none has an
            id of `keep`, or `eval_share` is set and the records are a stream or fewer than two.
        `ImageError`, `RecordError`: If the first record is broken and `on_error` is `"raise"`.
        `FileNotFoundError`: If a file or folder does not exist.
    """
    if config.max_image_pixels is not None:
        set_max_image_pixels(config.max_image_pixels)
    if config.data is None:
        raise ValueError(f"`data` is not set. Set it to a folder, files, a data set on the Hub, or {SCENES!r}.")
    records = _records(config, config.data, "split", "train", config.num_scenes, config.keep)
    if config.eval_share is not None:
        return hold_out(records, config.eval_share, config.seed)
    if config.eval_data is None:
        return records, None
    return records, _records(config, config.eval_data, "eval_split", "validation", config.eval_samples)


def hold_out(records: Dataset | IterableDataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """
    Splits records into training and evaluation records. Those with the smallest digest of seed and id are held out, in
    the order of the digests, so that a seed holds out the same pictures in any order of the records.
    """
    if isinstance(records, IterableDataset) or len(records) < 2:
        raise ValueError("`eval_share` needs two records or more that are not a stream. Set `eval_data` instead.")
    digests = [hashlib.blake2b(f"{seed}\0{one}".encode(errors="surrogatepass")).digest() for one in ids_of(records)]
    order = sorted(range(len(digests)), key=digests.__getitem__)
    number = min(max(1, round(share * len(order))), len(order) - 1)
    return records.select(sorted(order[number:])), records.select(order[:number])


def intact_texts(
    records: Dataset | Sequence[Record], indices: Sequence[int] | None = None
) -> Iterator[tuple[int, Record]]:
    """
    Yields the records with given indices, or all, that are not broken, with their indices. Images of a data set are
    not read, unless it has a transform that needs them.
    """
    indices = range(len(records)) if indices is None else indices
    records = without_images(records)
    for start in range(0, len(indices), READ_TOGETHER):
        part = [*indices[start : start + READ_TOGETHER]]
        rows = records.__getitems__(part) if isinstance(records, Dataset) else [records[index] for index in part]
        for index, row in zip(part, rows, strict=True):
            try:
                yield index, check_record({"image": None, **row})
            except RecordError:
                continue


def _records(
    config: TrainingConfig, data: str, option: str, usual_split: str, num_scenes: int, keep: str | None = None
) -> Dataset | IterableDataset:
    split = getattr(config, option)
    if data == SCENES:
        split = split or usual_split
        # Held-out scenes are the same for every seed of a run.
        scenes = scenes_dataset(num_scenes, config.seed if split == "train" else 0, split)
        return scenes if keep is None else keep_records(scenes, KeptIds(keep))
    mapping = config.column_mapping()
    if option == "eval_split":  # evaluation has no teacher
        mapping = replace(mapping, **dict.fromkeys(VECTORS))
    load = partial(
        load_records,
        data,
        mapping,
        image_folder=config.image_folder,
        streaming=config.streaming,
        image_root=config.image_root,
        max_record_bytes=config.max_record_bytes,
    )
    try:
        records = load(split or (usual_split if is_hub_name(data) else None))
    except MissingColumn as error:
        raise MissingColumn(error.problem, error.field, COLUMN_HINTS[error.field]) from error
    except SplitError as error:
        if error.splits or split != usual_split:
            raise SplitError(error.problem, error.splits, option) from error
        records = load(None)  # files without a split in their names belong to the default split
    if keep is not None:
        records = keep_records(records, KeptIds(keep))
    first = next(iter(records), None)
    if first is None:
        raise ValueError(f"{data} has no records{'' if keep is None else f' with an id of `keep` {printable(keep)}'}.")
    if config.on_error == "raise":
        if error := first_error(records):
            raise RecordError(error)
        config.draw()([read_record(first)[0]], [Random(0)])
    return records
