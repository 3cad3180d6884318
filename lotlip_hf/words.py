"""The words of a text, and sums of the values of tokens over them."""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Letters (w) and digits (d), joined by apostrophes, hyphens and, between digits, full stops and commas
WORD = re.compile(r"[wd]+(?:(?:['’‐-]|(?<=d)[.,](?=d))[wd]+)*")


class Word(NamedTuple):
    """A word of a text: `text[start:end]`."""

    text: str
    start: int
    end: int


def split_words(text: str) -> list[Word]:
    """
    Finds the words and numbers of a text. Apostrophes and hyphens inside a word belong to it, other punctuation does
    not.

    Args:
        text (`str`): A text.

    Returns:
        `list[Word]`: The words in order, each with its text, start and end in characters.

    Example:

    ```python
    >>> from lotlip_hf.words import split_words

    >>> [word.text for word in split_words("It's a well-known, 3.5 m boat.")]
    ["It's", 'a', 'well-known', '3.5', 'm', 'boat']
    ```
    """
    kinds = "".join({"L": "w", "M": "w", "N": "d"}.get(unicodedata.category(one)[0], one) for one in text)
    return [Word(text[found.start() : found.end()], *found.span()) for found in WORD.finditer(kinds)]


def to_words(values: Tensor, offsets: Sequence[tuple[int, int]], words: Sequence[Word]) -> Tensor:
    """
    Adds up the values of tokens over words.

    Args:
        values (`torch.Tensor`): Values [..., L] of L tokens.
        offsets (`Sequence[tuple[int, int]]`): Start and end of each token in characters of the text. A token with an
            empty span, such as a special token, belongs to no word.
        words (`Sequence[Word]`): W words of the text, see [`split_words`].

    Returns:
        `torch.Tensor`: Values [..., W]. A token of two words adds to the one of which it has more characters.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.words import split_words, to_words

    >>> to_words(torch.tensor([1.0, 2.0, 4.0]), [(0, 1), (2, 5), (5, 6)], split_words("a cats")).tolist()
    [1.0, 6.0]
    ```
    """
    if not words:
        return values.new_zeros(*values.shape[:-1], 0)
    tokens = torch.tensor([tuple(span) for span in offsets], device=values.device).reshape(-1, 2)
    spans = torch.tensor([word[1:] for word in words], device=values.device)
    ends = torch.minimum(tokens[:, None, 1], spans[:, 1])
    common, owners = (ends - torch.maximum(tokens[:, None, 0], spans[:, 0])).max(1)  # of each token, [L]
    owned = torch.nn.functional.one_hot(owners, len(words)) * (common > 0)[:, None]
    return values @ owned.to(values.dtype)
