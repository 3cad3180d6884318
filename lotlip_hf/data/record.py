"""What a record is: an image, its texts and its id; the check of their types; and what is drawn from it for a step."""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple, TypedDict, cast

from ..files import MAX_CHARACTERS, printable


class RecordError(ValueError):
    """A record that cannot be trained on. The message names it by its id."""


class ShardError(RecordError):
    """A file of a data set that ends too soon. The message names it and says how many records came before."""


class Region(TypedDict):
    """A text about a part of an image: `box` is [x0, y0, x1, y1] from the top left corner, each from 0 to 1."""

    box: list[float]
    text: str


class RequiredFields(TypedDict):
    """The fields that every record has."""

    image: Any
    short_caption: str
    long_captions: list[str]
    id: str


class Record(RequiredFields, total=False):
    """
    A row of training data.

    `image` is what [`~lotlip_hf.images.load_image`] takes. A record with `error` is broken for that reason; with
    `is_shard` it stands for a shard that ended too soon. A record without an optional field lacks the key, or holds
    `None`; other keys are kept.
    """

    error: str | None
    is_shard: bool
    negatives: list[str]
    rewrites: list[str]
    tags: list[str]
    regions: list[Region]
    group: str


class Texts(NamedTuple):
    """The texts of an image in a step; with `stand_in` there was no long caption and the short one is repeated."""

    short: str
    long: list[str]
    stand_in: bool


# The texts of each record of a batch, drawn by a random generator for each.
Draw = Callable[[Sequence[Record], Sequence[Random]], list[Texts]]


def record_rng(seed: int, epoch: int, record_id: str) -> Random:
    """The random generator of a record in an epoch: the same in every process and version of Python."""
    return Random(f"{seed}\0{epoch}\0{record_id}")  # a string seeds it through SHA-512


class Kind(NamedTuple):
    """A type of a record's field: how errors call it, whether a value is one, and the texts that it holds."""

    expected: str
    is_valid: Callable[[Any], bool]
    texts: Callable[[Any], list[str | None]]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str | None) for text in value)


def _is_region(value: Any) -> bool:
    match value:
        case {"box": [x0, y0, x1, y1] as box, "text": str()}:
            if all(type(one) in (int, float) for one in box):
                return 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1
    return False


TEXT = Kind("a text", lambda value: isinstance(value, str), lambda value: [value])
TEXTS = Kind("a list of texts", _is_texts, list)
REGIONS = Kind(
    "a list of {box: [x0, y0, x1, y1] in 0..1, text}",
    lambda value: isinstance(value, list) and all(map(_is_region, value)),
    lambda value: [region["text"] for region in value],
)
OPTIONAL = {"negatives": TEXTS, "rewrites": TEXTS, "tags": TEXTS, "regions": REGIONS, "group": TEXT}
FIELDS = {"short_caption": TEXT, "long_captions": TEXTS, **OPTIONAL}


def problem_of(record: Mapping[str, Any]) -> str | None:
    """The first field of a record's texts with a wrong type, as errors say it; `None` for missing fields is right."""
    for name, kind in FIELDS.items():
        value = record.get(name)
        if value is None:
            continue
        if not kind.is_valid(value):
            return f"`{name}` must be {kind.expected}, got {printable(repr(value)[:80])}"
        if (longest := max((len(text or "") for text in kind.texts(value)), default=0)) > MAX_CHARACTERS:
            return f"a text of `{name}` has {longest:,} characters, more than {MAX_CHARACTERS:,}"
    return None


def check_record(record: Mapping[str, Any]) -> Record:
    """
    The record to train on: its id is a text, a long caption that is `None` is `""`, and optional fields and texts that
    are `None` or empty are left out.

    Raises:
        KeyError: if it lacks a required field.
        RecordError: if it or its shard (`ShardError`) is broken.
    """
    if missing := [name for name in RequiredFields.__annotations__ if name not in record]:
        raise KeyError(
            f"Records have no {', '.join(missing)}; they have {', '.join(record) or 'nothing'}. With "
            "transformers.Trainer set `remove_unused_columns=False`; to read other data sets see "
            "lotlip_hf.data.records."
        )
    if record.get("error"):
        raise (ShardError if record.get("is_shard") else RecordError)(record["error"])
    record_id = str(record["id"]) if isinstance(record["id"], int) else record["id"]
    if not isinstance(record_id, str) or not record_id:
        raise RecordError(f"a record's `id` must be a string that is not empty, got {record_id!r}.")
    problem = problem_of(record)
    if problem is None and not (record["short_caption"] or "").strip():
        problem = f"`short_caption` must be a text, got {record['short_caption']!r}"
    if problem is not None:
        raise RecordError(f"record {record_id}: {problem}.")
    checked = {name: value for name, value in record.items() if name not in OPTIONAL}
    for name, kind in OPTIONAL.items():
        value = record.get(name)
        if value := [text for text in value if text] if value and kind is TEXTS else value:
            checked[name] = value
    captions = [caption or "" for caption in record["long_captions"] or ()]
    return cast(Record, {**checked, "id": record_id, "long_captions": captions})
