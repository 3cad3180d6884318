"""Where the sentences of a caption end: the rules that captions are drawn by, and a tokenizer may split by."""

import re
from collections.abc import Iterator
from typing import NamedTuple

# Words that a full stop belongs to. "etc." and "no." are not among them: they end sentences as often as not.
ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st mt jr sr vs e.g i.e cf fig approx dept gen col sgt capt lt rev hon inc ltd".split()
)
NUMBERED = frozenset("no nos nr vol pp".split())  # with a full stop, in front of a number
LONGEST_ABBREVIATION = 40  # characters before a full stop that are looked at
# Where a sentence may end: at a line's end, at the end mark of some captioners, and at . ! ? or … with what closes a
# quotation, if white space, the end, or (for a forgotten space) a capital letter after a small one follows; and at the
# marks of Chinese, Japanese, Hindi, Arabic and Urdu. All begin with one set of characters, which is quick to find.
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
