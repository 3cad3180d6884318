"""Which columns of a data set make up a record."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ..files import printable
from .readers import column_of
from .record import OPTIONAL

logger = logging.getLogger(__name__)


class MissingColumn(ValueError):
    """
    A data set lacks a column.

    Args:
        problem (`str`): what is missing, in a sentence.
        field (`str`): what of a record it would be: `"image"`, `"short"` or `"long"`.
        hint (`str`, *optional*): what to do about it; by default for `load_records`.
    """

    def __init__(self, problem: str, field: str, hint: str | None = None) -> None:
        self.problem, self.field = problem, field
        if hint is None:
            hint = "Say which to read: `mapping`=ColumnMapping(image=..., long=..., short=...)."
        super().__init__(f"{problem} {hint}")


@dataclass(frozen=True)
class ColumnMapping:
    """
    Which columns of a data set make up a record.

    A column is given by its name, or by the way to a value in it: `conversations[1].value` is the field `value` of the
    second element of the column `conversations`.

    Args:
        image (`str` or `tuple[str, ...]`):
            Column of the images: paths, bytes of files, or images of `datasets`. Of several the first that there is.
            In WebDataset shards it is the only image of a sample; where there are several, the extension of the one to
            read (`input.jpg`).
        long (`str` or `tuple[str, ...]`):
            Columns of the long captions, texts or lists of texts; their order numbers the captioners. `*` and `?`
            match parts of a name (`long*_captions`), the columns they match in the order of the data set. `()` reads
            none.
        short (`str` or `tuple[str, ...]`, *optional*):
            Column of the short caption; of several the first that there is. Where `None`, or none of several among
            which is `None`, the first sentence of the first long caption is the short one.
        id (`str` or `tuple[str, ...]`, *optional*):
            Column of the ids; of several the first that there is. Without one a record's id is the path of its image
            as the data set gives it, in WebDataset shards the shard's name and the sample's key, and else a digest of
            the record.
        negatives, rewrites, tags, regions, group (`str`, *optional*):
            Columns of a record's optional fields, see [`~lotlip_hf.data.record.Record`]. Data sets and rows may lack
            them.
    """

    image: str | tuple[str, ...] = ("image", "file_name")
    long: str | tuple[str, ...] = "long_captions"
    short: str | tuple[str | None, ...] | None = ("short_caption", None)
    id: str | tuple[str, ...] | None = "id"
    negatives: str | None = None
    rewrites: str | None = None
    tags: str | None = None
    regions: str | None = None
    group: str | None = None

    @property
    def optional(self) -> dict[str, str]:
        """The optional fields that are read, and their columns."""
        return {name: column for name in OPTIONAL if (column := getattr(self, name)) is not None}


# Recaptioned LAION and COYO come as tables of addresses and captions under several names.
_RECAP_LONG = ColumnMapping(
    image=("image", "Image Path", "image_path", "url", "URL"),
    long=("long*caption*", "*long*caption*"),
    short=("raw_caption", "short_caption", "caption", "TEXT", "text", "alt_text"),
    id=None,
)
MAPPINGS = {
    # Our own names; `file_name` is what image folders with metadata call the image.
    "records": ColumnMapping(**{name: name for name in OPTIONAL}),
    # DreamLIP's long captions of CC3M, CC12M and YFCC15M: InstructBLIP, ShareGPT4V, LLaVA.
    "dreamlip": ColumnMapping(
        image=("image", "Image Path"),
        long=("longIB_captions", "longSV_captions", "longLLA_captions"),
        short="raw_caption",
        id=None,
    ),
    "recap-long-laion": _RECAP_LONG,
    "recap-long-coyo": _RECAP_LONG,
    "sharegpt4v": ColumnMapping(image="image", long="conversations[1].value", short=None, id=None),
    "docci": ColumnMapping(image=("image", "image_file"), long="description", short=None, id="example_id"),
    "iiw": ColumnMapping(image=("image", "image/key"), long="IIW", short=None, id=None),
}


def alternatives(columns: str | tuple[str | None, ...] | None) -> tuple[str, ...]:
    """The columns that one field of a mapping names, in order."""
    return (columns,) if isinstance(columns, str) else tuple(column for column in columns or () if column is not None)


def resolve(mapping: ColumnMapping, columns: Sequence[str], source: str) -> ColumnMapping:
    """The mapping with each alternative and pattern replaced by the columns there are; `source` is for errors."""
    source = printable(source)

    def missing(field: str, wanted: tuple[str, ...]) -> MissingColumn:
        return MissingColumn(
            f"{source}: there is no column {' or '.join(map(repr, wanted))} for `{field}`. There are: "
            f"{', '.join(map(repr, columns))}.",
            field,
        )

    def first(wanted: tuple[str, ...]) -> str | None:
        return next((way for way in wanted if column_of(way, columns)), None)

    short = first(alternatives(mapping.short))
    if short is None and mapping.short is not None:
        if not mapping.long or isinstance(mapping.short, str) or None not in mapping.short:
            raise missing("short", alternatives(mapping.short))
    long: list[str] = []
    for wanted in alternatives(mapping.long):
        if "*" in wanted or "?" in wanted:
            matched = [column for column in columns if fnmatchcase(column, wanted) and column != short]
            long += [column for column in matched if column not in long]
        elif column_of(wanted, columns):
            long.append(wanted)
        else:
            raise missing("long", (wanted,))
    if not long and mapping.long:
        raise missing("long", alternatives(mapping.long))
    image = first(alternatives(mapping.image))
    if image is None:
        raise missing("image", alternatives(mapping.image))
    if short is None and mapping.short is not None:
        logger.warning(
            "%s: there is no column %s; the first sentence of a record's first long caption is its short caption "
            "(--short-column names another column).",
            source,
            " or ".join(map(repr, alternatives(mapping.short))),
        )
    return replace(mapping, image=image, long=tuple(long), short=short, id=first(alternatives(mapping.id)))
