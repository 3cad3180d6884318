"""Sub-captions: consecutive sentences of the long captions, three at random in each step, as the LoTLIP paper does."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from ..record import Record, Texts
from ..sentences import SPLITTERS


@dataclass(frozen=True)
class SubCaptions:
    """
    Draws the long texts of an image from its long captions; the short caption is the short text.

    Every captioner is drawn from once before one is drawn from again, and of one caption no sub-caption twice before
    all of them were. Captions without a sentence are passed over; if no other is left, the short caption stands in.

    Args:
        num_long_texts (`int`, *optional*, defaults to 3):
            Long texts per image and step; 0 trains on the short captions alone.
        num_sentences (`int`, *optional*, defaults to 3):
            Consecutive sentences of a long text; `None` or 0 takes the whole caption. A caption with fewer is taken
            whole.
        captioners (`tuple[int, ...]`, *optional*):
            Which of a record's long captions are drawn from, by their index in `long_captions`; by default all.
        sentence_order (`str`, *optional*, defaults to `"written"`):
            `"written"` keeps the drawn sentences in the caption's order, `"shuffled"` draws one.
        splitter (`str`, *optional*, defaults to `"sentences"`):
            `"sentences"` (`split_sentences`), or `"full_stops"` as in the official code (`split_full_stops`).

    Raises:
        ValueError: if an option is out of range; when called, if `captioners` asks for captions that a record lacks.

    Example:

    ```python
    >>> from random import Random

    >>> captions = ["A cat. It is grey. It sleeps. It dreams.", "A grey cat is asleep."]
    >>> record = {"image": "cat.jpg", "id": "cat.jpg", "short_caption": "a cat", "long_captions": captions}
    >>> (texts,) = SubCaptions(num_long_texts=2, num_sentences=2)([record], [Random(0)])
    >>> "A grey cat is asleep" in texts.long
    True
    ```
    """

    num_long_texts: int = 3
    num_sentences: int | None = 3
    captioners: tuple[int, ...] | None = None
    sentence_order: Literal["written", "shuffled"] = "written"
    splitter: Literal["sentences", "full_stops"] = "sentences"

    def __post_init__(self) -> None:
        for name in ("num_long_texts", "num_sentences"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if self.captioners is not None:
            object.__setattr__(self, "captioners", tuple(self.captioners))  # a YAML file gives a list
            if min(self.captioners, default=-1) < 0 or len(set(self.captioners)) < len(self.captioners):
                raise ValueError(
                    f"`captioners` must be different indices of long captions, from 0, got {self.captioners}."
                )
        for name, choices in (("sentence_order", ("written", "shuffled")), ("splitter", tuple(SPLITTERS))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")

    def __call__(self, records: Sequence[Record], rngs: Sequence[Random]) -> list[Texts]:
        """The texts of each record, drawn by its own generator."""
        return [self._draw(record, rng) for record, rng in zip(records, rngs, strict=True)]

    def _draw(self, record: Record, rng: Random) -> Texts:
        short, long = record["short_caption"], record["long_captions"]
        if not self.num_long_texts:
            return Texts(short, [], stand_in=False)
        captioners = range(len(long)) if self.captioners is None else self.captioners
        if captioners and max(captioners) >= len(long):
            raise ValueError(
                f"record {record['id']}: `captioners` asks for long caption {max(captioners)}, but the record has "
                f"{len(long)}, numbered from 0"
            )
        split = SPLITTERS[self.splitter]
        captions = [sentences for captioner in captioners if (sentences := split(long[captioner]))]
        if not captions:
            return Texts(short, [short] * self.num_long_texts, stand_in=True)

        rng.shuffle(captions)
        starts: list[list[int]] = [[] for _ in captions]
        texts = []
        for number in range(self.num_long_texts):
            sentences, left = captions[number % len(captions)], starts[number % len(captions)]
            length = min(self.num_sentences or len(sentences), len(sentences))
            if not left:
                left += rng.sample(range(len(sentences) - length + 1), len(sentences) - length + 1)
            start = left.pop()
            drawn = sentences[start : start + length]
            if self.sentence_order == "shuffled":
                rng.shuffle(drawn)
            texts.append(". ".join(drawn))
        return Texts(short, texts, stand_in=False)
