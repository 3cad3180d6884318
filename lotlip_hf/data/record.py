"""Records: one image with its captions and id, and the check of their types."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple, TypedDict, cast

from ..files import MAX_CHARACTERS, printable

MAX_FLOAT = 3.4e38  # of float32


class RecordError(ValueError):
    """A record is broken. The message contains the id of the record."""


class ShardError(RecordError):
    """A shard is damaged or truncated. The message contains the name of the shard and the number of intact records."""


class Region(TypedDict):
    """A region of an image and its text. `box` is [x0, y0, x1, y1] from the top left corner, with values in [0, 1]."""

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
    One image with its captions.

    `image` is an argument of [`~lotlip_hf.images.load_image`]. `error` is the reason why a record is broken. With
    `is_shard`, the record represents a damaged shard. An optional field may be missing or `None`. Other keys remain.
    """

    error: str | None
    is_shard: bool
    negatives: list[str]
    rewrites: list[str]
    tags: list[str]
    regions: list[Region]
    group: str
    teacher_image_embeds: list[float]
    teacher_text_embeds: list[float]


class Texts(NamedTuple):
    """The texts of an image in a step. With `stand_in`, the long texts are copies of the short caption."""

    short: str
    long: list[str]
    stand_in: bool


# A strategy: draws the texts of each record of a batch, with one random generator per record.
Draw = Callable[[Sequence[Record], Sequence[Random]], list[Texts]]


def caption_key(caption: str) -> str:
    """Returns a caption in lower case and without superfluous white space; captions with the same key are equal."""
    return " ".join(caption.casefold().split())


def distinct(texts: Iterable[str]) -> list[str]:
    """Returns the texts without repetitions, which may differ in case and white space."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(caption_key(text), text)
    return list(first.values())


def texts_digest(texts: Sequence[str]) -> int:
    """Returns a number of 64 bits that does not depend on case and white space of the texts."""
    plain = "\0".join(map(caption_key, texts)).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "big", signed=True)


def record_rng(seed: int, epoch: int, record_id: str, *names: str) -> Random:
    """
    Returns a random generator of a record in an epoch, the same in every process and version of Python. `names`, such
    as that of a view of the image, give another one.
    """
    return Random("\0".join((str(seed), str(epoch), record_id, *names)))  # Python hashes a string seed with SHA-512


class Kind(NamedTuple):
    """A type of a field: its name in errors, a check of a value, and a function that lists the texts of a value."""

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


def _is_vector(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(type(one) in (int, float) and abs(one) <= MAX_FLOAT for one in value)  # not for NaN
    )


TEXT = Kind("a text", lambda value: isinstance(value, str), lambda value: [value])
TEXTS = Kind("a list of texts", _is_texts, list)
REGIONS = Kind(
    "a list of {box: [x0, y0, x1, y1] in 0..1, text}",
    lambda value: isinstance(value, list) and all(map(_is_region, value)),
    lambda value: [region["text"] for region in value],
)
VECTOR = Kind("a list of finite numbers", _is_vector, lambda value: [])
# Embeddings that were computed before, for `--teacher columns`
VECTORS = {"teacher_image_embeds": VECTOR, "teacher_text_embeds": VECTOR}
OPTIONAL = {"negatives": TEXTS, "rewrites": TEXTS, "tags": TEXTS, "regions": REGIONS, "group": TEXT, **VECTORS}
FIELDS = {"short_caption": TEXT, "long_captions": TEXTS, **OPTIONAL}


def problem_of(record: Mapping[str, Any]) -> str | None:
    """Returns a description of the first text field with a wrong value, or `None`. Missing fields are allowed."""
    for name, kind in FIELDS.items():
        value = record.get(name)
        if value is None:
            continue
        if not kind.is_valid(value):
            return f"`{name}` must be {kind.expected}, got {printable(repr(value)[:80])}"
        if (longest := max((len(text or "") for text in kind.texts(value)), default=0)) > MAX_CHARACTERS:
            return f"a text of `{name}` has {longest:,} characters, more than the maximum of {MAX_CHARACTERS:,}"
    return None


def check_record(record: Mapping[str, Any]) -> Record:
    """
    Checks a record and returns a copy with normalised fields: the id is a string, a long caption `None` becomes `""`,
    and optional fields and texts that are `None` or empty are left out.

    Raises:
        `KeyError`: If a required field is missing.
        `RecordError`: If the record or its shard (`ShardError`) is broken.
    """
    if missing := [name for name in RequiredFields.__annotations__ if name not in record]:
        raise KeyError(
            f"A record lacks {', '.join(missing)}; its fields are {', '.join(record) or 'none'}. Read data sets with "
            "`lotlip_hf.data.records.load_records`, and set `remove_unused_columns=False` of transformers.Trainer."
        )
    if record.get("error"):
        raise (ShardError if record.get("is_shard") else RecordError)(record["error"])
    record_id = str(record["id"]) if isinstance(record["id"], int) else record["id"]
    if not isinstance(record_id, str) or not record_id:
        raise RecordError(f"the `id` of a record must be a string that is not empty, got {record_id!r}.")
    problem = problem_of(record)
    if problem is None and not (record["short_caption"] or "").strip():
        problem = f"`short_caption` must be a text that is not empty, got {record['short_caption']!r}"
    if problem is not None:
        raise RecordError(f"record {record_id}: {problem}.")
    checked = {name: value for name, value in record.items() if name not in OPTIONAL}
    for name, kind in OPTIONAL.items():
        value = record.get(name)
        if value := [text for text in value if text and text.strip()] if value and kind is TEXTS else value:
            checked[name] = value
    captions = [caption or "" for caption in record["long_captions"] or ()]
    return cast(Record, {**checked, "id": record_id, "long_captions": captions})
