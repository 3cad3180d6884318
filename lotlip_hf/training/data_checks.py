"""Warnings before training: data and options that are likely to waste a run."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, cast

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..data.collator import read_record
from ..data.record import Record, RecordError, Texts, caption_key, check_record, record_rng
from ..data.records import FEATURES
from ..distributed import rank, world_size
from ..encoder import Encoder
from ..files import printable
from ..images import ImageError, background_of, load_image
from ..modeling.modeling_lotlip import LoTLIPModel
from ..modeling.processing_lotlip import LoTLIPProcessor
from .config import TrainingConfig
from .terms import make_terms

logger = logging.get_logger(__name__)

# Maximum numbers of sampled records: with compared captions, with tokenised texts, with decoded images
COMPARED, TOKENISED, DECODED = 10_000, 2_000, 200
READ_TOGETHER = 100  # records
FEW_RECORDS = 50_000
# Passes over few records above which a warning follows: if a tower trains, and if only heads on frozen towers train
MANY_EPOCHS, MANY_EPOCHS_OF_HEADS = 20, 200
LEAST_SHARE = 0.01  # of the captions
FLAT = 8  # maximum difference between the values of a channel in an image of one colour
SHOWN = 60  # characters of a caption
ROLES = {"negative_embeds": "negatives", "tags": "tags"}  # tensors that terms need, and their fields


def warn_of_data(
    model: LoTLIPModel,
    processor: LoTLIPProcessor,
    records: Dataset | IterableDataset,
    config: TrainingConfig,
    max_steps: int,
) -> list[str]:
    """
    Logs warnings on the main process, each once in a program: records that are never seen or seen very often, texts
    that are cut, captions that several records share, fields that a term needs and no record has, and images of one
    colour. The time does not grow with the number of records, because captions and images are checked on a sample,
    which the seed determines. Broken records are left out. A stream is not checked.

    Args:
        model (`LoTLIPModel`): The model.
        processor (`LoTLIPProcessor`): The processor of the model.
        records (`Dataset` or `IterableDataset`): Training records.
        config (`TrainingConfig`): Options of the run.
        max_steps (`int`): Number of steps.

    Returns:
        `list[str]`: The warnings.
    """
    if isinstance(records, IterableDataset) or rank():
        return []
    indices = Random(config.seed).sample(range(len(records)), min(COMPARED, len(records)))
    sample = list(_readable(text_records(records), indices))
    encoder = Encoder(model, processor)
    warnings = [
        _passes(len(records), config, max_steps),
        _cut_texts(sample[:TOKENISED], encoder, config),
        _equal_captions(sample, config),
        *_missing_roles(sample, config),
        _flat_images(records, indices[:DECODED], processor),
    ]
    shown = [warning for warning in warnings if warning is not None]
    for warning in shown:
        logger.warning_once(warning)
    return shown


def text_records(records: Any) -> Any:
    """Returns the records without their images, unless they are a list, or a transform of them needs the images."""
    if not isinstance(records, Dataset):
        return records
    if records.features.get("image") != FEATURES["image"] and records.format["type"] is not None:
        return records
    return records.select_columns([name for name in records.column_names if name != "image"])


def _readable(records: Dataset, indices: Sequence[int]) -> Iterator[Record]:
    for start in range(0, len(indices), READ_TOGETHER):
        for record in records.__getitems__([*indices[start : start + READ_TOGETHER]]):
            try:
                yield check_record({"image": None, **record})
            except RecordError:
                continue


def _passes(number: int, config: TrainingConfig, max_steps: int) -> str | None:
    """Compares the steps with the number of records."""
    per_step = config.batch_size * config.gradient_accumulation_steps * world_size()
    epochs = max_steps * per_step / number
    run = f"{max_steps:,} steps of {per_step:,} pictures"
    if round(epochs, 1) < 1:
        return (
            f"The run has {run} and never sees {number - max_steps * per_step:,} of {number:,} pictures. Pass "
            f"--max-steps {math.ceil(number / per_step)} to see each once."
        )
    is_watched = config.patience is not None
    if (
        number <= FEW_RECORDS
        and not is_watched
        and epochs > (MANY_EPOCHS_OF_HEADS if config.has_frozen_towers else MANY_EPOCHS)
    ):
        return (
            f"The run has {run}, {epochs:.0f} passes over {number:,} pictures, which it may learn by heart. Hold out "
            "pictures with --eval-share, and stop with --eval-steps and --patience when their recall no longer rises."
        )
    return None


def _cut_texts(records: Sequence[Record], encoder: Encoder, config: TrainingConfig) -> str | None:
    """Counts the texts that are cut: those that a step draws, and the whole captions, which evaluation uses."""
    draw, drawn = config.draw(), list[Texts]()
    for record in records:
        try:
            drawn += draw([record], [record_rng(config.seed, 0, record["id"])])
        except ValueError:  # training names records that lack a caption
            continue
    texts = {"drawn texts": [text for each in drawn for text in (each.short, *each.long)]}
    if config.num_long_texts:
        texts["long captions"] = [text for record in records for text in record["long_captions"] if text]
    limit = encoder.max_text_length
    for kind, given in texts.items():
        share = sum(encoder.engine.tokenize(given, limit)[1]) / len(given) if given else 0
        if share >= LEAST_SHARE:
            advice = "a larger --max-text-length" + (" or a smaller --num-sentences" if kind == "drawn texts" else "")
            return f"{share:.0%} of {len(given):,} {kind} are longer than {limit} tokens and are cut. Pass {advice}."
    return None


def _equal_captions(records: Sequence[Record], config: TrainingConfig) -> str | None:
    """Counts the records that share a caption with another record."""
    if any(option.replace(" ", "").lower() == "infonce.equal_positives=true" for option in config.term_options):
        return None
    kinds = {"short": [[record["short_caption"]] for record in records]}
    if config.num_long_texts:
        kinds["long"] = [record["long_captions"] for record in records]
    parts = []
    for kind, captions in kinds.items():
        keys = [{caption_key(caption) for caption in own} - {""} for own in captions]
        counts = Counter(key for own in keys for key in own)
        number = sum(any(counts[key] > 1 for key in own) for own in keys)
        if number and number >= LEAST_SHARE * len(records):
            caption, times = counts.most_common(1)[0]
            caption = caption if len(caption) <= SHOWN else f"{caption[: SHOWN - 3]}..."
            parts.append(
                f'{number / len(records):.0%} share a {kind} caption ("{printable(caption)}" {times:,} times)'
            )
    if not parts:
        return None
    return (
        f"Of {len(records):,} pictures, {' and '.join(parts)}. No text tells such pictures apart. Write "
        "captions that differ, or keep one picture of each. If a step draws parts of captions, pass --term-options "
        "infonce.equal_positives=true, else parts of equal captions are false negatives."
    )


def _missing_roles(records: Sequence[Record], config: TrainingConfig) -> Iterator[str]:
    """Names the fields that a term needs and no record has."""
    for name, term in make_terms(config.terms, config.term_options)[0].items():
        for role in (ROLES[need] for need in cast(Any, term).needs & ROLES.keys()):
            if not any(record.get(role) for record in records):
                yield (
                    f"None of {len(records):,} records has `{role}`, so the term {name} has no effect. Add this field "
                    "to the data."
                )


def _flat_images(records: Dataset, indices: Sequence[int], processor: Any) -> str | None:
    """Counts the images of one colour, such as a white drawing on a transparent background."""
    background = background_of(processor)
    flat, number = [], 0
    for index in indices:
        try:
            record, image = read_record(
                records[index],
                lambda source, name: load_image(
                    source, name, image_processor=processor.image_processor, background=background
                ),
            )
        except (ImageError, RecordError):
            continue
        number += 1
        if all(high - low <= FLAT for low, high in image.getextrema()):
            flat.append(record["id"])
    if not flat:
        return None
    return (
        f"{len(flat)} of {number} pictures have one colour, such as record {printable(flat[0])} (transparent pixels "
        f"are {background or 'opaque'}). Check these files."
    )
