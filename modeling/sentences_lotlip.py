"""Finds where the sentences of a caption end, for training and for tokenizers with `cleaning="sentences"`."""

import re
from collections.abc import Iterator
from typing import NamedTuple

# Words before a full stop that ends no sentence. "etc." and "no." are missing, because they often end one.
ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st mt jr sr vs e.g i.e cf fig approx dept gen col sgt capt lt rev hon inc ltd".split()
)
NUMBERED = frozenset("no nos nr vol pp".split())  # abbreviations if a number follows
LONGEST_ABBREVIATION = 40  # maximum number of characters before a full stop in which an abbreviation is searched
# A sentence may end at a line end, at </s>, which some captioners write, at . ! ? or … with closing quotation marks
# before white space or the end of the text, at a full stop between a small and a capital letter (a forgotten space),
# and at the marks of Chinese, Japanese, Hindi, Arabic and Urdu. For speed, the pattern begins with a character class.
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
# Markers of list items, "1." and "b)", at the start of the caption or after white space.
LIST_MARKER = re.compile(r"(?<!\S)(?:\d{1,3}|[A-Za-z])[.)](?!\S)")
NEXT_CHARACTER = re.compile(r"\s*(\S?)")
OPENING = "([\"'“‘"


class Sentence(NamedTuple):
    """The sentence `text[start:end]`. `mark` is its ending: punctuation, a line end, `</s>`, or empty."""

    start: int
    end: int
    mark: str


def find_sentences(text: str) -> Iterator[Sentence]:
    """
    Finds the sentences of a caption that contain a word, in linear time.

    A sentence ends at a line end, at `</s>` and at punctuation, but not at the full stop of an abbreviation (Dr.,
    e.g., No. 5), an initial (J. Smith), a number (3.5), a name (example.com) or a list marker ("2.").
    """
    start = 0
    for end in SENTENCE_END.finditer(text):
        if end[0] == ".":
            # Bounds the number of characters, so that a text such as "J. J. J. J." takes linear time.
            words = text[max(start, end.start() - LONGEST_ABBREVIATION) : end.start()].rsplit(None, 1)
            word = words[-1].lstrip(OPENING) if words else ""
            initial = len(word) == 1 and word.isupper() and len(words) > 1
            # "U.S." and "p.m." do not end a sentence if a small letter follows.
            letters = "." in word and DOTTED_LETTERS.fullmatch(word) and next_character(text, end.end()).islower()
            number = word.lower() in NUMBERED and next_character(text, end.end()).isdecimal()
            marker = len(words) == 1 and LIST_MARKER.fullmatch(f"{word}.")
            if initial or letters or number or marker or word.lower() in ABBREVIATIONS:
                continue
        if HAS_WORD.search(text, start, end.start()):  # excludes the mark, because </s> contains a letter
            yield Sentence(start, end.end(), end[0])
        start = end.end()
    if HAS_WORD.search(text, start):
        yield Sentence(start, len(text), "")


def next_character(text: str, position: int) -> str:
    """The first character at or after `position` that is not white space."""
    match = NEXT_CHARACTER.match(text, position)
    return match[1] if match else ""
