"""LoTLIP's tokenizer: the official cleaning and sentence splitting around any fast tokenizer."""

import json
import os
import re
import string
from collections.abc import Callable
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer, models, normalizers
from transformers import BertTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import BatchEncoding
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import logging

from .calls_lotlip import for_one_call, free_of_calls, own_backend
from .cleaning_lotlip import (
    CLOSE,
    FULL_STOP,
    GUARD,
    OPEN,
    SIGN,
    is_local_to_words,
    sentences_of,
    without_cleaning,
)
from .sentences_lotlip import ABBREVIATIONS, NUMBERED

logger = logging.get_logger(__name__)

# Noncharacters, which Unicode reserves for internal use. If a text contains the name of a special token, HIDING is
# inserted after each character of the name. If a text contains MARK, ITSELF replaces it.
MARK, HIDING, ITSELF = "\ufdd0", "\ufdd0\ufdd1", "\ufdd0\ufdd2"
CLOSING = frozenset(".,!?;:%)]'’-")  # signs without a space before them
# Value of `cleaning` -> pattern of the end of a text, after which a space would end a sentence.
STOPS = {"official": re.compile(r"\.\Z"), "sentences": re.compile(r"""[.!?…]["'”’)\]]*\Z""")}


def _either_case(word: str) -> str:
    return r"\b" + "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else r"\." for letter in word)


def _escaped(content: str) -> str:
    """Escapes a text for a regular expression of the tokenizers library and of JavaScript."""
    return re.sub(r"[][\\^$.|?*+(){}/]", r"\\\g<0>", content)


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


WHOLE = r"(?<![\s\S]){}(?![\s\S])"
END_OF_TEXT = rf"(?<!{CLOSE})(?![\s\S])"  # but not of a name of a special token
END_OF_LINE = r"(?<=[^.!?…。．｡।॥۔\s])[^\S\n]*\n\s*(?=\S)"
END_OF_QUESTION = r"(?<=[!?]|[!?][\"'”’)\]])\s+(?=\S)"
# A full stop that follows no abbreviation or initial. NUMBERED words count as abbreviations before a digit, and
# letters such as "U.S." before a small letter.
END_OF_STATEMENT = (
    rf"(?<!{'|'.join(map(_either_case, sorted(ABBREVIATIONS)))}|\s[A-Z])"
    rf"(?!(?<={'|'.join(map(_either_case, sorted(NUMBERED)))})\.\s+\d)"
    r"(?!(?<=\b[A-Za-z]\.[A-Za-z])\.\s+[a-z])"
    r"[.…]+(?=\s+\S)|[。．｡।॥۔]+(?=\s*\S)"
)
# Value of `cleaning` -> patterns of sentence ends, each with the text to insert after the separator token.
SENTENCE_ENDS = {
    "official": [(r"\. ", "")],
    "sentences": [(END_OF_LINE, " "), (END_OF_QUESTION, " "), (END_OF_STATEMENT, "")],
}
# The steps of `clean` that a tokenizer.json can express.
CLEANING = [
    {"type": "NFC"},
    _replace("[\u02bc\u2018-\u201b]", "'"),
    _replace("[\u201c-\u201f]", '"'),
    _replace(r"\s+", " "),
    {"type": "Strip", "strip_left": True, "strip_right": True},
]


