"""Sub-captions: three random consecutive sentences of a long caption, as in the LoTLIP paper."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from ..record import Record, Texts, caption_key
from ..sentences import SPLITTERS


@dataclass(frozen=True)
class SubCaptions:
    """
    Draws the long texts of a record: sub-captions of its long captions. The short caption is the short text.

    The long captions are used in turn. A sub-caption is drawn again after all other sub-captions of its caption.
    Captions without a sentence are skipped. If all are skipped, the long texts are copies of the short caption.

    Args:
        num_long_texts (`int`, *optional*, defaults to 3): Number of long texts per image and step. 0 trains only on
            short captions.
        num_sentences (`int`, *optional*, defaults to 3): Number of sentences in a long text. `None` or 0 uses whole
            captions. A caption with fewer sentences is used whole.
        captioners (`tuple[int, ...]`, *optional*): Indices of the long captions in `long_captions` to draw from.
            Defaults to all.
        sentence_order (`str`, *optional*, defaults to `"written"`): `"written"` keeps the order of the sentences,
            `"shuffled"` shuffles them.
        splitter (`str`, *optional*, defaults to `"sentences"`): `"sentences"` (`split_sentences`), or `"full_stops"`
            as in the official code (`split_full_stops`).

    Raises:
        `ValueError`: If an option is out of range or, when called, if a record lacks a caption in `captioners`.

    Example:

    ```python
    >>> from random import Random
    >>> from lotlip_hf.data.sampling import SubCaptions

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
            object.__setattr__(self, "captioners", tuple(self.captioners))  # a YAML file contains a list
            if min(self.captioners, default=-1) < 0 or len(set(self.captioners)) < len(self.captioners):
                raise ValueError(f"`captioners` must be different indices >= 0, got {self.captioners}.")
        for name, choices in (("sentence_order", ("written", "shuffled")), ("splitter", tuple(SPLITTERS))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")

    def __call__(self, records: Sequence[Record], rngs: Sequence[Random]) -> list[Texts]:
        """Draws the texts of each record with its random generator."""
        return [self._draw(record, rng) for record, rng in zip(records, rngs, strict=True)]

    def _draw(self, record: Record, rng: Random) -> Texts:
        short, long = record["short_caption"], record["long_captions"]
        if not self.num_long_texts:
            return Texts(short, [], stand_in=False)
        captioners = range(len(long)) if self.captioners is None else self.captioners
        if captioners and max(captioners) >= len(long):
            raise ValueError(
                f"record {record['id']} has {len(long)} long captions, but `captioners` has the index "
                f"{max(captioners)}. Indices start at 0."
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
            texts.append(self._join(sentences[start : start + length], rng))
        return Texts(short, texts, stand_in=False)

    def negative(self, record: Record, text: str, rng: Random) -> str:
        """
        Draws from a negative a text in the form of the long texts, or the model would tell them apart by their form:
        a sub-caption with a sentence that no caption of the record has. Without long texts, it is the whole negative.
        """
        split = SPLITTERS[self.splitter]
        sentences = split(text)
        if not self.num_long_texts or not sentences:
            return text
        length = min(self.num_sentences or len(sentences), len(sentences))
        if length < len(sentences):
            true = {caption_key(sentence) for caption in record["long_captions"] for sentence in split(caption)}
            wrong = [index for index, sentence in enumerate(sentences) if caption_key(sentence) not in true]
            index = rng.choice(wrong or range(len(sentences)))
            start = rng.randint(max(0, index - length + 1), min(index, len(sentences) - length))
            sentences = sentences[start : start + length]
        return self._join(sentences, rng)

    def _join(self, sentences: list[str], rng: Random) -> str:
        if self.sentence_order == "shuffled":
            rng.shuffle(sentences)
        return ". ".join(sentences)
