"""The collator: checks records, loads their images, draws their texts, counts broken records and makes a batch."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any, Literal, TypedDict, cast

import torch
from transformers import ProcessorMixin

from ..images import (
    ImageError,
    background_of,
    kept_box,
    load_image,
    load_sized_pixels,
    plain_image_processor,
)
from .augment import Augment, crop_size, load_augmented, load_views
from .kept import digest_of
from .masking import Masking, WordScores, noise_probability, prediction_probability
from .record import Draw, Record, RecordError, Region, ShardError, Texts, check_record, record_rng, texts_digest
from .sampling import SubCaptions

logger = logging.getLogger(__name__)

COUNTED = ("records", "broken_images", "broken_records", "broken_shards", "stand_ins")
MAX_WARNINGS = 10  # per process
# Riders are texts that follow the long texts of a row, in this order. Their embeddings, and a tensor [B, n, ...]
RIDERS = {"negative_embeds": "negative_mask", "region_embeds": "box_mask", "masked_embeds": "masked_labels"}


class ModelInputs(TypedDict):
    """The tensors of a batch that are arguments of the model."""

    # [B, 3, H, W], or [B, 2, 3, H, W] with two views, or [B, P, 3 * patch_size * patch_size] for SigLIP 2 NaFlex
    pixel_values: torch.Tensor
    pixel_attention_mask: torch.Tensor  # [B, P], 1 for patches and 0 for padding, only for SigLIP 2 NaFlex
    spatial_shapes: torch.Tensor  # [B, 2], height and width in patches, only for SigLIP 2 NaFlex
    input_ids: torch.Tensor  # [B, L], short texts
    attention_mask: torch.Tensor  # [B, L]
    long_input_ids: torch.Tensor  # [B, T - 1 + n, L'], long texts, then n riders; missing if there are none
    long_attention_mask: torch.Tensor  # [B, T - 1 + n, L']
    kept_patches: torch.Tensor  # [B, K] or [B, 2, K], indices of the patches to embed, only with `patch_dropout`
    image_states: torch.Tensor  # [B, pooled_size], instead of `pixel_values`
    text_states: torch.Tensor  # [B, T + n, hidden_size], instead of ids and masks


class Batch(ModelInputs):
    """A batch of the collator."""

    image_keys: list[str]  # [B], instead of `pixel_values` if `frozen` contains images
    texts: list[list[str]]  # [B][T + n], instead of ids and masks if `frozen` contains texts, or with `return_texts`
    text_keys: torch.Tensor  # [B, T], digests of the captions, only with `return_text_keys`
    negative_mask: torch.Tensor  # [B, n], `False` where a record lacks a negative, only with `num_negatives`
    boxes: torch.Tensor  # [B, R, 4], x0, y0, x1, y1 in [0, 1], only with `num_regions` and `pixel_values`
    region_keys: torch.Tensor  # [B, R], digests of the texts of regions, only with `num_regions`
    box_mask: torch.Tensor  # [B, R], `False` where a record lacks a region, only with `num_regions`
    tags: torch.Tensor  # [B, K], digests of the tags, padded with 0, only with `return_tags`
    groups: torch.Tensor  # [B], digests of the groups, only with `return_groups`
    masked_labels: torch.Tensor  # [B, 1, L'], ids of the masked words, -100 elsewhere, only with `mask_words`
    return_loss: bool  # `True`, so that `model(**batch)` returns a loss
    teacher_inputs: dict[str, Any]  # only with `read_for_teacher` or `view_for_teacher`
    ids: list[str]  # only with `return_ids`
    counts: dict[str, int]  # only with `return_ids`


class LoTLIPCollator:
    """
    Makes batches from records, for a `torch.utils.data.DataLoader` and for `transformers.Trainer` (with
    `remove_unused_columns=False`, because the columns of records are not arguments of the model).

    `lotlip_hf.data.records.load_records` reads records ([`~lotlip_hf.data.record.Record`]) from data sets.

    Args:
        processor (`LoTLIPProcessor`): Converts images and texts to tensors.
        draw (`Callable`, *optional*, defaults to `SubCaptions()`): Draws the texts of a step from the captions of the
            records in a batch (see `lotlip_hf.data.sampling`). The default follows the paper.
        seed (`int`, *optional*, defaults to 0): Seed for drawing texts, combined with the epoch and the id of a
            record.
        on_error (`str`, *optional*, defaults to `"raise"`): `"raise"` stops at the first broken image or record.
            `"skip"` leaves broken ones out of the batch and counts them.
        return_ids (`bool`, *optional*, defaults to `False`): Whether to add `ids` and `counts` to batches, which
            `model(**batch)` does not accept.
        patch_dropout (`float`, *optional*, defaults to 0.0): Fraction of the patches of an image to leave out, drawn
            at random as in FLIP.
        patch_size (`int`, *optional*): Side of the model's patches in pixels. Required with `patch_dropout`.
        return_texts (`bool`, *optional*, defaults to `False`): Whether to add `texts` to batches, for a teacher.
        return_text_keys (`bool`, *optional*, defaults to `False`): Whether to add `text_keys` to batches, for terms
            with `equal_positives`: for a short text the digest of the short caption, for a long text that of all long
            captions of the record. Case and white space do not change a digest. `model(**batch)` does not accept
            `text_keys`.
        num_negatives (`int`, *optional*, defaults to 0): Number of `negatives` of a record to draw in a step, without
            repetition. They follow the long texts. Where a record has fewer, its short caption fills the row, and
            `negative_mask` is `False`. With 0, negatives cost nothing: none is drawn, tokenised or embedded.
            `model(**batch)` does not accept `negative_mask`; [`~lotlip_hf.training.objective.embed`] splits the
            negatives off.
        num_regions (`int`, *optional*, defaults to 0): Number of `regions` of a record to draw in a step, without
            repetition. Their texts follow the negatives, and `boxes` has their boxes in the image that the model sees:
            if the image processor crops, boxes are cropped too, and those with their centre outside are left out.
            Where a record has fewer, its short caption and the box of the whole image fill the row, and `box_mask` is
            `False`. `region_keys` has the digests of the texts. With 0, regions cost nothing. `model(**batch)` does
            not accept `boxes`, `box_mask` and `region_keys`.
        return_tags (`bool`, *optional*, defaults to `False`): Whether to add `tags` to batches: the digests of the
            tags of each record, for which case and white space do not matter. K is the largest number of tags in the
            batch, at least 1. Without it, tags cost nothing. `model(**batch)` does not accept `tags`.
        return_groups (`bool`, *optional*, defaults to `False`): Whether to add `groups` to batches: the digest of the
            `group` of each record, or of its id if it has none. `model(**batch)` does not accept `groups`.
        mask_words (`bool`, *optional*, defaults to `False`): Whether to add a text with masked words behind the long
            texts and the negatives: the first long text of a step, or the short one if there are no long texts.
            `masked_labels` hold the ids of the masked words. `model(**batch)` does not accept `masked_labels`.
        word_scores (`WordScores`, *optional*): Scores of words. Words with a low score are masked in the short and
            long texts, and words with a high one in the text of `mask_words`, with the probabilities of GA-DMS.
            Without scores, `mask_words` masks 15 % of the words, and no other text has masked words.
        read_for_teacher (`Callable`, *optional*): Returns the inputs of a teacher for a record, by name. They become
            `teacher_inputs` of the batch: tensors [1, ...] are concatenated, other values are listed. An error that it
            raises makes the record a broken one.
        augment (`Augment`, *optional*): Random changes of the images, drawn by `seed`, the
            epoch and the id of a record. A teacher that reads the record sees the image without them.
        image_views (`int`, *optional*, defaults to 1): Number of views of an image, 1 or 2, each with changes of its
            own. 2 needs `augment` with a crop.
        view_for_teacher (`bool`, *optional*, defaults to `False`): Whether to add, with two views, `teacher_inputs`
            for a model that sees both: `pixel_values` [B, 3, H, W] of the smallest part of each image that holds both
            views, without other changes, and `view_boxes` [B, 2, 4] with the left, top, right and bottom edges of the
            views as shares of that part. For a mirror image, left and right are exchanged.
        frozen (`Collection[str]`, *optional*): `"image"` for keys of images instead of pixels, `"text"` for texts
            instead of token ids. [`~lotlip_hf.training.frozen.add_states`] adds their states.

    Raises:
        `ValueError`: If an option is out of range, or the tokenizer cannot mask words.

    Example:

    ```python
    >>> from torch.utils.data import DataLoader
    >>> from transformers import AutoModel, AutoProcessor
    >>> from lotlip_hf.data.collator import LoTLIPCollator
    >>> from lotlip_hf.scenes.dataset import scenes_dataset

    >>> model = AutoModel.from_pretrained("checkpoint")
    >>> collator = LoTLIPCollator(AutoProcessor.from_pretrained("checkpoint"))
    >>> loader = DataLoader(scenes_dataset(16), batch_size=8, shuffle=True, collate_fn=collator)
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
        augment: Augment | None = None,
        image_views: int = 1,
        view_for_teacher: bool = False,
        frozen: Collection[str] = (),
        return_texts: bool = False,
        return_text_keys: bool = False,
        num_negatives: int = 0,
        num_regions: int = 0,
        return_tags: bool = False,
        return_groups: bool = False,
        mask_words: bool = False,
        word_scores: WordScores | None = None,
        read_for_teacher: Callable[[Record], Mapping[str, Any]] | None = None,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f'`on_error` must be "raise" or "skip", got {on_error!r}.')
        if not 0 <= patch_dropout < 1 or (patch_dropout and not patch_size):
            raise ValueError(f"`patch_dropout` must be in [0, 1) and needs `patch_size`, got {patch_dropout}.")
        for name, number in (("num_negatives", num_negatives), ("num_regions", num_regions)):
            if number < 0:
                raise ValueError(f"`{name}` must be at least 0, got {number}.")
        if augment is not None and augment.moves and num_regions:
            raise ValueError("`augment` crop and flip would move the boxes of `num_regions`. Leave one of them out.")
        if "text" in frozen and (mask_words or word_scores is not None):
            raise ValueError("`mask_words` and `word_scores` need token ids. Leave texts out of `frozen`.")
        self.processor = processor
        self.draw = draw or SubCaptions()
        self.seed = seed
        self.on_error = on_error
        self.return_ids = return_ids
        self.patch_dropout = patch_dropout
        self.patch_size = patch_size
        self.augment = augment
        self.crop_size = None
        if augment is not None and augment.crop:
            self.crop_size = crop_size(getattr(processor, "image_processor", processor))
        if image_views not in (1, 2) or (image_views == 2 and self.crop_size is None):
            raise ValueError(f"`image_views` must be 1, or 2 with a crop in `augment`, got {image_views}.")
        self.image_views, self.view_for_teacher = image_views, view_for_teacher
        self.frozen = frozen
        self.return_texts = return_texts
        self.return_text_keys = return_text_keys
        self.num_negatives = num_negatives
        self.num_regions = num_regions
        self.return_tags = return_tags
        self.return_groups = return_groups
        self.mask_words, self.word_scores = mask_words, word_scores
        self.masking = Masking(processor.tokenizer) if mask_words or word_scores is not None else None
        self.read_for_teacher = read_for_teacher
        # In shared memory, so that persistent workers of a DataLoader see a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._warnings = 0

    def set_epoch(self, epoch: int) -> None:
        """
        Sets the epoch, which determines the drawn texts. Call it before iterating over the `DataLoader`.

        Args:
            epoch (`int`): Number of the epoch.
        """
        self._epoch.fill_(epoch)

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> Batch:
        """
        Makes a batch from records. Broken records are left out if `on_error` is `"skip"`.

        Args:
            records (`Sequence[Mapping[str, Any]]`): The records.

        Returns:
            `Batch`: The batch. Short texts are padded to the longest short text, long texts to the longest long text.
            `counts` has the number of given `records`, of records left out (`broken_images`, `broken_records`), of
            damaged shards (`broken_shards`), and of records that repeat the short caption as long text (`stand_ins`).

        Raises:
            `ImageError`: If an image is broken and `on_error` is `"raise"`.
            `RecordError`: If a record or a shard (`ShardError`) is broken and `on_error` is `"raise"`, or if all
                records are broken.
            `KeyError`: If the records lack a required field.
            `ValueError`: If the records lack captions that `draw` needs.
        """
        image_processor = plain_image_processor(getattr(self.processor, "image_processor", self.processor))
        of_image = {"image_processor": image_processor, "background": background_of(self.processor)}
        counts = Counter(dict.fromkeys(COUNTED, 0), records=len(records))
        checked: list[Record] = []
        images: list[Any] = []
        inputs: list[Mapping[str, Any]] = []
        errors: list[ValueError] = []
        for record in records:
            try:
                if "image" in self.frozen:
                    read = check_record(record)
                    image = image_key(read)
                else:  # one image at a time, as a batch of large images could fill the memory
                    load = partial(load_sized_pixels, **of_image)
                    if self.augment is not None:
                        first, second = (
                            record_rng(self.seed, int(self._epoch), str(record.get("id")), f"view {number}")
                            for number in (0, 1)
                        )
                        drawn = {"augment": self.augment, "size": self.crop_size, **of_image}
                        load = partial(load_augmented, rng=first, **drawn)
                        if self.image_views == 2:
                            load = partial(load_views, rngs=[first, second], around=self.view_for_teacher, **drawn)
                    read, (image, size) = read_record(record, load)
                    if self.num_regions:
                        read = _seen(read, kept_box(size, image_processor))
                if self.read_for_teacher is not None:
                    inputs.append(self.read_for_teacher(read))
            except (ImageError, RecordError) as error:
                if self.on_error == "raise":
                    raise
                kinds = {ImageError: "broken_images", ShardError: "broken_shards"}
                counts[kinds.get(type(error), "broken_records")] += 1
                self._warn(error)
                errors.append(error)
                continue
            checked.append(read)
            images.append(image)
        if not checked:
            first = f" The first error: {errors[0]}" if errors else ""
            raise RecordError(f"All {len(records)} records of a batch are broken.{first}")

        rngs = [record_rng(self.seed, int(self._epoch), record["id"]) for record in checked]
        texts = self.draw(checked, rngs)
        numbers = [len(drawn.long) for drawn in texts]
        if len(texts) != len(checked) or len(set(numbers)) > 1:
            raise ValueError(
                f"{self.draw} must draw the same number of long texts for each of {len(checked)} records, got "
                f"{numbers}."
            )
        counts["stand_ins"] = sum(drawn.stand_in for drawn in texts)
        # Tensors come first: accelerate reads the size of a batch from its first entry.
        batch: dict[str, Any] = {}
        if "image" in self.frozen:
            batch["image_keys"] = images
        else:
            batch |= {name: torch.cat([torch.as_tensor(image[name]) for image in images]) for name in images[0]}
        if self.patch_dropout and self.patch_size:
            kept = [self._draw_patches(batch, self.patch_size, rngs) for _ in range(self.image_views)]
            batch["kept_patches"] = kept[0] if self.image_views == 1 else torch.stack(kept, dim=1)
        negatives = [self._draw_negatives(record, rng) for record, rng in zip(checked, rngs, strict=True)]
        regions = [_draw_regions(record, self.num_regions, rng) for record, rng in zip(checked, rngs, strict=True)]
        masked = [(drawn.long or [drawn.short])[:1] if self.mask_words else [] for drawn in texts]
        rows = [
            [*drawn.long, *own, *(region["text"] for region in drawn_regions), *last]
            for drawn, (own, _), (drawn_regions, _), last in zip(texts, negatives, regions, masked, strict=True)
        ]
        if "text" not in self.frozen:
            options = {"return_tensors": "pt", "return_offsets_mapping": self.masking is not None}
            short = self.processor(text=[drawn.short for drawn in texts], **options)
            batch |= {"input_ids": short["input_ids"], "attention_mask": short["attention_mask"]}
            if any(rows):
                long = self.processor(text=rows, **options)
                batch |= {"long_input_ids": long["input_ids"], "long_attention_mask": long["attention_mask"]}
            if self.masking is not None:
                inputs_of = [short, long] if any(rows) else [short]
                batch |= self._mask(self.masking, checked, texts, rows, inputs_of, rngs)
        if "text" in self.frozen or self.return_texts:
            batch["texts"] = [[drawn.short, *row] for drawn, row in zip(texts, rows, strict=True)]
        if self.return_text_keys:
            batch["text_keys"] = torch.tensor([_text_keys(*pair) for pair in zip(checked, texts, strict=True)])
        if self.num_negatives:
            batch["negative_mask"] = torch.tensor([mask for _, mask in negatives])
        if self.num_regions:
            if "image" not in self.frozen:  # else the size of the images is unknown
                boxes = [[region["box"] for region in drawn_regions] for drawn_regions, _ in regions]
                batch["boxes"] = torch.tensor(boxes, dtype=torch.float32)
            batch["region_keys"] = torch.tensor(
                [[texts_digest([region["text"]]) for region in drawn_regions] for drawn_regions, _ in regions]
            )
            batch["box_mask"] = torch.tensor([mask for _, mask in regions])
        if self.return_tags:
            batch["tags"] = _tag_keys(checked)
        if self.return_groups:
            batch["groups"] = torch.tensor([group_key(record) for record in checked])
        if inputs:
            batch["teacher_inputs"] = {name: _joined([each[name] for each in inputs]) for name in inputs[0]}
        elif "around" in batch:
            batch["teacher_inputs"] = {"pixel_values": batch.pop("around"), "view_boxes": batch.pop("view_boxes")}
        batch["return_loss"] = True
        if self.return_ids:
            batch |= {"ids": [record["id"] for record in checked], "counts": dict(counts)}
        return cast(Batch, batch)

    def _mask(
        self,
        masking: Masking,
        records: Sequence[Record],
        texts: Sequence[Texts],
        rows: Sequence[list[str]],
        encodings: Sequence[Mapping[str, torch.Tensor]],
        rngs: Sequence[Random],
    ) -> dict[str, torch.Tensor]:
        """Masks words of the short, long and masked texts in place. Returns `masked_labels`, if there are any."""
        labels = []
        for number, (record, drawn, row, rng) in enumerate(zip(records, texts, rows, rngs, strict=True)):
            ids, offsets = (
                [encodings[0][name][number], *(each for one in encodings[1:] for each in one[name][number])]
                for name in ("input_ids", "offset_mapping")
            )
            matched = range(1 + len(drawn.long)) if self.word_scores is not None else range(0)
            indices = [*matched, len(row)] if self.mask_words else [*matched]
            found = [masking.words([drawn.short, *row][index], ids[index], offsets[index]) for index in indices]
            scores: list[list[float | None]] = [[None] * len(words) for words, _ in found]
            if self.word_scores is not None:
                scores = self.word_scores.scores(record["id"], [words for words, _ in found])
            if self.mask_words:
                probabilities = [prediction_probability(score) for score in scores.pop()]
                labels.append(masking.mask(ids[-1], found.pop()[1], probabilities, rng, at_least=1))
            for index, (_, tokens), own in zip(matched, found, scores, strict=True):
                masking.mask(ids[index], tokens, [noise_probability(score) for score in own], rng)
        return {"masked_labels": torch.stack(labels).unsqueeze(1)} if labels else {}

    def _draw_patches(
        self, batch: Mapping[str, torch.Tensor], patch_size: int, rngs: Sequence[Random]
    ) -> torch.Tensor:
        """Indices [B, K] of the patches to embed, drawn for each image and filled up with its padding."""
        if "pixel_attention_mask" in batch:
            numbers = batch["pixel_attention_mask"].sum(1).tolist()
        else:
            numbers = [math.prod(side // patch_size for side in batch["pixel_values"].shape[-2:])] * len(rngs)
        kept = [
            sorted(rng.sample(range(number), max(1, round((1 - self.patch_dropout) * number))))
            for rng, number in zip(rngs, numbers, strict=True)
        ]
        longest = max(map(len, kept))
        # An image with fewer patches to keep than the largest has padding, which starts at the index `number`.
        filled = [row + [number] * (longest - len(row)) for row, number in zip(kept, numbers, strict=True)]
        return torch.tensor(filled)

    def _draw_negatives(self, record: Record, rng: Random) -> tuple[list[str], list[bool]]:
        """Returns negatives of a record, filled up with its short caption, and which of them are negatives."""
        known, number = record.get("negatives", []), self.num_negatives
        drawn = rng.sample(known, min(number, len(known)))
        if write := getattr(self.draw, "negative", None):
            drawn = [write(record, text, rng) for text in drawn]
        rest = number - len(drawn)
        return drawn + [record["short_caption"]] * rest, [True] * len(drawn) + [False] * rest

    def _warn(self, error: ValueError) -> None:
        self._warnings += 1
        if self._warnings <= MAX_WARNINGS:
            logger.warning(f"Left out: {error}")
        if self._warnings == MAX_WARNINGS:
            logger.warning("Further broken images and records are only counted (`counts` of a batch).")


def image_key(record: Mapping[str, Any]) -> str:
    """Returns the key of an image whose states are known, or raises the error that occurred when it was read."""
    key = record["image_key"]
    if isinstance(key, Exception):
        raise key
    return key


def num_riders(batch: Mapping[str, Any]) -> dict[str, int]:
    """Returns the numbers of the riders of each record, the last of its texts, by the name of their embeddings."""
    return {name: batch[tensor].shape[1] for name, tensor in RIDERS.items() if tensor in batch}


def _seen(record: Record, kept: tuple[float, float, float, float]) -> Record:
    """Returns a record with the regions in the part of its image that the image processor keeps."""
    if "regions" not in record or kept == (0.0, 0.0, 1.0, 1.0):
        return record
    left, top, right, bottom = kept
    edges = [(left, right - left), (top, bottom - top)] * 2
    seen: list[Region] = []
    for region in record["regions"]:
        box = [(value - low) / length for value, (low, length) in zip(region["box"], edges, strict=True)]
        if all(0 <= first + last <= 2 for first, last in zip(box[:2], box[2:], strict=True)):
            seen.append({"box": [min(max(value, 0.0), 1.0) for value in box], "text": region["text"]})
    return {**record, "regions": seen}


def _draw_regions(record: Record, number: int, rng: Random) -> tuple[list[Region], list[bool]]:
    """Returns regions of a record, filled up with its image and short caption, and which of them are regions."""
    known = [region for region in record.get("regions", []) if region["text"].strip()]
    drawn = rng.sample(known, min(number, len(known)))
    rest = number - len(drawn)
    whole = Region(box=[0.0, 0.0, 1.0, 1.0], text=record["short_caption"])
    return drawn + [whole] * rest, [True] * len(drawn) + [False] * rest


def group_key(record: Mapping[str, Any]) -> int:
    """Returns a digest that the records of a group share, or of the id of a record without a group."""
    group = record.get("group")
    name = f"group\0{group}" if group else f"id\0{record['id']}"
    return digest_of(name) - (1 << 63)


def _tag_keys(records: Sequence[Record]) -> torch.Tensor:
    """Returns the digests [B, K] of the tags of each record, padded with 0."""
    digests = [[texts_digest([tag]) for tag in record.get("tags", [])] for record in records]
    longest = max(1, *map(len, digests))
    return torch.tensor([row + [0] * (longest - len(row)) for row in digests])


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], torch.Tensor) else values


def _text_keys(record: Record, texts: Texts) -> list[int]:
    """Returns the digests of the captions that the short text and each long text were drawn from."""
    short = texts_digest([record["short_caption"]])
    long = short if texts.stand_in else texts_digest(record["long_captions"])
    return [short, *[long] * len(texts.long)]


def read_record(record: Mapping[str, Any], load: Callable[[Any, str], Any] = load_image) -> tuple[Record, Any]:
    """Checks a record ([`~lotlip_hf.data.record.check_record`]), loads its image, and returns both."""
    checked = check_record(record)
    try:
        return checked, load(checked["image"], f"record {checked['id']}")
    except TypeError as error:
        raise RecordError(str(error)) from error
