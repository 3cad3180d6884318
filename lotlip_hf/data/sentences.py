"""How captions are split into sentences."""

import re
from collections.abc import Callable

from ..modeling.sentences_lotlip import split_sentences


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