class LoTLIPTokenizer(TokenizersBackend):
    """
    A tokenizer for long captions. It cleans the text, marks the ends of sentences with the separator token, and calls
    a fast tokenizer of any kind: BERT's WordPiece, RoBERTa's BPE or XLM-R's Unigram.

    As in the official code, every `". "` becomes the separator token before the text is cleaned. Unlike in that code,
    `"[SEP]"` or `"&#91;SEP&#93;"` in a caption never becomes the special token. Words passed with
    `is_split_into_words=True` are not cleaned or split. Offsets refer to the cleaned text. `model_max_length` is the
    number of positions minus the number of corner tokens, which the model adds. Threads can share a tokenizer.

    Args:
        vocab (`str` or `dict[str, int]`, *optional*): Path or content of BERT's `vocab.txt`, to use instead of a
            `tokenizer.json`. `do_lower_case`, `strip_accents` and `tokenize_chinese_chars` work as in `BertTokenizer`.
        clean_text (`bool`, *optional*, defaults to `True`): Whether to repair broken text, see [`clean`].
        split_sentences (`bool`, *optional*, defaults to `True`): Whether to replace the full stop between two
            sentences by the separator token.
        split_special_tokens (`bool`, *optional*, defaults to `True`): Whether to encode names of special tokens in a
            text as plain text. The official code encodes them as special tokens.
        cleaning (`str`, *optional*, defaults to `"official"`): Rule for the ends of sentences. `"official"`: at every
            `". "`, as for the released models. `"sentences"`: as captions are split for training, at `!`, `?` and line
            ends too, and not after "Dr.", "J." or "No.".
        prompt_template (`str`, *optional*, defaults to `"{}"`): Instruction around each text, which replaces its
            `{}`. It is not cleaned, and names of special tokens in it become special tokens. Truncation shortens the
            text and keeps the template. Offsets then refer to the text in its template. With
            `is_split_into_words=True`, the parts before and after `{}` are words.

    ```python
    >>> from lotlip_hf import LoTLIPTokenizer
    >>> tokenizer = LoTLIPTokenizer.from_pretrained("checkpoint")
    >>> tokenizer.tokenize("A cat sleeps. A dog sleeps.")
    ['a', 'cat', 'sleeps', '[SEP]', 'a', 'dog', 'sleeps', '.']
    ```
    """

    _auto_class = "AutoTokenizer"
    vocab_files_names = {"vocab_file": "vocab.txt", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab: str | dict[str, int] | None = None,
        clean_text: bool = True,
        split_sentences: bool = True,
        split_special_tokens: bool = True,
        cleaning: Literal["official", "sentences"] = "official",
        prompt_template: str = "{}",
        **kwargs: Any,
    ) -> None:
        if cleaning not in SENTENCE_ENDS:
            raise ValueError(f"`cleaning` must be one of {', '.join(SENTENCE_ENDS)}, got {cleaning!r}.")
        if not isinstance(prompt_template, str) or prompt_template.count("{}") != 1:
            raise ValueError(f"`prompt_template` must contain `{{}}` exactly once, got {prompt_template!r}.")
        self.prompt_template = prompt_template
        self.clean_text = clean_text
        self.split_sentences = split_sentences
        self.cleaning = cleaning
        # Without these defaults, transformers reads the sides from the padding and truncation in tokenizer.json.
        kwargs.setdefault("padding_side", "right")
        kwargs.setdefault("truncation_side", "right")
        if vocab is not None:
            kwargs = _word_piece(vocab, kwargs)
        elif kwargs.get("tokenizer_object") is None and kwargs.get("tokenizer_file") is None:
            name = kwargs.get("name_or_path") or type(self).__name__
            raise ValueError(f"{name}: no tokenizer.json or vocab.txt. Use `LoTLIPTokenizer.from_backbone_tokenizer`.")
        settings = {"clean_text": clean_text, "split_sentences": split_sentences, "cleaning": cleaning}
        settings |= {"split_special_tokens": split_special_tokens, "prompt_template": prompt_template}
        super().__init__(**settings, **kwargs)
        self._tokenizer = without_cleaning(self._tokenizer)
        self._tokenizer.encode_special_tokens = split_special_tokens
        free_of_calls(self)

    @classmethod
    def from_pretrained(cls, *args: Any, max_length: int | None = None, **kwargs: Any) -> "LoTLIPTokenizer":
        """Same as the stock method. `max_length` is another name of `model_max_length`."""
        if max_length is not None:
            kwargs.setdefault("model_max_length", max_length)
        return super().from_pretrained(*args, **kwargs)

    @classmethod
    def from_backbone_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> "LoTLIPTokenizer":
        """
        Wraps a copy of a text encoder's fast tokenizer. `kwargs` are arguments of this class, such as a
        `model_max_length` that leaves positions for the corner tokens.
        """
        if not isinstance(tokenizer, TokenizersBackend):
            raise ValueError(f"`tokenizer` is a {type(tokenizer).__name__}. Pass a fast tokenizer.")
        names = ("model_max_length", "padding_side", "truncation_side")
        settings = {**{name: getattr(tokenizer, name) for name in names}, **tokenizer.special_tokens_map, **kwargs}
        return cls(tokenizer_object=tokenizer.backend_tokenizer, **settings)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        # A tokenizer.json contains the whole tokenizer, so transformers need not rebuild parts of it.
        if kwargs.get("tokenizer_file") is not None and os.path.isfile(kwargs["tokenizer_file"]):
            return kwargs
        return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)

    def count_truncated(self, encoding: BatchEncoding) -> int:
        """Counts the texts (or text pairs) that a call truncated, from the call's result before `pad`."""
        texts = getattr(encoding, "encodings", None)
        if texts is None or "overflow_to_sample_mapping" in encoding:
            raise ValueError("`encoding` must be the result of a call without `return_overflowing_tokens`.")
        return sum(bool(text.overflowing) for text in texts)

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        call = for_one_call(self)
        is_words, keeps_all = kwargs.get("is_split_into_words"), kwargs.get("return_overflowing_tokens")
        # Skip chat templates: cleaning would destroy their marks.
        if not kwargs.get("sanitize_control_tokens"):
            if not text and not isinstance(text, str):
                raise ValueError("`text` is empty. Pass at least one string.")
            backend, split = call._tokenizer, kwargs.get("split_special_tokens")
            special = self._special_tokens() if (self.split_special_tokens if split is None else split) else []
            names = re.compile("|".join(map(re.escape, special))) if special else None
            # A Unigram vocabulary contains special tokens, which must not be found in the normalised text.
            is_unigram = isinstance(backend.model, models.Unigram)
            normalize = backend.normalizer.normalize_str if is_unigram and backend.normalizer else str
            is_cut = kwargs.get("truncation_strategy", "do_not_truncate") != "do_not_truncate" and not keeps_all
            limit = kwargs.get("max_length") if is_cut and not is_words and self.is_local_to_words() else None
            opening, before, after, closing = template = self._template()
            if any(template):
                limit = None
                if text_pair is not None or keeps_all or _is_nested(text, 1 + bool(is_words)):
                    raise ValueError("`prompt_template` excludes text pairs and `return_overflowing_tokens`.")
            prepared: dict[str, str] = {}

            def prepare(one: str) -> str:
                if one not in prepared:
                    joined = self._joined(one, is_words, names, normalize, template)
                    joined.encode()  # raises an error for half a surrogate pair
                    prepared[one] = joined if limit is None else _beginning(joined, limit)
                return prepared[one]

            text = _mapped(text, prepare, "text")
            text_pair = None if text_pair is None else _mapped(text_pair, prepare, "text_pair")
            ends = len(opening) + len(normalize(before)), len(normalize(after)) + len(closing)
            if is_words and any(template):
                first, last = (
                    [part] if part else [] for part in ((opening + before).strip(), (after + closing).strip())
                )
                is_one = isinstance(text[0], str)
                texts = [[*first, *words, *last] for words in ([text] if is_one else text)]
                text, ends = texts[0] if is_one else texts, (len(first), len(last))
            if special and any(MARK in one for one in prepared.values()):
                # Remove the marks after the search for special tokens and before all other steps.
                shown = normalizers.Replace(HIDING, " " if is_unigram else ""), normalizers.Replace(ITSELF, MARK)
                backend.normalizer = normalizers.Sequence([*shown, *filter(None, [backend.normalizer])])
            kwargs["split_special_tokens"] = False  # the only special tokens left are separators and the template's
            if is_cut and any(template):
                # Truncation of the right end keeps the beginning, unless it leaves no text.
                is_kept = self.truncation_side == "right" and not (after or closing)
                if not is_kept or len(backend.encode(opening + before).ids) > kwargs["max_length"]:
                    call._tokenizer = _TemplateBackend(backend, ends, self.truncation_side)
        encoding = super(LoTLIPTokenizer, call)._encode_plus(text, text_pair, **kwargs)
        if kwargs.get("verbose", True) and not keeps_all and encoding.encodings is not None:
            truncated, count = self.count_truncated(encoding), len(encoding.encodings)
            if truncated and not self.deprecation_warnings.get("truncated"):
                self.deprecation_warnings["truncated"] = True
                logger.warning(
                    f"{truncated} of {count} texts were truncated to {kwargs.get('max_length')} tokens. Count them by "
                    "`tokenizer.count_truncated(batch)`; `verbose=False` hides this warning, which appears once."
                )
        return encoding

    def offset_text(self, text: str) -> str:
        """The text that offsets of a call refer to: cleaned, with separator tokens and in its template."""
        backend, special = self._tokenizer, self._special_tokens() if self.split_special_tokens else []
        names = re.compile("|".join(map(re.escape, special))) if special else None
        is_unigram = isinstance(backend.model, models.Unigram)
        normalize = backend.normalizer.normalize_str if is_unigram and backend.normalizer else str
        return self._joined(text, False, names, normalize, self._template())

    def _joined(
        self,
        text: str,
        is_words: bool | None,
        names: re.Pattern[str] | None,
        normalize: Callable[[str], str],
        template: tuple[str, str, str, str],
    ) -> str:
        """Cleans a text, marks the names of special tokens in it, and joins its sentences in the template."""
        opening, before, after, closing = template
        sentences = [text] if is_words else self.sentences(text)
        if not is_words:  # plain parts of the template may become parts of words and names
            sentences = [before + sentences[0], *sentences[1:]]
            sentences[-1] += after
        if names is not None:
            parts = [normalize(part).replace(MARK, ITSELF) for part in sentences]
            sentences = [names.sub(lambda name: HIDING.join(name[0]) + HIDING, part) for part in parts]
        joined = (self.sep_token or "").join(sentences)
        return joined if is_words else opening + joined + closing

    def sentences(self, text: str) -> list[str]:
        """Cleans the text and splits it where separator tokens are inserted."""
        if self.split_sentences and self.sep_token is None:
            raise ValueError("This tokenizer has no `sep_token`. Set `sep_token` or pass `split_sentences=False`.")
        return sentences_of(text, self.clean_text, self.split_sentences, self.cleaning)

    def _template(self) -> tuple[str, str, str, str]:
        """The template up to its last special token before `{}`, to `{}`, to the next special token, and the rest."""
        start, end = self.prompt_template.split("{}")
        names = "|".join(map(re.escape, self._special_tokens())) or "(?!)"
        found = [match.end() for match in re.finditer(names, start)]
        first, last = found[-1] if found else 0, re.search(names, end)
        cut = last.start() if last else len(end)
        return start[:first], start[first:], end[:cut], end[cut:]

    def is_local_to_words(self) -> bool:
        """Whether the tokens of a word do not depend on the rest of the text, as with BERT's tokenizer."""
        return self.truncation_side == "right" and is_local_to_words(self._tokenizer)

    def _special_tokens(self) -> list[str]:
        special = [token.content for token in self.added_tokens_decoder.values() if token.special]
        return sorted(special, key=len, reverse=True)

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """With `skip_special_tokens`, returns a text that encodes to the same ids: separators become full stops."""
        separator = self.sep_token_id
        if not skip_special_tokens or not self.split_sentences or separator is None:
            return super()._decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        ids = token_ids["input_ids"] if isinstance(token_ids, dict) else token_ids
        ids = [ids] if isinstance(ids, int) else [i for i in map(int, ids) if i != self.pad_token_id]
        if ids and ids[0] == self.cls_token_id:
            ids = ids[1 : len(ids) - (ids[-1] == separator)]  # a last separator marks the end of the text
        ends = [index for index, token_id in enumerate(ids) if token_id == separator]
        parts = [ids[start:end] for start, end in zip([0, *(end + 1 for end in ends)], [*ends, len(ids)], strict=True)]
        if self.is_local_to_words():
            # Spaces around punctuation do not change the tokens. Leave out spaces that would end a sentence.
            special, stop = set(self.all_special_ids), STOPS[self.cleaning]
            prefix = self._tokenizer.model.continuing_subword_prefix
            words = [[str(self._tokenizer.id_to_token(i)) for i in part if i not in special] for part in parts]
            decoded = [_written(part, prefix, stop) for part in words]
        else:
            decode = super()._decode
            decoded = [decode(part, skip_special_tokens=True, **kwargs) for part in parts]
            if self.clean_text and self.cleaning == "official":
                decoded = [one.replace(FULL_STOP, ".\n") for one in decoded]
        return (FULL_STOP if self.cleaning == "official" else "\n").join(decoded)

    def _save_pretrained(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        bare = for_one_call(self)
        bare._tokenizer = self.bare_tokenizer()
        return super(LoTLIPTokenizer, bare)._save_pretrained(*args, **kwargs)

    def bare_tokenizer(self) -> Tokenizer:
        """
        The backend for `tokenizer.json`, which gives the same ids for ordinary texts without this class. It lacks ftfy
        and some rules of `cleaning="sentences"`, encodes a text that is only "[SEP]" as the special token, truncates
        the end of `prompt_template`, and leaves an empty text without template.
        """
        has_template = self.prompt_template != "{}"
        if not (self.clean_text or self.split_sentences or self.split_special_tokens or has_template):
            return own_backend(self._tokenizer)
        state = json.loads(self._tokenizer.to_str())
        special = self._special_tokens()
        marks = {content: f"{OPEN}{index}{CLOSE}" for index, content in enumerate(special)}
        separator = marks[str(self.sep_token)] if self.split_sentences else ""
        unigram = isinstance(self._tokenizer.model, models.Unigram)
        is_bert = state["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        by_words = is_bert and all(content[0] in string.punctuation for content in special)
        own = [] if state["normalizer"] is None else [state["normalizer"]]
        # Search special tokens in the normalised text, which contains their names only if placeholders became names.
        for token in state["added_tokens"]:
            token["normalized"] = token["normalized"] or token["special"]
        name = WHOLE if self.split_special_tokens else "{}"
        before = [GUARD, *(_replace(name.format(_escaped(content)), mark) for content, mark in marks.items())]
        if self.split_sentences:
            before += [_replace(end, separator + space) for end, space in SENTENCE_ENDS[self.cleaning]]
        if self.clean_text:
            before += CLEANING
        if has_template:
            names = "|".join(map(_escaped, special)) or "(?!)"
            start, end = re.sub(names, lambda name: marks[name[0]], self.prompt_template).split("{}")
            if start:  # remove it from names of special tokens
                undo = rf"(?<![\s\S]){_escaped(start)}(?={OPEN}\d+{CLOSE}(?![\s\S]))"
                before += [{"type": "Prepend", "prepend": start}, _replace(undo, "")]
            before += [_replace(END_OF_TEXT, end)] if end else []
        # Some readers do not search special tokens in the normalised text. Their model finds them in its vocabulary.
        after = {mark: content for content, mark in marks.items()}
        if by_words:
            before += [_replace(_escaped(content), f"{content[0]} {content[1:]}") for content in special]
            names = "|".join(map(_escaped, special))
            split = {"type": "Split", "pattern": {"Regex": f"{names}|{SIGN}"}, "behavior": "Isolated", "invert": False}
            state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, split]}
        elif unigram:
            before += [*own, *(_replace(_escaped(content), " ".join(content) + " ") for content in special)]
        else:
            # For these readers, a separator becomes a full stop and a tab. A cleaned text contains no other tab.
            after = {separator: ".\t"} if self.split_sentences and self.clean_text else {}
            names = sorted(after.get(mark, mark) for mark in marks.values())
            steps = [{"type": "Replace", "pattern": {"String": name}, "content": ""} for name in names]
            state["decoder"] = {"type": "Sequence", "decoders": [*steps, *filter(None, [state["decoder"]])]}
        last = [_replace(mark, content) for mark, content in after.items()]
        steps = [{"type": "Sequence", "normalizers": part} for part in (before, own, last)]
        state["normalizer"] = {"type": "Sequence", "normalizers": steps}
        return Tokenizer.from_str(json.dumps(state))


