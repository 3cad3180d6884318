"""Many texts to ids, each distinct word tokenised once."""

from ..modeling.calls_lotlip import own_backend
from ..modeling.tokenization_lotlip import LoTLIPTokenizer


def encode_unpadded(
    tokenizer: LoTLIPTokenizer, texts: list[str], max_length: int | None = None
) -> tuple[list[list[int]], list[bool]]:
    """
    The ids of many texts, as a call with `truncation=True` gives them, and which of them were cut.

    It is several times as fast as a call, as BERT's WordPiece looks at one word at a time: each word of the texts is
    tokenised once. Other kinds of tokenizers get there by a call.

    Args:
        tokenizer (`LoTLIPTokenizer`): the tokenizer.
        texts (`list[str]`): the texts.
        max_length (`int`, *optional*): number of tokens that a text is cut at, special ones included; by default
            `tokenizer.model_max_length`.

    Returns:
        `tuple[list[list[int]], list[bool]]`: for each text its ids, special ones included and not padded, and whether
        it was longer than `max_length`.

    Raises:
        ValueError: if there are no texts, or one holds half of a character cut in two (see `clean_text`).

    Example:

    ```python
    >>> encode_unpadded(tokenizer, ["A cat sleeps. A dog barks."], max_length=6)
    ([[101, 1037, 4937, 25126, 102, 102]], [True])
    ```
    """
    limit = tokenizer.model_max_length if max_length is None else max_length
    backend = own_backend(tokenizer.backend_tokenizer)
    plain = backend.encode("a", add_special_tokens=False).ids
    adds_cls_and_sep = backend.encode("a").ids == [tokenizer.cls_token_id, *plain, tokenizer.sep_token_id]
    if not texts or limit < 2 or not tokenizer.is_local_to_words() or not adds_cls_and_sep:
        return _by_call(tokenizer, texts, max_length)
    # Of each text the words, and `None` for each separator between its sentences
    rows: list[list[str | None]] = []
    for text in texts:
        row: list[str | None] = []
        for sentence in tokenizer.sentences(text):
            sentence.encode()  # an error that says where, if half of a character that was cut in two is left
            row += [*sentence.split(" "), None]
        rows.append(row[:-1])
    vocabulary = list({word for row in rows for word in row[:limit] if word})
    backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings = backend.encode_batch_fast(vocabulary, add_special_tokens=False)
    ids_of = {word: encoding.ids for word, encoding in zip(vocabulary, encodings, strict=True)}
    ids_of |= {"": [], None: [tokenizer.sep_token_id]}

    input_ids, was_cut = [], []
    for text, row in zip(texts, rows, strict=True):
        ids = [i for word in row[:limit] for i in ids_of[word]]
        # Most often these are enough, but a word may have no token, such as a zero-width space.
        if len(ids) <= limit - 2 and len(row) > limit:
            (ids,), (cut,) = _by_call(tokenizer, [text], max_length)
        else:
            cut = len(ids) > limit - 2
            ids = [tokenizer.cls_token_id, *ids[: limit - 2], tokenizer.sep_token_id]
        input_ids.append(ids)
        was_cut.append(cut)
    return input_ids, was_cut


def _by_call(
    tokenizer: LoTLIPTokenizer, texts: list[str], max_length: int | None
) -> tuple[list[list[int]], list[bool]]:
    encoding = tokenizer(texts, truncation=True, max_length=max_length, verbose=False)
    return encoding["input_ids"], [bool(one.overflowing) for one in encoding.encodings or ()]
