"""Tokenises many texts at once, each distinct word only once."""

from ..modeling.calls_lotlip import own_backend
from ..modeling.tokenization_lotlip import LoTLIPTokenizer


def encode_unpadded(
    tokenizer: LoTLIPTokenizer, texts: list[str], max_length: int | None = None
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
    plain = backend.encode("a", add_special_tokens=False).ids
    adds_cls_and_sep = backend.encode("a").ids == [tokenizer.cls_token_id, *plain, tokenizer.sep_token_id]
    has_template = tokenizer.prompt_template != "{}"
    if not texts or limit < 2 or has_template or not tokenizer.is_local_to_words() or not adds_cls_and_sep:
        return _by_call(tokenizer, texts, max_length)
    # Words of each text, with `None` for each separator between sentences.
    rows: list[list[str | None]] = []
    for text in texts:
        row: list[str | None] = []
        for sentence in tokenizer.sentences(text):
            sentence.encode()  # raises an error for half a surrogate pair
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
        # If words without tokens, such as a zero-width space, leave too few ids, call the tokenizer.
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
