"""Cleaning and sentence splitting of LoTLIP's tokenizer, without transformers."""

import hashlib
import html
import json
import re
from typing import Any

import ftfy
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .calls_lotlip import own_backend
from .sentences_lotlip import STOP, find_sentences

# Joins sentences while they are cleaned, as in the official code: ftfy's result depends on adjacent characters.
JOINER = "[SEP]"
# Matches a character that needs ftfy and `html.unescape`. Without a match, both change only white space and quotes:
# broken text (`ftfy.badness`) has a control character, one of ÂÃŒœ, or two adjacent characters outside ASCII. The
# first lookbehind lets single Latin-1 letters and signs pass.
NEEDS_REPAIR = re.compile(r"[^ -%'-~\t\n\r\xa0–—‘’“”…](?:(?<=[^¡-ÁÄ-ÿ])|(?<=[^\x00-\x7f].)|(?=[^\x00-\x7f]))")
# ftfy undoes one level of "&amp;amp;..." in each pass over the text: a million characters would take hours.
DEEP_AMPERSAND = re.compile(r"&(?:amp;){16,}")
FULL_STOP = ". "
# In a tokenizer.json, the placeholder of a special token is its index between OPEN and CLOSE. These are pairs of
# dashes, which normalisers keep and BERT splits. GUARD is the first step: it separates such dashes of a text, and its
# presence identifies a normaliser that this class wrote.
OPEN, CLOSE = "\u2e3b\u2e3a", "\u2e3a\u2e3b"
GUARD = {"type": "Replace", "pattern": {"String": OPEN}, "content": " ".join(OPEN)}
# The tokenizers library and JavaScript read these regular expressions alike.
SIGN = r"[!-/:-@\[-`{-~\p{P}]"  # punctuation for BERT


def clean(text: str) -> str:
    """Cleans a text as the official code does: `ftfy.fix_text`, `html.unescape` twice, white space collapsed."""
    if NEEDS_REPAIR.search(text):
        text = DEEP_AMPERSAND.sub("&" + 16 * "amp;", text)
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    else:
        text = text.replace("‘", "'").replace("’", "'").replace("“", '"').replace("”", '"')
    return " ".join(text.split())


def sentences_of(
    text: str, clean_text: bool = True, split_sentences: bool = True, cleaning: str = "official"
) -> list[str]:
    """Cleans a text and splits it where separator tokens are inserted. The options are those of `LoTLIPTokenizer`."""
    sentences = [text]
    if split_sentences:
        sentences = text.split(FULL_STOP) if cleaning == "official" else _by_rules(text)
    if not clean_text:
        return sentences
    cleaned = clean(JOINER.join(sentences))
    if "\x1b" not in text and cleaned.count(JOINER) == len(sentences) - 1:
        return cleaned.split(JOINER)
    # The text contains "[SEP]", "&#91;SEP&#93;" or an escape sequence. It cannot contain a digest of itself.
    joiner = f"(SEP{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:16]})"
    return clean(joiner.join(sentences)).split(joiner)


def _by_rules(text: str) -> list[str]:
    """Splits a text at the ends of its sentences and drops the full stops, except for the last."""
    parts, last, start = [], 0, 0
    for _, end, mark in find_sentences(text):
        parts.append(text[start : end - len(mark)] + STOP.sub("", mark))
        last, start = start, end
    return [*parts[:-1], text[last:]]


def is_local_to_words(backend: Tokenizer) -> bool:
    """Whether the tokens of a word do not depend on the rest of the text, as with BERT's tokenizer."""
    added = backend.get_added_tokens_decoder().values()
    return (
        isinstance(backend.model, models.WordPiece)
        and isinstance(backend.normalizer, normalizers.BertNormalizer | None)
        and isinstance(backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        and all(token.content.isascii() and token.content.split() == [token.content] for token in added)
    )


def without_cleaning(backend: Tokenizer) -> Tokenizer:
    """
    The backend of a `LoTLIPTokenizer`, made from its `tokenizer.json`: without the steps for other readers, and with a
    search for special tokens before the text is normalised, so that a normaliser cannot create one.
    """
    _remove_cleaning(backend)
    added = [token.__getstate__() for token in backend.get_added_tokens_decoder().values()]
    special = [AddedToken(**{**one, "normalized": False}) for one in added if one["special"] and one["normalized"]]
    backend.add_special_tokens(special)
    # Rebuild the backend: the old one still has the names of special tokens in normalised form.
    return own_backend(backend)


def _remove_cleaning(backend: Tokenizer) -> None:
    """Removes the steps that [`LoTLIPTokenizer.bare_tokenizer`] added for other readers."""
    state = {} if backend.normalizer is None else json.loads(backend.normalizer.__getstate__())
    before, *own = state.get("normalizers") or [{}]
    if before.get("normalizers", [None])[0] != GUARD:
        return
    backend.normalizer = _part(normalizers.Sequence([]), own[0]["normalizers"])
    split = b"" if backend.pre_tokenizer is None else backend.pre_tokenizer.__getstate__()
    if json.dumps(f"|{SIGN}")[1:-1].encode() in split:
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif isinstance(backend.decoder, decoders.Sequence) and not isinstance(backend.model, models.Unigram):
        steps = json.loads(backend.decoder.__getstate__())["decoders"]
        backend.decoder = _part(decoders.Sequence([]), [one for one in steps if one.get("content") != ""])


def _part(empty: Any, states: list[dict[str, Any]]) -> Any:
    for state in states:
        empty.__setstate__(json.dumps(state).encode())
    return empty if states else None
