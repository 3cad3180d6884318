"""How captions are split into sentences."""

import re
from collections.abc import Callable

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
