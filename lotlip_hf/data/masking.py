"""Masked words of texts, after GA-DMS: which words are masked, by their scores, and what is put in their place."""

import os
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from math import exp
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from ..files import FileError, open_regular, parse_json, printable, read_json_lines
from ..words import split_words
from .kept import digest_of
from .record import MAX_FLOAT

IGNORED = -100  # label of a token that is not predicted
UNIFORM = 0.15  # probability of a word without a score to be predicted, as in BERT
REPLACED, RANDOM = 0.8, 0.1  # shares of the chosen words that become mask tokens and random tokens
MAX_LINE = 1 << 24  # bytes


def noise_probability(score: float | None) -> float:
    """Returns the probability that a word is masked in the texts that are matched with the image."""
    return 0.0 if score is None else 0.2 / (1 + exp(-20 * (1 - score - 0.9)))


def prediction_probability(score: float | None) -> float:
    """Returns the probability that a word is masked in the text whose words are predicted."""
    return UNIFORM if score is None else 0.3 / (1 + exp(-20 * (score - 0.1)))


class WordScores:
    """
    The scores of words of a file with a line of JSON for each record: its `id`, and `texts`, a list of lists of pairs
    of a word and its score, as `examples/score_words.py` writes them. Memory holds 16 bytes for each record.

    Args:
        file (`str` or `os.PathLike`): File.

    Raises:
        `OSError`: If the file cannot be read.
        `FileError`: If the file has no scores.
        `LineError`: If a line is damaged.
    """

    def __init__(self, file: str | os.PathLike) -> None:
        self.file = Path(file)
        digests, starts, start = array("Q"), array("Q"), 0
        for line, value in read_json_lines(self.file, lambda _, value: _is_scored(value), MAX_LINE):
            digests.append(digest_of(value["id"]))
            starts.append(start)
            start += len(line)
        if not digests:
            raise FileError(self.file, "`word_scores` has no lines")
        order = np.argsort(np.frombuffer(digests, np.uint64), kind="stable")
        self.digests, self.starts = (np.frombuffer(each, np.uint64)[order] for each in (digests, starts))

    def __len__(self) -> int:
        return len(self.digests)

    def texts(self, record_id: str) -> list[list[tuple[str, float]]]:
        """Returns the words of the scored texts of a record and their scores, or no texts."""
        digest = np.uint64(digest_of(record_id))
        index = np.searchsorted(self.digests, digest)
        if index == len(self.digests) or self.digests[index] != digest:
            return []
        with open_regular(self.file) as opened:
            opened.seek(int(self.starts[index]))
            line = opened.readline(MAX_LINE)
        try:
            value = parse_json(line)
        except ValueError:
            value = None
        if not _is_scored(value) or value["id"] != record_id:
            raise FileError(self.file, f"changed during the run: record {printable(record_id)} is not where it was")
        return value["texts"]

    def scores(self, record_id: str, texts: Sequence[Sequence[str]]) -> list[list[float | None]]:
        """
        Returns scores in [0, 1] of the words of texts that are drawn from those of a record. As in GA-DMS, values
        below 0 count as 0, and the largest of a scored text is 1. A word has the score of the same word in the scored
        texts, in its longest run of words there, or `None`.
        """
        known: list[tuple[str | None, float]] = []
        for scored in self.texts(record_id):
            largest = max((score for _, score in scored), default=0)
            known += [(word_key(word), max(0.0, score) / largest if largest > 0 else 0.0) for word, score in scored]
            known.append((None, 0.0))  # no run goes on in the next text
        return [_lined_up([word_key(word) for word in words], known) for words in texts]


def word_key(word: str) -> str:
    """Returns a word in lower case and with straight apostrophes."""
    return word.casefold().replace("’", "'")


def _lined_up(words: Sequence[str], known: Sequence[tuple[str | None, float]]) -> list[float | None]:
    scores: list[float | None] = []
    index = len(known)  # in `known`, of the word before
    for number, word in enumerate(words):
        index += 1
        if index >= len(known) or known[index][0] != word:
            places = [place for place, (other, _) in enumerate(known) if other == word]
            index = max(places, key=lambda place: _run(words[number:], known[place:]), default=len(known))
        scores.append(known[index][1] if index < len(known) else None)
    return scores


