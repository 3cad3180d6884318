"""
Captions as they are trained on: one short text, and sub-captions drawn from the long ones.

The LoTLIP paper splits a long caption into its sentences and draws three consecutive ones at random per step. Each
draw is a function of (seed, epoch, record id) alone: neither the number of processes and workers nor the order of
records nor a resumed run changes it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

# Words that a full stop belongs to. "etc." and "no." are not among them: they end sentences as often as not.
ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st mt jr sr vs e.g i.e cf fig approx dept gen col sgt capt lt rev hon inc ltd".split()
)
NUMBERED = frozenset("no nos nr vol pp".split())  # with a full stop, in front of a number
LONGEST_ABBREVIATION = 40  # characters before a full stop that are looked at
# Where a sentence may end: at a line's end, at the end mark of some captioners, and at . ! ? or … with what closes a
# quotation, if white space, the end, or (for a forgotten space) a capital letter after a small one follows; and at
# the marks of Chinese, Japanese, Hindi, Arabic and Urdu. Every one begins with a character of one set, which is quick
# to search for.
SENTENCE_END = re.compile(
    r"""
    [\n<.!?…。！？．｡।॥؟۔]
    (?:
        (?<=\n)
        | (?<=<)/s>
        | (?<=[.!?…])(?<![.!?…][.!?…])[.!?…]*["'”’)\]]*(?=\s|</s>|$)
        | (?<=[。！？．｡।॥؟۔])[。！？．｡।॥؟۔]*
        | (?<=[a-z]{2}\.)(?=[A-Z][a-z])
    )
    """,
    re.VERBOSE,
)
STOP = re.compile(r"[.…。．｡।॥۔\n]|</s>")
HAS_WORD = re.compile(r"[^\W_]")
DOTTED_LETTERS = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]")
# "1." and "b)" in front of an item of a list, at the caption's start or after white space.
LIST_MARKER = re.compile(r"(?<!\S)(?:\d{1,3}|[A-Za-z])[.)](?!\S)")
NEXT_CHARACTER = re.compile(r"\s*(\S?)")
OPENING = "([\"'“‘"


class Sentence(NamedTuple):
    """`text[start:end]`, with its end `mark`: punctuation, a line end or `</s>`; empty for an end without one."""

    start: int
    end: int
    mark: str


def find_sentences(text: str) -> Iterator[Sentence]:
    """
    Finds the sentences of a caption that hold a word, in time proportional to its length.

    They end at line ends, `</s>`, and the punctuation that ends a sentence; not at the full stop of an abbreviation
    (Dr., e.g., No. 5), an initial (J. Smith), a number (3.5), a name (example.com), or the marker of a list ("2.").

    Args:
        text (`str`): a caption.

    Returns:
        `Iterator[Sentence]`: where each stands, and its end mark.
    """
    start = 0
    for end in SENTENCE_END.finditer(text):
        if end[0] == ".":
            # A bounded look back, and not from the sentence's start: "J. J. J. ..." is quick to read, too.
            words = text[max(start, end.start() - LONGEST_ABBREVIATION) : end.start()].rsplit(None, 1)
            word = words[-1].lstrip(OPENING) if words else ""
            initial = len(word) == 1 and word.isupper() and len(words) > 1
            # U.S., p.m.: they end a sentence only if the next word starts one.
            letters = "." in word and DOTTED_LETTERS.fullmatch(word) and next_character(text, end.end()).islower()
            number = word.lower() in NUMBERED and next_character(text, end.end()).isdecimal()
            marker = len(words) == 1 and LIST_MARKER.fullmatch(f"{word}.")
            if initial or letters or number or marker or word.lower() in ABBREVIATIONS:
                continue
        if HAS_WORD.search(text, start, end.start()):  # the mark may be </s>
            yield Sentence(start, end.end(), end[0])
        start = end.end()
    if HAS_WORD.search(text, start):
        yield Sentence(start, len(text), "")


def next_character(text: str, position: int) -> str:
    """The first character from `position` on that is not white space."""
    match = NEXT_CHARACTER.match(text, position)
    return match[1] if match else ""


def split_sentences(text: str) -> list[str]:
    """
    Splits a caption into its sentences, as [`find_sentences`] finds them.

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
        if self.num_long_texts < 0:
            raise ValueError(f"`num_long_texts` must be 0 or more, got {self.num_long_texts}.")
        if self.num_sentences is not None and self.num_sentences < 1:
            raise ValueError(f"`num_sentences` must be at least 1, or `None` for all, got {self.num_sentences}.")
        if self.captioners is not None:
            object.__setattr__(self, "captioners", tuple(self.captioners))
            if not self.captioners or min(self.captioners) < 0 or len(set(self.captioners)) < len(self.captioners):
                raise ValueError(
                    f"`captioners` must be different positions in the long captions, from 0, got {self.captioners}."
                )
        if self.order not in ("written", "shuffled"):
            raise ValueError(f'`order` must be "written" or "shuffled", got {self.order!r}.')
        if self.splitter not in SPLITTERS:
            raise ValueError(f"`splitter` must be one of {', '.join(SPLITTERS)}, got {self.splitter!r}.")


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
