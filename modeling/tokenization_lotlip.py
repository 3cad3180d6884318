"""The text side of LoTLIP's input: the official cleaning and sentence splitting around any fast tokenizer."""

import html
import itertools
import json
import os
import re
import string
from collections.abc import Iterator
from typing import Any, Literal, get_args

import ftfy
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import BatchEncoding, TruncationStrategy
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import logging

from .calls_lotlip import for_one_call, free_of_calls, own_backend
from .sentences_lotlip import ABBREVIATIONS, NUMBERED, STOP, find_sentences

logger = logging.get_logger(__name__)

# Where two sentences meet while a text is cleaned. ftfy looks at a character's neighbours, so this is the official
# code's own "[SEP]", whatever the tokenizer calls its separator.
JOINER = "[SEP]"
# A character that makes a text need ftfy and `html.unescape`. Of one without any they change white space and quotes
# alone: "&" and control characters apart, ftfy takes for broken (`ftfy.badness`) only what has a control character,
# one of ÂÃŒœ or two neighbours beyond ASCII, and of the neighbours below none.
NEEDS_REPAIR = re.compile(
    r"""
    [^ -%'-~\t\n\r\xa0–—‘’“”…]
    (?:
        (?<=[^¡-ÁÄ-ÿ])  # none of the letters and signs that are in order where they stand by themselves
        | (?<=[^\x00-\x7f].)
        | (?=[^\x00-\x7f])
    )
    """,
    re.VERBOSE,
)
# ftfy undoes one level of "&amp;amp;..." with each pass over the text: a million characters of it would take hours.
DEEP_AMPERSAND = re.compile(r"&(?:amp;){16,}")
SURROGATE = re.compile("[\ud800-\udfff]")
# A code point that Unicode keeps free for a program's own use.
MARK = "\ufdd0"
FULL_STOP = ". "
# Signs that are written right behind a word
CLOSING = frozenset(".,!?;:%)]'’-")
# A text after which a space would make the end of a sentence, by `cleaning`
OFFICIAL_STOP = re.compile(r"\.\Z")
RULES_STOP = re.compile(r"""[.!?…]["'”’)\]]*\Z""")

Cleaning = Literal["official", "sentences"]


def _either_case(word: str) -> str:
    """A regular expression of a whole word, in capitals or not."""
    return r"\b" + "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else r"\." for letter in word)


# In a tokenizer.json, around the number of a special token: what stands for it in a normalised text. Dashes of two and
# three em, which any normaliser leaves as they are, and BERT splits from each other whether or not a space stands
# between them. The first step, by which the class knows its own normaliser again, parts those of a text.
OPEN, CLOSE = "\u2e3b\u2e3a", "\u2e3a\u2e3b"
GUARD = {"type": "Replace", "pattern": {"String": OPEN}, "content": " ".join(OPEN)}
# Regular expressions that the tokenizers library and JavaScript read alike
BERT = {"type": "BertPreTokenizer"}
SIGN = r"[!-/:-@\[-`{-~\p{P}]"  # what BERT takes for one
WHOLE = r"(?<![\s\S]){}(?![\s\S])"
END_OF_LINE = r"(?<=[^.!?…。．｡।॥۔\s])[^\S\n]*\n\s*(?=\S)"
END_OF_QUESTION = r"(?<=[!?]|[!?][\"'”’)\]])\s+(?=\S)"
# A full stop behind none of the abbreviations and initials, or if it may end a sentence all the same
END_OF_STATEMENT = (
    rf"(?<!{'|'.join(map(_either_case, sorted(ABBREVIATIONS)))}|\s[A-Z])"
    rf"(?!(?<={'|'.join(map(_either_case, sorted(NUMBERED)))})\.\s+\d)"
    r"(?!(?<=\b[A-Za-z]\.[A-Za-z])\.\s+[a-z])"
    r"[.…]+(?=\s+\S)|[。．｡।॥۔]+(?=\s*\S)"
)


def clean(text: str) -> str:
    """Repair a text as the official code does: `ftfy.fix_text`, `html.unescape` twice, white space collapsed.

    Args:
        text: Any text.

    Returns:
        The repaired text, with single spaces and none at either end.

    Example:

    ```python
    >>> clean("schÃ¶n &amp;amp;  neu")
    'schön & neu'
    ```
    """
    if NEEDS_REPAIR.search(text):
        text = DEEP_AMPERSAND.sub("&" + 16 * "amp;", text)
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    else:
        text = text.replace("‘", "'").replace("’", "'").replace("“", '"').replace("”", '"')
    return " ".join(text.split())