def _run(words: Sequence[str], known: Sequence[tuple[str | None, float]]) -> int:
    """Returns how many words are the same from the start."""
    pairs = zip(words, known, strict=False)
    return next(
        (number for number, (word, (other, _)) in enumerate(pairs) if word != other), min(len(words), len(known))
    )


def _is_scored(value: Any) -> bool:
    match value:
        case {"id": str(), "texts": list(texts)}:
            return all(isinstance(text, list) and all(map(_is_pair, text)) for text in texts)
    return False


def _is_pair(value: Any) -> bool:
    match value:
        case [str(), score]:
            return type(score) in (int, float) and abs(score) <= MAX_FLOAT  # not for NaN
    return False


class Masking:
    """
    Masks words in the token ids of a tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer with a mask token.

    Raises:
        `ValueError`: If the tokenizer has no mask token or no offsets.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.mask_token_id is None or not tokenizer.is_fast:
            raise ValueError(
                f"`masked_words` and `word_scores` need a fast tokenizer with a `mask_token`, which "
                f"{type(tokenizer).__name__} is not. Set its `mask_token` to a token of its vocabulary."
            )
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)

    @cached_property
    def ordinary(self) -> list[int]:
        """The ids of all tokens that are not special."""
        return sorted(set(self.tokenizer.get_vocab().values()) - self.special)

    def words(self, text: str, ids: torch.Tensor, offsets: torch.Tensor) -> tuple[list[str], list[list[int]]]:
        """
        Finds the words of a text in its tokens.

        Args:
            text (`str`): The text.
            ids (`torch.Tensor`): Its token ids [L].
            offsets (`torch.Tensor`): Their offsets [L, 2], as the tokenizer returns them.

        Returns:
            `tuple`: The words, and the indices of the tokens of each.
        """
        prepared = getattr(self.tokenizer, "offset_text", str)(text)  # `LoTLIPTokenizer` cleans texts
        start, end = map(len, getattr(self.tokenizer, "prompt_template", "{}").split("{}"))
        spans = offsets.tolist()
        stop = min(len(prepared) - end, max(span[1] for span in spans))  # of the text that is not cut
        words = [word for word in split_words(prepared[:stop]) if word.start >= start]
        starts, tokens = [word.start for word in words], [[] for _ in words]
        for index, (token_id, (first, last)) in enumerate(zip(ids.tolist(), spans, strict=True)):
            number = bisect_left(starts, last) - 1  # the last word that starts before the end of the token
            if first < last and token_id not in self.special and number >= 0 and words[number].end > first:
                tokens[number].append(index)
        found = [(word.text, own) for word, own in zip(words, tokens, strict=True) if own]
        return [word for word, _ in found], [own for _, own in found]

    def mask(
        self,
        ids: torch.Tensor,
        words: Sequence[Sequence[int]],
        probabilities: Sequence[float],
        rng: Random,
        at_least: int = 0,
    ) -> torch.Tensor:
        """
        Masks words in ids [L], in place: 80 % of the chosen words become mask tokens, 10 % random tokens, and the rest
        stay as they are, as in BERT.

        Args:
            ids (`torch.Tensor`): Token ids [L].
            words (`Sequence[Sequence[int]]`): Indices of the tokens of each word.
            probabilities (`Sequence[float]`): Probability of each word to be chosen.
            rng (`Random`): Random generator.
            at_least (`int`, *optional*, defaults to 0): 1 to choose one word at random if there is none.

        Returns:
            `torch.Tensor`: Labels [L]: the ids of the chosen words, and -100 elsewhere.
        """
        labels = torch.full_like(ids, IGNORED)
        chosen = [word for word, one in zip(words, probabilities, strict=True) if rng.random() < one]
        if words and len(chosen) < at_least:
            chosen = [rng.choice(words)]
        for word in map(list, chosen):
            labels[word] = ids[word]
            kind = rng.random()
            if kind < REPLACED:
                ids[word] = self.tokenizer.mask_token_id
            elif kind < REPLACED + RANDOM:
                ids[word] = torch.tensor([rng.choice(self.ordinary) for _ in word])
        return labels
