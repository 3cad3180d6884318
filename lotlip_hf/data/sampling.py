"""
Captions as they are trained on: one short text, and sub-captions drawn from the long ones.

The LoTLIP paper splits a long caption into its sentences and draws three consecutive ones at random per step. Each
draw is a function of (seed, epoch, record id) alone: neither the number of processes and workers nor the order of
records nor a resumed run changes it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

from ..modeling.sentences_lotlip import STOP, find_sentences


def split_sentences(text: str) -> list[str]:
    """
    Splits a caption into its sentences, as [`~lotlip_hf.modeling.sentences_lotlip.find_sentences`] finds them.

    Unlike `split_full_stops` it leaves whole what a full stop does not end: numbers, abbreviations, initials, names.

    Args:
        text (`str`): a caption.

    Returns:
        `list[str]`: the sentences that hold a word, without white space at either end and without their full stop;
        `!` and `?` stay.

    Example:

    ```python
    >>> split_sentences("A 3.5 m boat. Is it Dr. Li's? Nobody knows.")
    ['A 3.5 m boat', "Is it Dr. Li's?", 'Nobody knows']
    ```
    """
    # The full stop goes; a quotation mark behind it stays.
    return [(text[start : end - len(mark)] + STOP.sub("", mark)).strip() for start, end, mark in find_sentences(text)]


def split_full_stops(text: str) -> list[str]:
    """
    Splits a caption as the official code does: at every line end, `</s>` and full stop, those of 3.5 and Dr. included.

    Args:
        text (`str`): a caption.

    Returns:
        `list[str]`: the parts that are not empty, without white space at either end.

    Example:

    ```python
    >>> split_full_stops("A 3.5 m boat. It is red.")
    ['A 3', '5 m boat', 'It is red']
    ```
    """
    parts = re.split(r"\n|</s>|\.", text)
    return [part.strip() for part in parts if part.strip()]


SPLITTERS: dict[str, Callable[[str], list[str]]] = {"sentences": split_sentences, "full_stops": split_full_stops}


@dataclass(frozen=True)
class CaptionSampling:
    """
    How the texts of a training step are drawn from a record's captions.

    Args:
        num_long_texts (`int`, *optional*, defaults to 3):
            Long texts per image and step; 0 trains on the short captions alone.
        num_sentences (`int`, *optional*, defaults to 3):
            Consecutive sentences that make up a long text; `None` takes the whole caption. A caption with fewer is
            taken whole.
        captioners (`tuple[int, ...]`, *optional*):
            Which of a record's long captions are drawn from, by their position in `long_captions`; by default all.
        order (`str`, *optional*, defaults to `"written"`):
            `"written"` keeps the drawn sentences in the caption's order, `"shuffled"` draws one.
        splitter (`str`, *optional*, defaults to `"sentences"`):
            `"sentences"` (`split_sentences`), or `"full_stops"` as in the official code (`split_full_stops`).

    Raises:
        ValueError: if an option is out of range.
    """

    num_long_texts: int = 3
    num_sentences: int | None = 3
    captioners: tuple[int, ...] | None = None
    order: Literal["written", "shuffled"] = "written"
    splitter: Literal["sentences", "full_stops"] = "sentences"

    def __post_init__(self) -> None:
        for name, least in (("num_long_texts", 0), ("num_sentences", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.captioners is not None:
            object.__setattr__(self, "captioners", tuple(self.captioners))
            if min(self.captioners, default=-1) < 0 or len(set(self.captioners)) < len(self.captioners):
                raise ValueError(
                    f"`captioners` must be different positions in the long captions, from 0, got {self.captioners}."
                )
        if self.order not in ("written", "shuffled"):
            raise ValueError(f'`order` must be "written" or "shuffled", got {self.order!r}.')


class SampledTexts(NamedTuple):
    """`long` holds `num_long_texts` texts; with `stand_in` each is the short caption, for want of a long one."""

    short: str
    long: list[str]
    stand_in: bool


def sample_texts(
    short_caption: str,
    long_captions: Sequence[str],
    sampling: CaptionSampling,
    seed: int,
    epoch: int,
    record_id: str,
) -> SampledTexts:
    """
    Draws the texts that a record is trained on in one epoch.

    Every captioner is drawn from once before one is drawn from again, and of one caption no sub-caption twice before
    all of them were. Captions without a sentence are passed over; if no other is left, the short caption stands in.

    Args:
        short_caption (`str`): kept as it is.
        long_captions (`Sequence[str]`): one caption by each captioner; empty where a captioner gave none.
        sampling (`CaptionSampling`): what to draw.
        seed (`int`): seed of the run.
        epoch (`int`): number of the epoch.
        record_id (`str`): the record's id, which must not change between runs.

    Returns:
        `SampledTexts`: the same for the same arguments, in every process.

    Raises:
        ValueError: if `captioners` asks for more captions than the record has.

    Example:

    ```python
    >>> captions = ["A cat. It is grey. It sleeps. It dreams.", "A grey cat is asleep."]
    >>> sampling = CaptionSampling(num_long_texts=2, num_sentences=2)
    >>> texts = sample_texts("a cat", captions, sampling, seed=0, epoch=0, record_id="cat.jpg")
    >>> "A grey cat is asleep" in texts.long
    True
    ```
    """
    if not sampling.num_long_texts:
        return SampledTexts(short_caption, [], stand_in=False)
    captioners = range(len(long_captions)) if sampling.captioners is None else sampling.captioners
    if captioners and max(captioners) >= len(long_captions):
        raise ValueError(
            f"record {record_id}: `captioners` asks for long caption {max(captioners)}, but the record has "
            f"{len(long_captions)}, numbered from 0"
        )
    split = SPLITTERS[sampling.splitter]
    captions = [sentences for captioner in captioners if (sentences := split(long_captions[captioner]))]
    if not captions:
        return SampledTexts(short_caption, [short_caption] * sampling.num_long_texts, stand_in=True)

    # A string seeds `Random` through SHA-512: the same in every process and version of Python.
    random = Random(f"{seed}\0{epoch}\0{record_id}")
    random.shuffle(captions)
    starts: list[list[int]] = [[] for _ in captions]
    texts = []
    for number in range(sampling.num_long_texts):
        sentences, left = captions[number % len(captions)], starts[number % len(captions)]
        length = min(sampling.num_sentences or len(sentences), len(sentences))
        if not left:
            left += random.sample(range(len(sentences) - length + 1), len(sentences) - length + 1)
        start = left.pop()
        drawn = sentences[start : start + length]
        if sampling.order == "shuffled":
            random.shuffle(drawn)
        texts.append(". ".join(drawn))
    return SampledTexts(short_caption, texts, stand_in=False)
