"""Whole captions: the short caption and one long caption of each record, for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from ..record import Record, Texts
from .sub_captions import SubCaptions


@dataclass(frozen=True)
class WholeCaptions:
    """
    Uses the short caption and one whole long caption of a record. A record without long captions uses its short
    caption twice.

    Args:
        captioners (`tuple[int, ...]`, *optional*): Indices of long captions; only the first is used. Defaults to the
            first long caption.
        splitter (`str`, *optional*, defaults to `"sentences"`): See [`SubCaptions`].

    Raises:
        `ValueError`: If an option is out of range or, when called, if a record lacks the caption.
    """

    captioners: tuple[int, ...] | None = None
    splitter: Literal["sentences", "full_stops"] = "sentences"

    def __post_init__(self) -> None:
        SubCaptions(1, None, self.captioners, splitter=self.splitter)  # checks the options

    def __call__(self, records: Sequence[Record], rngs: Sequence[Random]) -> list[Texts]:
        """Returns the texts of each record. The random generators are not used."""
        if self.captioners is None:
            records = [{**record, "long_captions": record["long_captions"][:1]} for record in records]
        return SubCaptions(1, None, self.captioners and self.captioners[:1], splitter=self.splitter)(records, rngs)

    def negative(self, record: Record, text: str, rng: Random) -> str:
        """Returns a negative in the form of the long text, see [`SubCaptions.negative`]."""
        return SubCaptions(1, None, splitter=self.splitter).negative(record, text, rng)