class LoTLIPTokenizer(TokenizersBackend):
    """
    A tokenizer for long captions: it cleans the text, marks where sentences end, and hands it to a fast tokenizer.

    It takes any `tokenizer.json` (BERT's WordPiece, RoBERTa's BPE, XLM-R's Unigram) or a folder that holds just BERT's
    `vocab.txt`, and gives `[CLS] words [SEP]`. LoTLIP's corner tokens are no tokens here: the model adds them, so
    `model_max_length` is the model's number of positions less its corner tokens (126 for the released models).

    The steps are those of the official code (`open_clip/tokenizer.py` of wuw2019/LoTLIP), in its order: every `". "`
    becomes the separator token (so a full stop that ends a sentence goes, and that of an abbreviation), the text is
    cleaned, then tokenized. One thing differs: what stands in a text stays text. `"[SEP]"` or `"[MASK]"` written out
    in a caption, or spelt as `"&#91;SEP&#93;"`, is three or more ordinary tokens, never the special one.

    No call changes the tokenizer: threads can share one, and what is saved keeps no limit of a call. The saved
    `tokenizer.json` cleans and splits texts by itself as far as its format allows (see `bare_tokenizer`).

    Words given with `is_split_into_words=True` are taken as they are: neither cleaned nor split into sentences.
    Offsets (`return_offsets_mapping`, `char_to_token`, ...) count characters of the cleaned text.

    Args:
        vocab (`str` or `dict[str, int]`, *optional*):
            BERT's `vocab.txt` (a path) or its content, in place of a `tokenizer.json`. `do_lower_case`,
            `strip_accents` and `tokenize_chinese_chars` are then those of `BertTokenizer`.
        clean_text (`bool`, *optional*, defaults to `True`):
            Whether to repair broken encodings and HTML entities and to collapse white space (see `clean`).
        split_sentences (`bool`, *optional*, defaults to `True`):
            Whether the separator token takes the place of the full stop between two sentences.
        cleaning (`str`, *optional*, defaults to `"official"`):
            Where sentences end: `"official"`, at every `". "`, those of "Dr. X" and "z. B." included, as the released
            models were trained; or `"sentences"`, by the rules that captions are split by for training (`!`, `?` and
            line ends end sentences too; abbreviations, initials and numbers do not).
        split_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether special tokens written out in a text are text. `False`, here or in a call, reads them as special
            tokens, as the official code does.

    Raises:
        ValueError: `vocab` lacks one of BERT's special tokens, or there is nothing to build a tokenizer from.

    Example:

    ```python
    >>> tokenizer = LoTLIPTokenizer.from_pretrained("folder-with-vocab.txt", model_max_length=126)
    >>> tokenizer.tokenize("A cat sleeps. A dog barks at the [MASK].")
    ['a', 'cat', 'sleeps', '[SEP]', 'a', 'dog', 'barks', 'at', 'the', '[', 'mask', ']', '.']
    ```
    """

    _auto_class = "AutoTokenizer"
    vocab_files_names = {"vocab_file": "vocab.txt", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    # Backends of calls that have ended, for the next calls; `None` where the shared one may have changed since.
    _spare_backends: list[tuple[Tokenizer, list[str]]] | None = None

    def __init__(
        self,
        vocab: str | dict[str, int] | None = None,
        clean_text: bool = True,
        split_sentences: bool = True,
        split_special_tokens: bool = True,
        cleaning: Cleaning = "official",
        **kwargs: Any,
    ) -> None:
        if cleaning not in get_args(Cleaning):
            raise ValueError(f"`cleaning` must be one of {', '.join(get_args(Cleaning))}, got {cleaning!r}.")
        self.clean_text = clean_text
        self.split_sentences = split_sentences
        self.cleaning = cleaning
        # By default transformers takes the sides from the padding and truncation that a tokenizer.json has kept.
        kwargs.setdefault("padding_side", "right")
        kwargs.setdefault("truncation_side", "right")
        if vocab is not None:
            kwargs = _word_piece(vocab, kwargs)
        elif kwargs.get("tokenizer_object") is None and kwargs.get("tokenizer_file") is None:
            raise ValueError(
                f"LoTLIPTokenizer found no tokenizer.json or vocab.txt in {kwargs.get('name_or_path') or 'no folder'} "
                "and no `vocab` was given. For a tokenizer kept in other files use "
                "LoTLIPTokenizer.from_backbone_tokenizer(AutoTokenizer.from_pretrained(...))."
            )
        super().__init__(
            clean_text=clean_text,
            split_sentences=split_sentences,
            split_special_tokens=split_special_tokens,
            cleaning=cleaning,
            **kwargs,
        )
        # The file's cleaning is for other readers: this class cleans by itself.
        _remove_cleaning(self._tokenizer)
        # A special token is looked for in the text before it is normalised, so that no normaliser can write one.
        self._tokenizer.add_special_tokens(
            [
                AddedToken(t.content, single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip, normalized=False)
                for t in self.added_tokens_decoder.values()
                if t.special and t.normalized
            ]
        )
        # anew, for a backend goes on calling a token by what an earlier normaliser made of its name
        self._tokenizer = own_backend(self._tokenizer)
        self._tokenizer.encode_special_tokens = split_special_tokens
        free_of_calls(self)
        self._spare_backends = []

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *init_inputs: Any, **kwargs: Any
    ) -> "LoTLIPTokenizer":
        """
        As [`~transformers.PreTrainedTokenizerBase.from_pretrained`]; what came from the Hub is checked. `max_length`
        is another name for `model_max_length` here, the limit of every call that gives none.

        Raises:
            OSError: if there is no such tokenizer, or a file came damaged.
        """
        if kwargs.get("max_length") is not None:
            kwargs.setdefault("model_max_length", kwargs.pop("max_length"))
        return super().from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)

    @classmethod
    def from_backbone_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> "LoTLIPTokenizer":
        """Put LoTLIP's cleaning and sentence splitting around the tokenizer of a pretrained text encoder.

        Args:
            tokenizer: A fast tokenizer, as `AutoTokenizer.from_pretrained` gives it. It is copied, not changed.
            kwargs: This class's arguments. `model_max_length` should be the encoder's number of usable positions less
                the corner tokens.

        Returns:
            A tokenizer with the same vocabulary and special tokens.

        Raises:
            ValueError: `tokenizer` is not a fast tokenizer.

        Example:

        ```python
        >>> roberta = AutoTokenizer.from_pretrained("FacebookAI/roberta-base")
        >>> tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(roberta, model_max_length=510)
        ```
        """
        if not isinstance(tokenizer, TokenizersBackend):
            raise ValueError(
                f"`tokenizer` must be a fast tokenizer (one with a tokenizer.json), got {type(tokenizer).__name__}."
            )
        settings = {
            "model_max_length": tokenizer.model_max_length,
            "padding_side": tokenizer.padding_side,
            "truncation_side": tokenizer.truncation_side,
            **tokenizer.special_tokens_map,
            **kwargs,
        }
        return cls(tokenizer_object=tokenizer.backend_tokenizer, **settings)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        # A tokenizer.json is the whole tokenizer, whatever its kind: no part of it is built anew.
        tokenizer_file = kwargs.get("tokenizer_file")
        if tokenizer_file is not None and os.path.isfile(tokenizer_file):
            return kwargs
        return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)

    def count_truncated(self, encoding: BatchEncoding) -> int:
        """How many of the texts that one call of this tokenizer returned were cut at its length limit.

        Args:
            encoding: What the tokenizer returned, before any `pad`.

        Returns:
            The number of texts (or text pairs) that were longer than the limit.

        Raises:
            ValueError: `encoding` does not come from a tokenizer call, or keeps the overflowing tokens.

        Example:

        ```python
        >>> batch = tokenizer(texts, truncation=True, verbose=False)
        >>> print(f"{tokenizer.count_truncated(batch)} of {len(texts)} texts were cut")
        ```
        """
        if not isinstance(encoding, BatchEncoding) or encoding.encodings is None:
            raise ValueError("`encoding` must be what a call of this tokenizer returned.")
        if "overflow_to_sample_mapping" in encoding:
            raise ValueError("`encoding` was made with `return_overflowing_tokens=True`: nothing was cut from it.")
        return sum(1 for text in encoding.encodings if text.overflowing)

    def _encode_plus(
        self,
        text: Any,
        text_pair: Any = None,
        is_split_into_words: bool = False,
        split_special_tokens: bool | None = None,
        return_overflowing_tokens: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> BatchEncoding:
        """All of `__call__`, `encode` and `tokenize` come through here."""
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        kwargs.update(return_overflowing_tokens=return_overflowing_tokens, verbose=verbose)
        spare, backend, special = self._own_backend()
        unmark = normalizer = None
        # The marks of a chat template would not survive the cleaning.
        if not kwargs.get("sanitize_control_tokens"):
            if isinstance(text, (list, tuple)) and not text:
                raise ValueError("`text` is empty: it must hold at least one string.")
            strings = [*_strings(text, "text", is_split_into_words)]
            if text_pair is not None:
                strings += _strings(text_pair, "text_pair", is_split_into_words)
            if is_split_into_words or not self.clean_text:  # cleaning would mend them
                _check_surrogates(strings)
            sentences = {one: [one] if is_split_into_words else self._sentences(one) for one in strings}
            if split_special_tokens:
                unmark = self._mark_special_tokens(sentences, special)
                if unmark is not None:
                    normalizer = backend.normalizer
                    backend.normalizer = normalizers.Sequence([unmark, normalizer] if normalizer else [unmark])
                split_special_tokens = False  # what is left in the texts is plain, and the separators are ours
            joined = {one: (self.sep_token or "").join(parts) for one, parts in sentences.items()}
            text, text_pair = _replaced(text, joined), _replaced(text_pair, joined)

        # Of a long text the beginning is enough.
        beginning, limit = text, kwargs.get("max_length")
        if (
            kwargs.get("truncation_strategy", TruncationStrategy.DO_NOT_TRUNCATE) != TruncationStrategy.DO_NOT_TRUNCATE
            and limit
            and text_pair is None
            and not (is_split_into_words or return_overflowing_tokens or kwargs.get("sanitize_control_tokens"))
            and all(isinstance(one, str) for one in ([text] if isinstance(text, str) else text))
            and any(len(one) >= limit for one in ([text] if isinstance(text, str) else text))
            and self._is_local_to_words()
        ):
            beginning = _first_words(text, limit)
        kwargs.update(is_split_into_words=is_split_into_words, split_special_tokens=split_special_tokens)
        encode = super(LoTLIPTokenizer, for_one_call(self, backend))._encode_plus
        encoding = encode(beginning, text_pair, **kwargs)
        if beginning != text and not _fills_limit(encoding, beginning, text):
            encoding = encode(text, text_pair, **kwargs)
        if unmark is not None:
            backend.normalizer = normalizer
        spare.append((backend, special))
        if verbose and not return_overflowing_tokens and encoding.encodings is not None:
            self._warn_once_of_truncation(encoding, kwargs.get("max_length"))
        return encoding

    def encode_unpadded(self, texts: list[str], max_length: int | None = None) -> tuple[list[list[int]], list[bool]]:
        """The ids of many texts, as a call with `truncation=True` gives them, and which of them were cut.

        It is several times as fast as a call, as BERT's WordPiece looks at one word at a time: each word of the texts
        is tokenised once. Other kinds of tokenizers get there by a call.

        Args:
            texts: The texts.
            max_length: Number of tokens that a text is cut at, special ones included; by default `model_max_length`.

        Returns:
            For each text its ids, special ones included and not padded, and whether it was longer than `max_length`.

        Raises:
            ValueError: `texts` is not a list of strings or is empty, or one holds half of a character cut in two (see
                `clean_text`).

        Example:

        ```python
        >>> tokenizer.encode_unpadded(["A cat sleeps. A dog barks."], max_length=6)
        ([[101, 1037, 4937, 25126, 102, 102]], [True])
        ```
        """
        if isinstance(texts, str) or not all(isinstance(one, str) for one in texts):
            raise ValueError("`texts` must be a list of strings.")
        limit = self.model_max_length if max_length is None else max_length
        spare, backend, special = self._own_backend()
        backend.no_truncation()
        backend.no_padding()
        if not texts or limit < 2 or not self._is_local_to_words() or not self._adds_cls_and_sep(backend):
            encoding = self(texts, truncation=True, max_length=max_length, verbose=False)
            return encoding["input_ids"], [bool(one.overflowing) for one in encoding.encodings or ()]
        if not self.clean_text:
            _check_surrogates(texts)
        # Of each text the words, and `None` for each separator between its sentences
        rows: list[list[str | None]] = []
        for text in texts:
            row: list[str | None] = []
            for sentence in self._sentences(text):
                row += sentence.split(" ")
                row.append(None)
            rows.append(row[:-1])
        vocabulary = list({word for row in rows for word in row[:limit] if word})
        backend.encode_special_tokens = self.split_special_tokens
        encodings = backend.encode_batch_fast(vocabulary, add_special_tokens=False)
        spare.append((backend, special))
        ids_of = {word: encoding.ids for word, encoding in zip(vocabulary, encodings, strict=True)}
        ids_of |= {"": [], None: [self.sep_token_id]}

        input_ids, was_cut = [], []
        for text, row in zip(texts, rows, strict=True):
            ids = [i for word in row[:limit] for i in ids_of[word]]
            # Most often these are enough, but a word may have no token, such as a zero-width space.
            if len(ids) <= limit - 2 and len(row) > limit:
                encoding = self(text, truncation=True, max_length=max_length, verbose=False)
                input_ids.append(encoding["input_ids"])
                was_cut.append(bool(encoding.encodings[0].overflowing))
            else:
                input_ids.append([self.cls_token_id, *ids[: limit - 2], self.sep_token_id])
                was_cut.append(len(ids) > limit - 2)
        return input_ids, was_cut

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The backend of the tokenizers library."""
        self._spare_backends = None  # the caller may change it at any time
        return self._tokenizer  # pyright: ignore[reportReturnType]

    def _add_tokens(self, *args: Any, **kwargs: Any) -> int:
        number = super()._add_tokens(*args, **kwargs)
        self._drop_spare_backends()
        return number

    def update_post_processor(self) -> None:
        """As [`~transformers.PreTrainedTokenizerFast.update_post_processor`]."""
        super().update_post_processor()
        self._drop_spare_backends()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spare_backends": []}  # made anew faster than copied

    def _drop_spare_backends(self) -> None:
        if self._spare_backends is not None:
            self._spare_backends = []

    def _own_backend(self) -> tuple[list[tuple[Tokenizer, list[str]]], Tokenizer, list[str]]:
        """A backend for one call, as threads share the other: the list to put it back in, itself, special tokens."""
        spare = [] if self._spare_backends is None else self._spare_backends
        try:
            return spare, *spare.pop()
        except IndexError:
            special = [token.content for token in self.added_tokens_decoder.values() if token.special]
            return spare, own_backend(self._tokenizer), special

    def _is_local_to_words(self) -> bool:
        """Whether what stands between two spaces has the same tokens in any text, as with BERT's tokenizer."""
        pipeline = self._tokenizer
        added_tokens = [token.content for token in self.added_tokens_decoder.values()]
        return (
            self.truncation_side == "right"
            and isinstance(pipeline.model, models.WordPiece)
            and isinstance(pipeline.normalizer, normalizers.BertNormalizer | None)
            and isinstance(pipeline.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
            and all(content.isascii() and content.split() == [content] for content in added_tokens)
        )

    def _adds_cls_and_sep(self, backend: Tokenizer) -> bool:
        """Whether a text's tokens stand between [CLS] and [SEP]."""
        plain = backend.encode("a", add_special_tokens=False).ids
        return backend.encode("a").ids == [self.cls_token_id, *plain, self.sep_token_id]

    def _sentences(self, text: str) -> list[str]:
        """The cleaned text, cut where the separator token belongs."""
        if self.split_sentences and self.sep_token is None:
            raise ValueError(
                "`split_sentences=True` puts the separator token between sentences, but this tokenizer has no "
                "`sep_token`: set one, or load it with `split_sentences=False`."
            )
        sentences = [text]
        if self.split_sentences:
            sentences = text.split(FULL_STOP) if self.cleaning == "official" else _by_rules(text)
        if not self.clean_text:
            return sentences
        # ftfy must see the whole text, so it is cleaned joined. A joiner that the text holds as well, or that cleaning
        # makes out of something else in it ("&#91;SEP&#93;"), gives way to another one; so does one that would
        # complete a terminal's escape sequence ("\x1b[S"), which ftfy removes.
        joiner = JOINER if "\x1b" not in text else "(SEP)"
        while True:
            cleaned = clean(joiner.join(sentences))
            if cleaned.count(joiner) == len(sentences) - 1:
                return cleaned.split(joiner)
            taken = set(re.findall(r"\(SEP[0-9]+\)", cleaned))
            joiner = next(other for other in map("(SEP{})".format, itertools.count()) if other not in taken)

    def _mark_special_tokens(self, sentences: dict[str, list[str]], contents: list[str]) -> normalizers.Replace | None:
        """Put marks into the special tokens that are written out in `sentences`, so that they are not taken for such.

        Returns:
            What takes the marks out again, after special tokens were looked for and before anything else is done with
            the text; `None` if there was nothing to mark.
        """
        # A Unigram model would spell a special token that it finds in the normalised text, for its vocabulary holds
        # them: there the marks become spaces, which stay.
        unigram = isinstance(self._tokenizer.model, models.Unigram)
        if unigram and self._tokenizer.normalizer is not None:
            for parts in sentences.values():
                parts[:] = [self._tokenizer.normalizer.normalize_str(part) for part in parts]
        if not any(content in part for parts in sentences.values() for part in parts for content in contents):
            return None
        # A run of marks longer than any that a text may hold itself.
        runs = (run for parts in sentences.values() for part in parts for run in re.findall(f"{MARK}+", part))
        mark = MARK * (1 + max(map(len, runs), default=0))
        special = re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))))
        for parts in sentences.values():
            parts[:] = [special.sub(lambda match: mark.join(match[0]) + mark, part) for part in parts]
        return normalizers.Replace(mark, " " if unigram else "")

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """
        Without special tokens, the text that gives the same ids again: what a separator stands for between two
        sentences is written, and a full stop that ended none is not taken for one.
        """
        separator = self.sep_token_id
        if not skip_special_tokens or not self.split_sentences or separator is None:
            return super()._decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        ids = token_ids["input_ids"] if isinstance(token_ids, dict) else token_ids
        ids = [ids] if isinstance(ids, int) else [i for i in map(int, ids) if i != self.pad_token_id]
        if ids and ids[0] == self.cls_token_id:
            ids = ids[1 : len(ids) - (ids[-1] == separator)]  # the last one ends the text
        parts = [[]]
        for token_id in ids:
            if token_id == separator:
                parts.append([])
            else:
                parts[-1].append(token_id)
        decoded = [self._decode_sentence(part, **kwargs) for part in parts]
        return (FULL_STOP if self.cleaning == "official" else "\n").join(decoded)

    def _decode_sentence(self, ids: list[int], **kwargs: Any) -> str:
        """The text of a sentence's tokens, in which no end of a sentence is found."""
        if self._is_local_to_words():
            # Around a sign a space makes no difference, so that none is needed behind a full stop.
            special = set(self.all_special_ids)
            tokens = [str(self._tokenizer.id_to_token(i)) for i in ids if i not in special]
            stop = OFFICIAL_STOP if self.cleaning == "official" else RULES_STOP
            return _joined(tokens, self._tokenizer.model.continuing_subword_prefix, stop)
        text = super()._decode(ids, skip_special_tokens=True, **kwargs)
        return text.replace(FULL_STOP, ".\n") if self.clean_text and self.cleaning == "official" else text

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """Writes a `tokenizer.json` that cleans and splits texts by itself."""
        file = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + "tokenizer.json")
        content = json.dumps(self.bare_tokenizer(), ensure_ascii=False, indent=2)
        with open(file, "w", encoding="utf-8") as opened:
            opened.write(content)
        return (*file_names, file)

    def bare_tokenizer(self) -> dict[str, Any]:
        """
        What `tokenizer.json` holds: a tokenizer of the tokenizers library that by itself gives the ids of this class
        to ordinary texts. Its normaliser makes the separator token of a sentence's end, collapses white space,
        straightens quotation marks, and composes characters (NFC).

        The format cannot express repairs of broken encodings, HTML entities, ligatures and fullwidth letters (ftfy's
        part of [`clean`]), nor all the rules of `cleaning="sentences"`, nor tell a text that is nothing but one
        special token from that token.

        Returns:
            `dict[str, Any]`: the content of the file.
        """
        state = json.loads(self._tokenizer.to_str())
        state["truncation"] = state["padding"] = None
        if not (self.clean_text or self.split_sentences or self.split_special_tokens):
            return state
        special = [token.content for token in self.added_tokens_decoder.values() if token.special]
        marks = {content: f"{OPEN}{place}{CLOSE}" for place, content in enumerate(special)}
        special.sort(key=len, reverse=True)
        separator = str(self.sep_token) if self.split_sentences else None
        unigram, own = isinstance(self._tokenizer.model, models.Unigram), state["normalizer"]
        by_words = state["pre_tokenizer"] == BERT and all(content[0] in string.punctuation for content in special)
        # Looked for in the normalised text, in which its own name is a mark that nothing else becomes.
        for token in state["added_tokens"]:
            token["normalized"] = token["normalized"] or token["special"]
        before = [GUARD]
        for content in special:
            name = WHOLE.format(_escaped(content)) if self.split_special_tokens else _escaped(content)
            before.append(_replace(name, marks[content]))
        if separator is not None and self.cleaning == "official":
            before.append(_replace(r"\. ", marks[separator]))
        elif separator is not None:
            before += [_replace(pattern, f"{marks[separator]} ") for pattern in (END_OF_LINE, END_OF_QUESTION)]
            before.append(_replace(END_OF_STATEMENT, marks[separator]))
        if self.clean_text:
            before += [
                {"type": "NFC"},
                _replace("[\u02bc\u2018-\u201b]", "'"),
                _replace("[\u201c-\u201f]", '"'),
                _replace(r"\s+", " "),
                {"type": "Strip", "strip_left": True, "strip_right": True},
            ]
        if unigram:
            # It would spell a special token that it finds in the normalised text, for its vocabulary holds them.
            before += [] if own is None else [own]
            before += [_replace(_escaped(content), " ".join(content) + " ") for content in special]
        after = {}
        if by_words or unigram:
            # The model finds them in its vocabulary, for readers that look for no tokens in the normalised text.
            after = {mark: content for content, mark in marks.items()}
        elif separator is not None and self.clean_text:
            after = {marks[separator]: ".\t"}  # what such readers take for a full stop; no other tab is left
        if by_words:
            before += [_replace(_escaped(content), f"{content[0]} {content[1:]}") for content in special]
            names = "|".join(map(_escaped, special))
            state["pre_tokenizer"] = {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "WhitespaceSplit"},
                    {
                        "type": "Split",
                        "pattern": {"Regex": f"{names}|{SIGN}"},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                ],
            }
        elif not unigram:
            names = {after.get(mark, mark) for mark in marks.values()}
            steps = [{"type": "Replace", "pattern": {"String": name}, "content": ""} for name in sorted(names)]
            state["decoder"] = {"type": "Sequence", "decoders": [*steps, *filter(None, [state["decoder"]])]}
        steps = [_sequence(*before), _sequence(*filter(None, [own]))]
        state["normalizer"] = _sequence(*steps, _sequence(*(_replace(mark, to) for mark, to in after.items())))
        return state

    def _warn_once_of_truncation(self, encoding: BatchEncoding, max_length: int | None) -> None:
        if self.deprecation_warnings.get("truncated"):
            return
        truncated = self.count_truncated(encoding)
        if truncated:
            self.deprecation_warnings["truncated"] = True
            logger.warning(
                f"{truncated} of {len(encoding.encodings)} texts were cut at {max_length} tokens. This is said once: "
                "`tokenizer.count_truncated(batch)` counts, `verbose=False` in the call is silent."
            )


