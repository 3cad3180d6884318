"""From records to a training batch: reads the images, draws the texts, and deals with what is broken."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.data import get_worker_info
from transformers import ProcessorMixin

from ..files import MAX_CHARACTERS
from ..images import ImageError, background_of, image_source, load_image, load_pixels
from .sampling import CaptionSampling, SampledTexts, sample_texts

logger = logging.getLogger(__name__)

FIELDS = ("image", "short_caption", "long_captions", "id")
COUNTED = ("records", "broken_images", "broken_records", "broken_shards", "stand_ins")
MAX_WORKERS = 1024
MAX_WARNINGS = 10  # of each process


class RecordError(ValueError):
    """A record that cannot be trained on. The message names it by its id."""


class ShardError(RecordError):
    """A file of a data set that ends too soon. The message names it and says how many records came before."""


class LoTLIPCollator:
    """
    Makes batches of records, for a `torch.utils.data.DataLoader` and for `transformers.Trainer` (with
    `remove_unused_columns=False`, since it takes the records' columns, not the model's).

    A record is a mapping with `image` (a path, the bytes of a file, a PIL image, an array, or what
    `datasets.Image(decode=False)` gives), `short_caption`, `long_captions` (a list) and `id`. One with `error` is
    broken for that reason, and with `is_shard` it stands for a shard that ended too soon; other keys are left alone.
    `lotlip_hf.data.records` reads data sets as such.

    Args:
        processor (`LoTLIPProcessor`):
            Turns images and texts into the model's input.
        sampling (`CaptionSampling`, *optional*):
            How the long texts are drawn; by default as in the paper.
        seed (`int`, *optional*, defaults to 0):
            With the epoch and a record's id, what its texts are drawn by.
        on_error (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops at the first broken image or record; `"skip"` leaves it out of its batch and counts it.
        return_ids (`bool`, *optional*, defaults to `False`):
            Whether batches carry the ids of their records, for messages, and their own counts. A model does not take
            them: pop both first.

    Raises:
        ValueError: if `on_error` is something else.

    Example:

    ```python
    >>> from torch.utils.data import DataLoader
    >>> from lotlip_hf.scenes.dataset import scenes_dataset

    >>> collator = LoTLIPCollator(processor, on_error="skip")
    >>> loader = DataLoader(scenes_dataset(512), batch_size=64, shuffle=True, collate_fn=collator)
    >>> for epoch in range(2):
    ...     collator.set_epoch(epoch)
    ...     for batch in loader:
    ...         loss = model(**batch).loss
    >>> collator.counts
    {'records': 1024, 'broken_images': 0, 'broken_records': 0, 'broken_shards': 0, 'stand_ins': 0}
    ```
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        sampling: CaptionSampling | None = None,
        seed: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
        return_ids: bool = False,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f'`on_error` must be "raise" or "skip", got {on_error!r}.')
        self.processor = processor
        self.sampling = sampling or CaptionSampling()
        self.seed = seed
        self.on_error = on_error
        self.return_ids = return_ids
        # In memory that a DataLoader's workers share, persistent ones too. Each counts in a row of its own.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._counts = torch.zeros(MAX_WORKERS + 1, len(COUNTED), dtype=torch.int64).share_memory_()
        self._warnings = 0

    def set_epoch(self, epoch: int) -> None:
        """
        Says which epoch the next batches belong to, so that each draws other texts.

        Args:
            epoch (`int`): number of the epoch. To be called before the epoch's iterator is made.
        """
        self._epoch.fill_(epoch)

    @property
    def counts(self) -> dict[str, int]:
        """
        What this process and its DataLoader's workers have met so far, batches made in advance included.

        `records` were given; of these `broken_images` and `broken_records` were left out of their batch; one for each
        of `broken_shards` only said that its shard had ended too soon; and for `stand_ins` the short caption stood in
        for the long texts, for want of a long caption.
        """
        return dict(zip(COUNTED, self._counts.sum(0).tolist(), strict=True))

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Makes a batch of B records, less the broken ones.

        Args:
            records (`Sequence[Mapping[str, Any]]`): the records.

        Returns:
            `dict[str, Any]`: `pixel_values` [B, 3, H, W]; `input_ids` and `attention_mask` [B, L] of the short texts;
            `long_input_ids` and `long_attention_mask` [B, T-1, L'] of the long ones, if any are asked for;
            `return_loss`, which is `True`; and, if asked for, `ids`, a list, and `counts`, what this batch adds to
            those of the collator. Short and long texts are each padded to the longest of the batch.

        Raises:
            ImageError: if an image is broken and `on_error` is `"raise"`.
            RecordError: if a record or a shard (`ShardError`) is broken and `on_error` is `"raise"`, or if all
                records of the batch are broken.
            KeyError: if the records do not have the fields of one.
            ValueError: if `sampling.captioners` asks for captions that a record does not have.
        """
        pixel_values: list[torch.Tensor] = []
        texts: list[SampledTexts] = []
        ids: list[str] = []
        errors: list[ValueError] = []
        before = self._own_counts.clone()
        read = partial(read_image, processor=self.processor, load=load_pixels)
        for record in records:
            missing = [field for field in FIELDS if field not in record]
            if missing:
                raise KeyError(
                    f"Records have no {', '.join(missing)}; they have {', '.join(record) or 'nothing'}. With "
                    "transformers.Trainer set `remove_unused_columns=False`; to read other data sets see "
                    "lotlip_hf.data.records."
                )
            self._count("records")
            try:
                # one by one: a batch of large images would fill the memory
                pixels, drawn, record_id = read_record(record, self.sampling, self.seed, int(self._epoch), read)
            except (ImageError, RecordError) as error:
                if self.on_error == "raise":
                    raise
                kind = (
                    "images"
                    if isinstance(error, ImageError)
                    else "shards"
                    if isinstance(error, ShardError)
                    else "records"
                )
                self._count(f"broken_{kind}")
                self._warn(error)
                errors.append(error)
                continue
            if drawn.stand_in:
                self._count("stand_ins")
            pixel_values.append(pixels["pixel_values"])
            texts.append(drawn)
            ids.append(record_id)
        if not pixel_values:
            first = f" The first: {errors[0]}" if errors else ""
            raise RecordError(f"All {len(records)} records of a batch are broken.{first}")

        # Tensors first: accelerate takes the batch's size from its first entry.
        batch: dict[str, Any] = {"pixel_values": torch.cat(pixel_values)}
        short = self.processor(text=[one.short for one in texts], return_tensors="pt")
        batch["input_ids"], batch["attention_mask"] = short["input_ids"], short["attention_mask"]
        if self.sampling.num_long_texts:
            long = self.processor(text=[one.long for one in texts], return_tensors="pt")
            batch["long_input_ids"], batch["long_attention_mask"] = long["input_ids"], long["attention_mask"]
        batch["return_loss"] = True
        if self.return_ids:
            batch["ids"] = ids
            batch["counts"] = dict(zip(COUNTED, (self._own_counts - before).tolist(), strict=True))
        return batch

    @property
    def _own_counts(self) -> torch.Tensor:
        """The row that this process or worker counts in."""
        worker = get_worker_info()
        return self._counts[0 if worker is None else worker.id + 1]

    def _count(self, what: str) -> None:
        self._own_counts[COUNTED.index(what)] += 1

    def _warn(self, error: ValueError) -> None:
        self._warnings += 1
        if self._warnings <= MAX_WARNINGS:
            logger.warning(f"Left out: {error}")
        if self._warnings == MAX_WARNINGS:
            logger.warning("Further broken images and records are counted (`LoTLIPCollator.counts`), not named.")


def read_image(value: Any, name: str, processor: Any = None, load: Callable[..., Any] = load_image) -> Any:
    """
    Reads a record's image.

    Args:
        value (`Any`): the image as [`~lotlip_hf.images.image_source`] takes it.
        name (`str`): what errors call the record.
        processor (`ProcessorMixin` or `BaseImageProcessor`, *optional*):
            The processor of the model, whose background is laid under transparency.
        load (`Callable`, *optional*, defaults to [`~lotlip_hf.images.load_image`]):
            That, or [`~lotlip_hf.images.load_pixels`].

    Returns:
        `PIL.Image.Image`: the image as RGB, upright; or what `load` returns.

    Raises:
        ImageError: if it cannot be read.
        RecordError: if there is none, or it is something else.
    """
    source, path = image_source(value)
    if path:
        name = f"{name}: {path}"
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ImageError(
            name,
            "the image is an address on the web. Download the images first, for example with img2dataset, and read "
            "its shards or its folder",
        )
    try:
        image_processor = getattr(processor, "image_processor", processor)
        return load(source, name, image_processor=image_processor, background=background_of(processor))
    except TypeError as error:
        raise RecordError(str(error)) from error


def read_record(
    record: Mapping[str, Any],
    sampling: CaptionSampling,
    seed: int = 0,
    epoch: int = 0,
    read: Callable[[Any, str], Any] = read_image,
) -> tuple[Any, SampledTexts, str]:
    """
    Reads what of a record is trained on.

    Args:
        record (`Mapping[str, Any]`): the record.
        sampling (`CaptionSampling`): how the long texts are drawn.
        seed (`int`, *optional*, defaults to 0): seed of the draw.
        epoch (`int`, *optional*, defaults to 0): epoch of the draw.
        read (`Callable`, *optional*): reads the image, by its value and a name for errors; by default [`read_image`].

    Returns:
        `tuple[Any, SampledTexts, str]`: the image as `read` gives it, the texts and the id.

    Raises:
        ImageError: if the image is broken.
        RecordError: if the record or its shard (`ShardError`) is broken.
        ValueError: if `sampling.captioners` asks for captions that the record does not have.
    """
    if record.get("error"):
        raise (ShardError if record.get("is_shard") else RecordError)(record["error"])
    record_id, short_caption, long_captions = _checked_captions(record)
    image = read(record["image"], f"record {record_id}")
    return image, sample_texts(short_caption, long_captions, sampling, seed, epoch, record_id), record_id


def _checked_captions(record: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    """The id, the short caption and the long ones, empty where there is none."""
    record_id, short_caption, long_captions = record["id"], record["short_caption"], record["long_captions"]
    if isinstance(record_id, int):
        record_id = str(record_id)
    if not isinstance(record_id, str) or not record_id:
        raise RecordError(f"a record's `id` must be a string that is not empty, got {record_id!r}.")
    if not isinstance(short_caption, str) or not short_caption.strip():
        raise RecordError(f"record {record_id}: `short_caption` must be a text, got {short_caption!r}.")
    is_list = isinstance(long_captions, list | tuple)
    if not is_list or not all(isinstance(caption, str | None) for caption in long_captions):
        raise RecordError(f"record {record_id}: `long_captions` must be a list of texts, got {long_captions!r:.80}.")
    captions = [caption or "" for caption in long_captions]
    if (longest := max(map(len, (short_caption, *captions)))) > MAX_CHARACTERS:
        raise RecordError(f"record {record_id}: a caption has {longest:,} characters, more than {MAX_CHARACTERS:,}.")
    return record_id, short_caption, captions
