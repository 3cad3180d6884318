"""Splitters: functions that split a caption into sentences."""

import re
from collections.abc import Callable

from ..modeling.sentences_lotlip import STOP, find_sentences


def split_sentences(text: str) -> list[str]:
    """
    Splits a caption into sentences ([`~lotlip_hf.modeling.sentences_lotlip.find_sentences`]).

    Unlike `split_full_stops`, this function does not split at full stops in numbers, abbreviations, initials and
    names.

    Args:
        text (`str`): A caption.

    Returns:
        `list[str]`: The sentences that have a word, without surrounding white space and without their full stop. `!`
        and `?` remain.

    Example:

    ```python
    >>> from lotlip_hf.data.sentences import split_sentences

    >>> split_sentences("A 3.5 m boat. Is it Dr. Li's? It is red.")
    ['A 3.5 m boat', "Is it Dr. Li's?", 'It is red']
    ```
    """
    # Remove the full stop, but keep a quotation mark after it.
    return [(text[start : end - len(mark)] + STOP.sub("", mark)).strip() for start, end, mark in find_sentences(text)]


def split_full_stops(text: str) -> list[str]:
    """
    Splits a caption at every line end, `</s>` and full stop, also those in "3.5" and "Dr.", as the official code does.

    Args:
        text (`str`): A caption.

    Returns:
        `list[str]`: The parts that are not empty, without surrounding white space.

    Example:

    ```python
    >>> from lotlip_hf.data.sentences import split_full_stops

    >>> split_full_stops("A 3.5 m boat. It is red.")
    ['A 3', '5 m boat', 'It is red']
    ```
    """
    parts = re.split(r"\n|</s>|\.", text)
    return [part.strip() for part in parts if part.strip()]


SPLITTERS: dict[str, Callable[[str], list[str]]] = {"sentences": split_sentences, "full_stops": split_full_stops}