def _by_rules(text: str) -> list[str]:
    """A text, cut where its sentences end, without the full stops between them."""
    sentences, start = [], 0
    for sentence in find_sentences(text):
        mark = STOP.sub("", sentence.mark)
        sentences.append((text[start : sentence.end - len(sentence.mark)] + mark, start))
        start = sentence.end
    if not sentences:
        return [text]
    return [*(one for one, _ in sentences[:-1]), text[sentences[-1][1] :]]  # the last keeps its full stop


def _joined(tokens: list[str], prefix: str, stop: re.Pattern[str]) -> str:
    """Tokens of a WordPiece model as a text, without a space behind what would end a sentence then."""
    text = ""
    for token in tokens:
        if token.startswith(prefix) and text:
            text += token.removeprefix(prefix)
        elif not text or text[-1] in "'’-([" or token in CLOSING or stop.search(text, len(text) - 8):
            text += token
        else:
            text += f" {token}"
    return text


def _escaped(content: str) -> str:
    """A regular expression of a text, as the tokenizers library and JavaScript take it."""
    return re.sub(r"[][\\^$.|?*+(){}/]", r"\\\g<0>", content)


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _remove_cleaning(backend: Tokenizer) -> None:
    """Takes the steps that [`LoTLIPTokenizer.bare_tokenizer`] adds out of a backend."""
    if not isinstance(backend.normalizer, normalizers.Sequence):
        return
    steps = json.loads(backend.normalizer.__getstate__())["normalizers"]
    if not steps or steps[0].get("normalizers", [None])[0] != GUARD:
        return
    backend.normalizer = _part(normalizers.Sequence([]), steps[1]["normalizers"])
    if isinstance(backend.model, models.WordPiece) and json.dumps(f"|{SIGN}")[1:-1].encode() in (
        backend.pre_tokenizer.__getstate__()
    ):
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif isinstance(backend.decoder, decoders.Sequence) and not isinstance(backend.model, models.Unigram):
        steps = json.loads(backend.decoder.__getstate__())["decoders"]
        backend.decoder = _part(decoders.Sequence([]), [one for one in steps if one.get("content") != ""])


