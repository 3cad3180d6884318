"""Warnings before training: data and options that are likely to waste a run."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from random import Random
from typing import Any, cast

from datasets import Dataset, IterableDataset
from torch import nn
from transformers.utils import logging

from ..data.collator import read_record
from ..data.masking import WordScores
from ..data.record import Record, RecordError, Texts, caption_key, record_rng
from ..distributed import rank, world_size
from ..encoder import Encoder
from ..files import printable
from ..images import ImageError
from ..modeling.modeling_lotlip import LoTLIPModel
from ..modeling.processing_lotlip import LoTLIPProcessor
from .config import TrainingConfig
from .data import intact_texts

logger = logging.get_logger(__name__)

# Maximum numbers of sampled records: with compared captions, with tokenised texts, with decoded images
COMPARED, TOKENISED, DECODED = 10_000, 2_000, 200
FEW_RECORDS = 50_000
FEW_HELD_OUT = 20
# Maximum numbers of passes over few records without a warning: if a tower trains, and if only the heads train
MANY_EPOCHS, MANY_EPOCHS_OF_HEADS = 20, 200
LEAST_SHARE = 0.01  # of the captions
FLAT = 8  # maximum difference between the values of a channel in an image of one colour
SHOWN = 60  # characters of a caption
# Tensors that terms need, and their fields
ROLES = {"negative_embeds": "negatives", "tags": "tags", "region_embeds": "regions"}
GROUPED = ("margin", "groups")  # terms without an effect on records without a group


def warn_of_data(
    model: LoTLIPModel,
    processor: LoTLIPProcessor,
    records: Dataset | IterableDataset,
    config: TrainingConfig,
    max_steps: int,
    num_held_out: int | None = None,
    *,
    terms: Mapping[str, nn.Module] | None = None,
    word_scores: WordScores | None = None,
) -> list[str]:
    """
    Logs warnings on the main process, each once in a program: records that are never seen or seen very often, few
    evaluation records, texts that are cut, captions that several records share, fields that a term needs and no record
    has, and images of one colour. The time does not grow with the number of records, because captions and images are
    checked on a sample, which the seed determines. Broken records are left out. A stream is not checked.

    Args:
        model (`LoTLIPModel`): The model.
        processor (`LoTLIPProcessor`): The processor of the model.
        records (`Dataset` or `IterableDataset`): Training records.
        config (`TrainingConfig`): Options of the run.
        max_steps (`int`): Number of steps.
        num_held_out (`int`, *optional*): Number of evaluation records.
        terms (`Mapping[str, nn.Module]`, *optional*): The terms of the objective by name, for which a sample of the
            records is checked. By default, only the number of records is compared with the steps.
        word_scores (`WordScores`, *optional*): The scores of words, which a sample of the records should have.

    Returns:
        `list[str]`: The warnings.
    """
    if isinstance(records, IterableDataset) or rank():
        return []
    warnings = [_passes(len(records), config, max_steps), _few_held_out(num_held_out)]
    if terms is not None:
        indices = Random(config.seed).sample(range(len(records)), min(COMPARED, len(records)))
        encoder = Encoder(model, processor)
        needs = {name: cast(Any, term).needs for name, term in terms.items()}
        sample = [record for _, record in intact_texts(records, indices)]
        warnings += [
            _cut_texts(sample[:TOKENISED], encoder, config),
            _equal_captions(sample, needs, config),
            *_missing_roles(sample, needs),
            None if word_scores is None else _missing_scores(sample, word_scores),
            _flat_images(records, indices[:DECODED], encoder),
        ]
    shown = [warning for warning in warnings if warning is not None]
    for warning in shown:
        logger.warning_once(warning)
    return shown


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
    many = MANY_EPOCHS_OF_HEADS if config.has_frozen_towers else MANY_EPOCHS
    if number <= FEW_RECORDS and epochs > many and config.patience is None:
        return (
            f"The run has {run}, {epochs:.0f} passes over {number:,} pictures, which it may learn by heart. Hold out "
            "pictures with --eval-share, and stop with --eval-steps and --patience when their recall no longer rises."
        )
    return None


def _few_held_out(number: int | None) -> str | None:
    """Tells that recalls over few evaluation records are high by chance."""
    if number is None or number >= FEW_HELD_OUT:
        return None
    return (
        f"Retrieval is measured on {number:,} pictures, where R@10 is {min(1, 10 / number):.0%} by chance. Hold out "
        "more with --eval-share or --eval-data."
    )


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


def _equal_captions(
    records: Sequence[Record], needs: Mapping[str, Collection[str]], config: TrainingConfig
) -> str | None:
    """Counts the records that share a caption with another record."""
    if any("text_keys" in each for each in needs.values()):  # `equal_positives`
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
    advice = "Write captions that differ, or keep one picture of each."
    if term := next((term for term in ("infonce", "primary_components") if term in needs), None):
        advice += (
            f" If a step draws parts of captions, pass --term-options {term}.equal_positives=true, else parts of "
            "equal captions are false negatives."
        )
    return f"Of {len(records):,} pictures, {' and '.join(parts)}. No text tells such pictures apart. {advice}"


def _missing_roles(records: Sequence[Record], needs: Mapping[str, Collection[str]]) -> Iterator[str]:
    """Names the fields that a term needs and no record has."""
    for term, names in needs.items():
        for role in (*(ROLES[name] for name in names if name in ROLES), *(["group"] if term in GROUPED else [])):
            if not any(record.get(role) for record in records):
                yield (
                    f"None of {len(records):,} records has `{role}`, so the term {term} has no effect. Add this field "
                    "to the data."
                )


def _missing_scores(records: Sequence[Record], word_scores: WordScores) -> str | None:
    """Counts the records whose words have no scores."""
    number = sum(not word_scores.texts(record["id"]) for record in records[:TOKENISED])
    if not number:
        return None
    return (
        f"Of {len(records[:TOKENISED]):,} records, {number:,} have no scores in `word_scores` "
        f"{printable(word_scores.file)}. Their words are masked uniformly for masked_words, and not in other texts. "
        "Score the records of --data, with the same ids."
    )


def _flat_images(records: Dataset, indices: Sequence[int], encoder: Encoder) -> str | None:
    """Counts the images of one colour, such as a white drawing on a transparent background."""
    flat, number = [], 0
    for index in indices:
        try:
            record, image = read_record(records[index], encoder.engine.open)
        except (ImageError, RecordError):
            continue
        number += 1
        if all(high - low <= FLAT for low, high in image.getextrema()):
            flat.append(record["id"])
    if not flat:
        return None
    return (
        f"{len(flat)} of {number} pictures have one colour, such as record {printable(flat[0])} (transparent pixels "
        f"are {encoder.engine.background or 'opaque'}). Check these files."
    )