class _TemplateBackend:
    """
    A backend of one call that truncates texts, but not the template around them. `ends` are the lengths of the
    template before and after the text, in characters or, for texts split into words, in words.
    """

    def __init__(self, backend: Tokenizer, ends: tuple[int, int], side: str) -> None:
        self.backend, self.ends, self.side = backend, ends, side

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode_batch(self, texts: list[Any], add_special_tokens: bool, is_pretokenized: bool) -> list[Encoding]:
        backend, plain = self.backend, own_backend(self.backend)
        plain.post_processor = None
        limit, padding = backend.truncation["max_length"], backend.padding
        backend.no_truncation()
        backend.no_padding()
        room = limit - (backend.num_special_tokens_to_add(False) if add_special_tokens else 0)
        encodings = plain.encode_batch(texts, is_pretokenized=is_pretokenized)
        for encoding, text in zip(encodings, texts, strict=True):
            self._cut(encoding, len(text), limit, room, is_pretokenized)
        encodings = [backend.post_process(encoding, None, add_special_tokens) for encoding in encodings]
        if padding is not None:
            length = padding.pop("length") or max(map(len, encodings))
            length += -length % (padding.pop("pad_to_multiple_of") or 1)
            for encoding in encodings:
                encoding.pad(length, **padding)
        return encodings

    def _cut(self, encoding: Encoding, size: int, limit: int, room: int, is_words: bool) -> None:
        """Moves the tokens that exceed `room` to `encoding.overflowing`. `size` is a length in the unit of `ends`."""
        first, last = self.ends[0], size - self.ends[1]
        spans = [(i, i + 1) for i in encoding.word_ids if i is not None] if is_words else encoding.offsets
        start = sum(stop <= first for _, stop in spans)
        end = len(spans) - sum(begin >= last for begin, _ in spans)
        excess = len(spans) - room
        if excess <= 0:
            return
        if excess > end - start:
            needed = len(spans) - (end - start) + limit - room
            raise ValueError(f"`max_length` {limit} is too short for `prompt_template`, which needs {needed} tokens.")
        start, end = (end - excess, end) if self.side == "right" else (start, start + excess)
        state = json.loads(encoding.__getstate__())
        lists = {name: value for name, value in state.items() if isinstance(value, list) and len(value) == len(spans)}
        cut = {name: value[start:end] for name, value in lists.items()}
        kept = {name: value[:start] + value[end:] for name, value in lists.items()}
        state |= {**kept, "overflowing": [{**state, **cut}]}
        encoding.__setstate__(json.dumps(state).encode())


