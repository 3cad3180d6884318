"""The words of a text, and sums of the values of tokens over them."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .modeling.tokenization_lotlip import LoTLIPTokenizer

# Letters (w) and digits (d) with their marks (m), joined by apostrophes, hyphens and, between digits, full stops and
# commas
WORD = re.compile(r"[wd][wdm]*(?:(?:['’‐-]|(?<=d)[.,](?=d))[wd][wdm]*)*")


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
    kinds = "".join({"L": "w", "M": "m", "N": "d"}.get(unicodedata.category(one)[0], one) for one in text)
    return [Word(text[found.start() : found.end()], *found.span()) for found in WORD.finditer(kinds)]


def find_phrase(text: str, phrase: str) -> Word | None:
    """
    Finds the first occurrence of the words of a phrase in a text. Case and punctuation do not matter.

    Args:
        text (`str`): A text.
        phrase (`str`): A phrase.

    Returns:
        `Word` or `None`: The occurrence with its start and end in the text.

    Example:

    ```python
    >>> from lotlip_hf.words import find_phrase

    >>> find_phrase("A cat, on a red sofa.", "a RED sofa")
    Word(text='a red sofa', start=10, end=20)
    ```
    """
    words, wanted = split_words(text), [word.text.casefold() for word in split_words(phrase)]
    for first in range(len(words) - len(wanted) + 1 if wanted else 0):
        own = words[first : first + len(wanted)]
        if [word.text.casefold() for word in own] == wanted:
            return Word(text[own[0].start : own[-1].end], own[0].start, own[-1].end)
    return None


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


def original_offsets(tokenizer: Any, text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """
    Translates the offsets of a fast tokenizer's call to the text that was passed. The offsets of a LoTLIP tokenizer
    refer to the cleaned text, with separator tokens and in the template of the tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        text (`str`): The text that was tokenised.
        offsets (`Sequence[tuple[int, int]]`): Start and end of each token, as with `return_offsets_mapping=True`.

    Returns:
        `list[tuple[int, int]]`: Start and end of each token in `text`. The span of a token that is not in the text,
        such as a special token, is empty. That of a token in a repaired part covers the whole part.

    Example:

    ```python
    >>> from lotlip_hf import LoTLIPTokenizer
    >>> from lotlip_hf.words import original_offsets

    >>> tokenizer, text = LoTLIPTokenizer.from_pretrained("checkpoint"), "A  cat.  A dog."
    >>> offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    >>> [text[start:end] for start, end in original_offsets(tokenizer, text, offsets)]
    ['', 'A', 'cat', '', 'A', 'dog', '.', '']
    ```
    """
    if not isinstance(tokenizer, LoTLIPTokenizer):
        return list(offsets)
    prepared = tokenizer.offset_text(text)
    if separator := tokenizer.sep_token:  # a name of the token in the text is marked, and differs
        prepared = prepared.replace(separator, " " * len(separator))
    spans: list[tuple[int, int] | None] = [None] * len(prepared)  # of each character
    for start, end, first, last in _same_parts(prepared, text):
        is_same = end - start == last - first
        for index in range(start, end):
            spans[index] = (first + index - start, first + index - start + 1) if is_same else (first, last)
    found = []
    for start, end in offsets:
        inside = [span for span in spans[start:end] if span is not None]
        found.append((inside[0][0], inside[-1][1]) if inside else (0, 0))
    return found


def _same_parts(prepared: str, text: str) -> Iterator[tuple[int, int, int, int]]:
    """Spans in `prepared` and in `text` of the words and signs that are the same, and of what replaces others."""
    parts = [list(re.finditer(r"\w+|[^\w\s]", one)) for one in (prepared, text)]
    names = [[unicodedata.normalize("NFKC", part[0]).casefold() for part in side] for side in parts]
    for kind, start, end, first, last in SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        ours, others = parts[0][start:end], parts[1][first:last]
        if kind == "equal" or len(ours) == len(others):
            for one, other in zip(ours, others, strict=True):
                yield *one.span(), *other.span()
        elif kind == "replace":
            yield ours[0].start(), ours[-1].end(), others[0].start(), others[-1].end()