def _part(empty: Any, states: list[dict[str, Any]]) -> Any:
    """The one part of a pipeline that a state describes, or `None`."""
    if not states:
        return None
    empty.__setstate__(json.dumps(states[0]).encode())
    return empty


def _word_piece(vocab: str | dict[str, int], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `TokenizersBackend` for BERT's vocabulary."""
    source = vocab if isinstance(vocab, str) else "`vocab`"
    if isinstance(vocab, str) and not os.path.isfile(vocab):
        raise ValueError(f"{vocab} is no file: `vocab` must be the path of BERT's vocab.txt, or a dictionary.")
    names = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    options = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    given = {name: kwargs[name] for name in (*names, *options) if kwargs.get(name) is not None}
    bert = BertTokenizer(vocab=vocab, **given)
    tokens = bert.backend_tokenizer.get_vocab(with_added_tokens=False)
    missing = [str(getattr(bert, name)) for name in names if str(getattr(bert, name)) not in tokens]
    if missing:
        raise ValueError(f"{source} holds no {', '.join(missing)}: expected the vocabulary of a BERT model.")
    special_tokens = {name: getattr(bert, name) for name in names}
    return {**special_tokens, **kwargs, "tokenizer_object": bert.backend_tokenizer}


def _strings(value: Any, name: str, words: bool) -> Iterator[str]:
    """Every string of a text, a batch of texts or a batch of text pairs; with `words`, of texts given word by word."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if isinstance(item, str):
                yield item
            elif isinstance(item, (list, tuple)) and words:
                yield from _strings(item, f"{name}[{index}]", words)
            elif isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(part, str) for part in item):
                yield from item
            else:
                raise ValueError(f"`{name}[{index}]` must be a string or a pair of strings, got {_described(item)}.")
    else:
        raise ValueError(f"`{name}` must be a string or a list of strings, got {_described(value)}.")


def _first_words(text: Any, count: int) -> Any:
    """A text, or a list of texts, up to the space behind the first `count` words and signs of each."""
    if not isinstance(text, str):
        return [_first_words(one, count) for one in text]
    if len(text) < count:
        return text
    # Each is a token at least. Brackets are not counted, as they may be those of a special token.
    sign = r"!-/:-@\\^`{-~"
    beginning = re.match(rf"(?:[^\w{sign}]*(?:\w+\b|[{sign}])){{{count}}}[^ ]*", text)
    return text if beginning is None else beginning[0]


def _fills_limit(encoding: BatchEncoding, beginning: Any, text: Any) -> bool:
    """Whether the tokens of each text that was left at its beginning are more than are kept.

    Most often they are, but a word may have no token, such as a zero-width space.
    """
    pairs = zip(_strings(beginning, "text", False), _strings(text, "text", False), encoding.encodings, strict=True)
    return all(one.overflowing or first == whole for first, whole, one in pairs)


def _check_surrogates(strings: list[str]) -> None:
    for one in strings:
        if surrogate := SURROGATE.search(one):
            raise ValueError(
                f"{one[:40]!r} holds U+{ord(surrogate[0]):04X} at position {surrogate.start()}, half of a character "
                "cut in two: mend the text, or let `clean_text=True` do so."
            )


def _described(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__


def _replaced(value: Any, strings: dict[str, str]) -> Any:
    """A copy of `value` with every string replaced."""
    if isinstance(value, tuple):
        return tuple(_replaced(item, strings) for item in value)
    if isinstance(value, list):
        return [_replaced(item, strings) for item in value]
    return strings[value] if isinstance(value, str) else value


__all__ = ["LoTLIPTokenizer"]
