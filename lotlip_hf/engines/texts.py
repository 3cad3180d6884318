"""Tokenises many texts at once, each distinct word only once."""

from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from ..modeling.calls_lotlip import own_backend

if TYPE_CHECKING:
    from ..modeling.tokenization_lotlip import LoTLIPTokenizer


def encode_unpadded(
    tokenizer: "LoTLIPTokenizer", texts: list[str], max_length: int | None = None
) -> tuple[list[list[int]], list[bool]]:
    """
    Encodes many texts as token ids, like a call with `truncation=True`, and tells which texts were cut.

    With BERT's WordPiece, this function is several times as fast as a call: WordPiece encodes each word separately, so
    each distinct word is encoded once. Other kinds of tokenizers are called as usual.

    Args:
        tokenizer (`LoTLIPTokenizer`): Tokenizer.
        texts (`list[str]`): Texts.
        max_length (`int`, *optional*): Maximum length in tokens, special tokens included. Defaults to
            `tokenizer.model_max_length`.

    Returns:
        `tuple[list[list[int]], list[bool]]`: Ids of each text, with special tokens and without padding, and whether
        the text was longer than `max_length`.

    Raises:
        `ValueError`: If there are no texts, or if a text contains half a surrogate pair.

    Example:

    ```python
    >>> encode_unpadded(tokenizer, ["A cat sleeps. A dog barks."], max_length=6)
    ([[101, 1037, 4937, 25126, 102, 102]], [True])
    ```
    """
    limit = tokenizer.model_max_length if max_length is None else max_length
    backend = own_backend(tokenizer.backend_tokenizer)
    ends = tokenizer.cls_token_id, tokenizer.sep_token_id
    has_template = tokenizer.prompt_template != "{}"
    if not texts or limit < 2 or has_template or not tokenizer.is_local_to_words() or not adds_ends(backend, *ends):
        encoding = tokenizer(texts, truncation=True, max_length=max_length, verbose=False)
        return encoding["input_ids"], [bool(one.overflowing) for one in encoding.encodings or ()]
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return encode_words(backend, [tokenizer.sentences(text) for text in texts], limit, *ends)


def adds_ends(backend: Tokenizer, cls_token_id: int, sep_token_id: int) -> bool:
    """Whether a backend encodes a text between two special tokens, as BERT's does."""
    plain = backend.encode("a", add_special_tokens=False).ids
    return backend.encode("a").ids == [cls_token_id, *plain, sep_token_id]


def encode_words(
    backend: Tokenizer, texts: list[list[str]], limit: int, cls_token_id: int, sep_token_id: int
) -> tuple[list[list[int]], list[bool]]:
    """
    Encodes texts by a backend whose tokens of a word do not depend on other words.

    Args:
        backend (`Tokenizer`): Backend, see [`~lotlip_hf.modeling.cleaning_lotlip.is_local_to_words`].
        texts (`list[list[str]]`): Cleaned sentences of each text.
        limit (`int`): Maximum length in tokens, special tokens included, at least 2.
        cls_token_id (`int`): Token before each text.
        sep_token_id (`int`): Token after each sentence.

    Returns:
        `tuple[list[list[int]], list[bool]]`: Ids of each text, and whether the text was cut.
    """
    # Words of each text, with `None` for each separator between sentences.
    rows: list[list[str | None]] = []
    for sentences in texts:
        row: list[str | None] = []
        for sentence in sentences:
            sentence.encode()  # raises an error for half a surrogate pair
            row += [*sentence.split(" "), None]
        rows.append(row[:-1])
    ids_of: dict[str | None, list[int]] = {"": [], None: [sep_token_id]}

    def learn(words: set[str | None]) -> None:
        new = [word for word in words - ids_of.keys() if word]
        encodings = backend.encode_batch_fast(new, add_special_tokens=False)
        ids_of.update((word, encoding.ids) for word, encoding in zip(new, encodings, strict=True))

    learn({word for row in rows for word in row[:limit]})
    input_ids, was_cut = [], []
    for row in rows:
        ids = [i for word in row[:limit] for i in ids_of[word]]
        if len(ids) <= limit - 2 and len(row) > limit:  # words without tokens, such as a zero-width space
            learn(set(row))
            ids = [i for word in row for i in ids_of[word]]
        was_cut.append(len(ids) > limit - 2)
        input_ids.append([cls_token_id, *ids[: limit - 2], sep_token_id])
    return input_ids, was_cut
