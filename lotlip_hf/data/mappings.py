"""Mappings: which columns of a data set become the fields of a record."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ..files import printable
from .readers import column_of
from .record import OPTIONAL, VECTORS

logger = logging.getLogger(__name__)


class MissingColumn(ValueError):
    """
    A data set lacks a column.

    Args:
        problem (`str`): A sentence that names the missing column.
        field (`str`): Field of [`ColumnMapping`] that names the column, such as `"image"`.
        hint (`str`, *optional*): Advice in one sentence. Defaults to advice for `load_records`.
    """

    def __init__(self, problem: str, field: str, hint: str | None = None) -> None:
        self.problem, self.field = problem, field
        if hint is None:
            hint = "Name the columns with `mapping=ColumnMapping(image=..., long=..., short=...)`."
        super().__init__(f"{problem} {hint}")


@dataclass(frozen=True)
class ColumnMapping:
    """
    The columns of a data set that become the fields of a record.

    A column is given by its name, or by a path to a value in it: `conversations[1].value` is the field `value` of the
    second element of the column `conversations`. A tuple lists alternatives, and the first column that exists is used.
    For `long`, a tuple lists columns that are all used.

    Args:
        image (`str` or `tuple[str, ...]`, *optional*, defaults to `("image", "file_name")`): Column of the images:
            paths, bytes of files, or images of `datasets`. Samples of WebDataset shards with one image need no column.
            For samples with several images, name the extension of one (`input.jpg`).
        long (`str` or `tuple[str, ...]`, *optional*, defaults to `"long_captions"`): Columns of the long captions. A
            value is a text or a list of texts. The captioners are numbered in this order. `*` and `?` match parts of a
            name (`long*_captions`), and the matches keep the order of the data set. `()` reads no long captions. With
            `None` at the end of a tuple, the data set may lack the columns.
        short (`str` or `tuple[str, ...]`, *optional*, defaults to `("short_caption", None)`): Column of the short
            caption. `None` means the first sentence of the first long caption. In a tuple, `None` comes last and is
            used if no column exists.
        id (`str` or `tuple[str, ...]`, *optional*, defaults to `"id"`): Column of the ids. If the column is missing,
            the id is the path of the image, or in WebDataset shards the shard and the key of the sample, or else a
            digest of the record.
        negatives, rewrites, tags, regions, group (`str`, *optional*): Columns of the optional fields of a
            [`~lotlip_hf.data.record.Record`]. Data sets and rows may lack them.
        teacher_image_embeds, teacher_text_embeds (`str`, *optional*): Columns of embeddings of the image and of the
            short caption, lists of numbers. A record without a list of finite numbers is broken.
        keep (`tuple[str, ...]`, *optional*, defaults to `()`): Further columns. The records of a stream have their
            values, unchanged, in the dictionary `kept`.
    """

    image: str | tuple[str, ...] = ("image", "file_name")
    long: str | tuple[str | None, ...] = "long_captions"
    short: str | tuple[str | None, ...] | None = ("short_caption", None)
    id: str | tuple[str, ...] | None = "id"
    negatives: str | None = None
    rewrites: str | None = None
    tags: str | None = None
    regions: str | None = None
    group: str | None = None
    teacher_image_embeds: str | None = None
    teacher_text_embeds: str | None = None
    keep: tuple[str, ...] = ()

    def with_columns(
        self, short: str | None = None, **columns: str | tuple[str | None, ...] | None
    ) -> "ColumnMapping":
        """Replaces columns by those of options: `None` changes nothing, and a `short` of "none" reads no column."""
        given: dict[str, Any] = {field: column for field, column in columns.items() if column is not None}
        if short is not None:
            given["short"] = None if short == "none" else short
        return replace(self, **given)

    @property
    def optional(self) -> dict[str, str]:
        """The optional fields with a column, and their columns."""
        return {name: column for name in OPTIONAL if (column := getattr(self, name)) is not None}


# Recaptioned LAION and COYO are tables of URLs and captions, with different column names.
_RECAP_LONG = ColumnMapping(
    image=("image", "Image Path", "image_path", "url", "URL"),
    long=("long*caption*", "*long*caption*"),
    short=("raw_caption", "short_caption", "caption", "TEXT", "text", "alt_text"),
    id=None,
)
MAPPINGS = {
    # The column names of this package. `file_name` is the image column of image folders with metadata.
    "records": ColumnMapping(**{name: name for name in OPTIONAL if name not in VECTORS}),
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


def check_mapping(name: str) -> None:
    """Raises a `ValueError` if there is no mapping with this name."""
    if name not in MAPPINGS:
        raise ValueError(f"`mapping` must be one of {', '.join(MAPPINGS)}, got {name!r}.")


def alternatives(columns: str | tuple[str | None, ...] | None) -> tuple[str, ...]:
    """Returns the columns of one field of a mapping as a tuple, without `None`."""
    return (columns,) if isinstance(columns, str) else tuple(column for column in columns or () if column is not None)


def resolve(mapping: ColumnMapping, columns: Sequence[str], source: str) -> ColumnMapping:
    """Replaces alternatives and patterns of a mapping by existing columns. `source` is only used in errors."""
    source = printable(source)

    def missing(field: str, wanted: tuple[str, ...]) -> MissingColumn:
        return MissingColumn(
            f"{source} has no column {' or '.join(map(repr, wanted))} for `{field}`. Its columns are "
            f"{', '.join(map(repr, columns))}.",
            field,
        )

    def first(wanted: tuple[str, ...]) -> str | None:
        return next((path for path in wanted if column_of(path, columns)), None)

    short = first(alternatives(mapping.short))
    if short is None and mapping.short is not None:
        if not mapping.long or isinstance(mapping.short, str) or None not in mapping.short:
            raise missing("short", alternatives(mapping.short))
    long: list[str] = []
    may_lack = isinstance(mapping.long, tuple) and None in mapping.long and short is not None
    for wanted in alternatives(mapping.long):
        if "*" in wanted or "?" in wanted:
            matched = [column for column in columns if fnmatchcase(column, wanted) and column != short]
            long += [column for column in matched if column not in long]
        elif column_of(wanted, columns):
            long.append(wanted)
        elif not may_lack:
            raise missing("long", (wanted,))
    if not long and mapping.long and not may_lack:
        raise missing("long", alternatives(mapping.long))
    image = first(alternatives(mapping.image))
    if image is None:
        raise missing("image", alternatives(mapping.image))
    for field in VECTORS:
        if (column := getattr(mapping, field)) is not None and column_of(column, columns) is None:
            raise missing(field, (column,))
    for column in mapping.keep:
        if column_of(column, columns) is None:
            raise missing("keep", (column,))
    if short is None and mapping.short is not None:
        logger.warning(
            "%s has no column %s. The first sentence of the first long caption is used as the short caption. To use a "
            "column, pass `--short-column`.",
            source,
            " or ".join(map(repr, alternatives(mapping.short))),
        )
    return replace(mapping, image=image, long=tuple(long), short=short, id=first(alternatives(mapping.id)))
