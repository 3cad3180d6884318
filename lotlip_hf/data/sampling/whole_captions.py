"""Whole captions: each record's short caption and one long caption, by which models are evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from ..record import Record, Texts
from .sub_captions import SubCaptions


@dataclass(frozen=True)
class WholeCaptions:
    """
    Takes the short caption and one long caption, whole. Without a long caption the short one stands in.

    Args:
        captioners (`tuple[int, ...]`, *optional*):
            The first of these is the index of the long caption; by default it is the record's first.
        splitter (`str`, *optional*, defaults to `"sentences"`): see [`SubCaptions`].

    Raises:
        ValueError: if an option is out of range; when called, if a record lacks the caption of `captioners`.
    """

    captioners: tuple[int, ...] | None = None
    splitter: Literal["sentences", "full_stops"] = "sentences"

    def __post_init__(self) -> None:
        SubCaptions(1, None, self.captioners, splitter=self.splitter)  # checks them

    def __call__(self, records: Sequence[Record], rngs: Sequence[Random]) -> list[Texts]:
        """The texts of each record; nothing is drawn."""
        if self.captioners is None:
            records = [{**record, "long_captions": record["long_captions"][:1]} for record in records]
        return SubCaptions(1, None, self.captioners and self.captioners[:1], splitter=self.splitter)(records, rngs)