def _written(tokens: list[str], prefix: str, stop: re.Pattern[str]) -> str:
    """Joins WordPiece tokens to a text, without a space where it would end a sentence."""
    text = ""
    for token in tokens:
        if token.startswith(prefix) and text:
            text += token.removeprefix(prefix)
        elif not text or text[-1] in "'’-([" or token in CLOSING or stop.search(text, len(text) - 8):
            text += token
        else:
            text += f" {token}"
    return text


def _word_piece(vocab: str | dict[str, int], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `TokenizersBackend` for a vocabulary of BERT."""
    if isinstance(vocab, str) and not os.path.isfile(vocab):
        raise ValueError(f"`vocab`: no file {vocab}. Pass the path of BERT's vocab.txt or a dictionary.")
    names = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    options = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    given = {name: kwargs[name] for name in (*names, *options) if kwargs.get(name) is not None}
    bert = BertTokenizer(vocab=vocab, **given)
    tokens = bert.backend_tokenizer.get_vocab(with_added_tokens=False)
    missing = [str(getattr(bert, name)) for name in names if str(getattr(bert, name)) not in tokens]
    if missing:
        raise ValueError(f"`vocab` (vocab.txt) lacks {', '.join(missing)}. Pass the vocabulary of a BERT model.")
    return {**{name: getattr(bert, name) for name in names}, **kwargs, "tokenizer_object": bert.backend_tokenizer}


def _beginning(text: str, count: int) -> str:
    """The text up to the space after `count` words that contain an ASCII letter or sign: at least `count` tokens."""
    if len(text) <= count:
        return text
    beginning = re.match(rf"(?:[^!-~]*[!-~][^ ]*(?![^ ])){{{count}}}", text)
    return text if beginning is None else beginning[0]


def _mapped(value: Any, function: Callable[[str], str], name: str) -> Any:
    """Applies `function` to each string of a text or of nested lists of texts."""
    if isinstance(value, str):
        return function(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"`{name}` must be a string or a list of strings, got {type(value).__name__}.")
    items = [_mapped(item, function, name) for item in value]
    return tuple(items) if isinstance(value, tuple) else items


def _is_nested(texts: Any, depth: int) -> bool:
    """Whether lists of texts are nested more than `depth` times."""
    if not isinstance(texts, (list, tuple)):
        return False
    return depth == 0 or any(_is_nested(one, depth - 1) for one in texts)
