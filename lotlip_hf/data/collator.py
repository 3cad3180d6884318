"""From records to a batch: checks the records, reads their images, draws their texts, and counts what is broken."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypedDict, cast

import torch
from transformers import ProcessorMixin

from ..images import ImageError, background_of, load_image, load_pixels
from .record import Draw, Record, RecordError, ShardError, check_record, record_rng
from .sampling import SubCaptions

logger = logging.getLogger(__name__)

COUNTED = ("records", "broken_images", "broken_records", "broken_shards", "stand_ins")
MAX_WARNINGS = 10  # of each process


class ModelInputs(TypedDict):
    """The arguments of the model in a batch."""

    pixel_values: torch.Tensor  # [B, 3, H, W]
    input_ids: torch.Tensor  # [B, L], the short texts
    attention_mask: torch.Tensor  # [B, L]
    long_input_ids: torch.Tensor  # [B, T - 1, L'], the long texts, if there are any
    long_attention_mask: torch.Tensor  # [B, T - 1, L']
    kept_patches: torch.Tensor  # [B, K], indices of the image patches that the model sees, with `patch_dropout`


class Batch(ModelInputs):
    """What a step takes."""

    return_loss: bool  # for a plain call of the model
    ids: list[str]  # with `return_ids`, as are the counts
    counts: dict[str, int]


class LoTLIPCollator:
    """
    Makes batches of records, for a `torch.utils.data.DataLoader` and for `transformers.Trainer` (with
    `remove_unused_columns=False`, since it takes the records' columns, not the model's).

    A record is a mapping as [`~lotlip_hf.data.record.Record`] says, which `lotlip_hf.data.records` reads from data
    sets.

    Args:
        processor (`LoTLIPProcessor`):
            Turns images and texts into the model's input.
        draw (`Callable`, *optional*, defaults to `SubCaptions()`):
            Draws the texts of a batch's records (`lotlip_hf.data.sampling`); by default as in the paper.
        seed (`int`, *optional*, defaults to 0):
            With the epoch and a record's id, the seed of the record's random generator.
        on_error (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops at the first broken image or record; `"skip"` leaves it out of its batch and counts it.
        return_ids (`bool`, *optional*, defaults to `False`):
            Whether batches carry `ids` and `counts`, which a plain call of a model does not take.
        patch_dropout (`float`, *optional*, defaults to 0.0):
            Share of an image's patches that are left out, drawn at random, as FLIP does.
        patch_size (`int`, *optional*): side of the model's patches in pixels; required with `patch_dropout`.

    Raises:
        ValueError: if an option is out of range.

    Example:

    ```python
    >>> from torch.utils.data import DataLoader
    >>> from lotlip_hf.scenes.dataset import scenes_dataset

    >>> collator = LoTLIPCollator(processor)
    >>> loader = DataLoader(scenes_dataset(512), batch_size=64, shuffle=True, collate_fn=collator)
    >>> for epoch in range(2):
    ...     collator.set_epoch(epoch)
    ...     for batch in loader:
    ...         loss = model(**batch).loss
    ```
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        draw: Draw | None = None,
        seed: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
        return_ids: bool = False,
        patch_dropout: float = 0.0,
        patch_size: int | None = None,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f'`on_error` must be "raise" or "skip", got {on_error!r}.')
        if not 0 <= patch_dropout < 1 or (patch_dropout and not patch_size):
            raise ValueError(f"`patch_dropout` must be in [0, 1) and needs `patch_size`, got {patch_dropout}.")
        self.processor = processor
        self.draw = draw or SubCaptions()
        self.seed = seed
        self.on_error = on_error
        self.return_ids = return_ids
        self.patch_dropout = patch_dropout
        self.patch_size = patch_size
        # In memory that a DataLoader's workers share, persistent ones too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._warnings = 0

    def set_epoch(self, epoch: int) -> None:
        """
        Says which epoch the next batches belong to, so that each draws other texts.

        Args:
            epoch (`int`): number of the epoch. To be called before the epoch's iterator is made.
        """
        self._epoch.fill_(epoch)

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> Batch:
        """
        Makes a batch of B records, less the broken ones.

        Args:
            records (`Sequence[Mapping[str, Any]]`): the records.

        Returns:
            `Batch`: short and long texts are each padded to the longest of the batch. Of `counts`, `records` were
            given; `broken_images` and `broken_records` were left out; each of `broken_shards` only says that its
            shard ended too soon; and for `stand_ins` the short caption stands in for the long texts.

        Raises:
            ImageError: if an image is broken and `on_error` is `"raise"`.
            RecordError: if a record or a shard (`ShardError`) is broken and `on_error` is `"raise"`, or if all
                records of the batch are broken.
            KeyError: if the records lack a required field.
            ValueError: if the records do not have what `draw` draws from.
        """
        load = partial(
            load_pixels,
            image_processor=getattr(self.processor, "image_processor", self.processor),
            background=background_of(self.processor),
        )
        counts = Counter(dict.fromkeys(COUNTED, 0), records=len(records))
        checked: list[Record] = []
        pixel_values: list[torch.Tensor] = []
        errors: list[ValueError] = []
        for record in records:
            try:
                # one by one: a batch of large images would fill the memory
                read, pixels = read_record(record, load)
            except (ImageError, RecordError) as error:
                if self.on_error == "raise":
                    raise
                kinds = {ImageError: "broken_images", ShardError: "broken_shards"}
                counts[kinds.get(type(error), "broken_records")] += 1
                self._warn(error)
                errors.append(error)
                continue
            checked.append(read)
            pixel_values.append(pixels["pixel_values"])
        if not checked:
            first = f" The first: {errors[0]}" if errors else ""
            raise RecordError(f"All {len(records)} records of a batch are broken.{first}")

        rngs = [record_rng(self.seed, int(self._epoch), record["id"]) for record in checked]
        texts = self.draw(checked, rngs)
        numbers = [len(one.long) for one in texts]
        if len(texts) != len(checked) or len(set(numbers)) > 1:
            raise ValueError(
                f"{self.draw} must draw texts for each of {len(checked)} records, as many long ones for each; got "
                f"{len(texts)}, with {numbers} long ones."
            )
        counts["stand_ins"] = sum(one.stand_in for one in texts)
        short = self.processor(text=[one.short for one in texts], return_tensors="pt")
        # Tensors first: accelerate takes the batch's size from its first entry.
        batch: dict[str, Any] = {
            "pixel_values": torch.cat(pixel_values),
            "input_ids": short["input_ids"],
            "attention_mask": short["attention_mask"],
        }
        if any(numbers):
            long = self.processor(text=[one.long for one in texts], return_tensors="pt")
            batch |= {"long_input_ids": long["input_ids"], "long_attention_mask": long["attention_mask"]}
        if self.patch_dropout and self.patch_size:
            num_patches = math.prod(side // self.patch_size for side in batch["pixel_values"].shape[-2:])
            num_kept = max(1, round((1 - self.patch_dropout) * num_patches))
            kept = [sorted(rng.sample(range(num_patches), num_kept)) for rng in rngs]
            batch["kept_patches"] = torch.tensor(kept)
        batch["return_loss"] = True
        if self.return_ids:
            batch |= {"ids": [record["id"] for record in checked], "counts": dict(counts)}
        return cast(Batch, batch)

    def _warn(self, error: ValueError) -> None:
        self._warnings += 1
        if self._warnings <= MAX_WARNINGS:
            logger.warning(f"Left out: {error}")
        if self._warnings == MAX_WARNINGS:
            logger.warning("Further broken images and records are counted (`counts` of a batch), not named.")


def read_record(record: Mapping[str, Any], load: Callable[[Any, str], Any] = load_image) -> tuple[Record, Any]:
    """The record as [`~lotlip_hf.data.record.check_record`] gives it, and its image, with the errors of both."""
    checked = check_record(record)
    try:
        return checked, load(checked["image"], f"record {checked['id']}")
    except TypeError as error:
        raise RecordError(str(error)) from error
