"""The tokenizer: the official ids, and text that stays text."""

import copy
import itertools
import pickle
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from lotlip_hf import LoTLIPConfig, LoTLIPTokenizer
from lotlip_hf.data.sentences import split_sentences
from lotlip_hf.engines.texts import encode_unpadded
from lotlip_hf.modeling.cleaning_lotlip import NEEDS_REPAIR, clean
from stale import CALL_STATE, is_clean, make_stale
from tiny_tokenizers import (
    GOLDEN,
    PIECES,
    TEXTS,
    official_clean,
    random_texts,
    toy_llama,
    toy_qwen,
    toy_roberta,
    toy_xlm_roberta,
)

# The two texts in which the official code takes what is written for special tokens.
LITERAL = {"[SEP] literal [CLS] tokens [MASK]", "[Corner0] literal corner. text"}
CORNER_IDS = (30522, 30523)


@pytest.fixture(scope="module")
def tokenizer() -> LoTLIPTokenizer:
    return LoTLIPTokenizer.from_pretrained(GOLDEN, model_max_length=126)


@pytest.fixture(scope="module")
def bert() -> BertTokenizer:
    return BertTokenizer(vocab=str(GOLDEN / "vocab.txt"))


# The official ids


@pytest.mark.parametrize(("name", "length"), [("corners2_ctx128", 126), ("corners0_ctx77", 77)])
def test_ids_are_the_official_ones_without_corners(name: str, length: int) -> None:
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN, model_max_length=length)
    expected = load_file(GOLDEN / "expected_ids.safetensors")[name]
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    compared = 0
    for text, row, official in zip(TEXTS, ids, expected, strict=True):
        if text not in LITERAL:
            assert row.tolist() == [i for i in official.tolist() if i not in CORNER_IDS], text
            compared += 1
    assert compared == len(TEXTS) - 2


def test_special_tokens_in_a_text_are_special_when_asked_for(tokenizer: LoTLIPTokenizer) -> None:
    """With `split_special_tokens=False` the text with [SEP], [CLS] and [MASK] gets the official answer as well."""
    index = TEXTS.index("[SEP] literal [CLS] tokens [MASK]")
    expected = load_file(GOLDEN / "expected_ids.safetensors")["corners2_ctx128"][index].tolist()
    ids = tokenizer(TEXTS[index], padding="max_length", split_special_tokens=False)["input_ids"]
    assert ids == [i for i in expected if i not in CORNER_IDS]

    official = LoTLIPTokenizer.from_pretrained(GOLDEN, split_special_tokens=False)
    assert official.tokenize("a [MASK]") == ["a", "[MASK]"]


def test_random_texts_get_the_official_ids(tokenizer: LoTLIPTokenizer, bert: BertTokenizer) -> None:
    """Against the official order of things done by hand, for texts that neither hold nor become a special token."""
    compared = 0
    for text in random_texts(2000, seed=1):
        # An escape character before a sentence end swallows its separator in the official code ("\x1b[S" means one).
        if "\x1b" not in text and not re.search(r"\[(SEP|CLS|MASK|PAD|UNK)\]", official_clean(text)):
            joined = official_clean("[SEP]".join(text.split(". ")))
            assert tokenizer(text)["input_ids"] == bert(joined)["input_ids"], text
            compared += 1
    assert compared > 300


def test_empty_text_is_cls_and_sep(tokenizer: LoTLIPTokenizer) -> None:
    assert tokenizer("")["input_ids"] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert tokenizer(" \n\t ")["input_ids"] == [tokenizer.cls_token_id, tokenizer.sep_token_id]


# Cleaning


def test_the_shortcut_for_plain_text_changes_nothing() -> None:
    """`clean` skips ftfy for plain text: for every ASCII character, and for random texts, the answer is the same."""
    for character in map(chr, range(128)):
        for text in (character, f"a{character}b", f" {character} ", f"a{character}{character}b. {character}"):
            assert clean(text) == official_clean(text)
    for text in random_texts(2000, seed=2):
        assert clean(text) == official_clean(text)
    plain = [chr(code) for code in range(32, 127) if chr(code) != "&"] + ["\t", "\n", "\r"]
    for text in random_texts(2000, plain, seed=3):
        assert clean(text) == official_clean(text)


@pytest.mark.slow
def test_the_shortcut_for_ordinary_text_changes_nothing() -> None:
    """`clean` knows what ftfy does to the punctuation of captions, and to letters of Latin-1 that stand alone."""
    punctuation, latin = "\xa0–—‘’“”…", [chr(code) for code in range(0xA1, 0x100)]
    ascii_ = [chr(code) for code in range(32, 127)] + ["\t", "\n", "\r"]
    others = ["\x80", "\x9d", "Œ", "œ", "ﬁ", "€", "™", "İ", "\u0301", "猫", "Ａ", "\u200b", "\u2028"]
    texts = ["".join(three) for three in itertools.product([*punctuation, *"aZ .?<"], repeat=3)]
    for character in [*punctuation, *latin]:
        for other in [*punctuation, *others, "a", "Z", " ", "<", "Ã", "é", "×"]:
            texts += [f"a{character}{other}b", f" {other}{character} ", f"“{character}{other}’"]
    for text in texts:
        assert clean(text) == official_clean(text), repr(text)
    shortcuts = sum(not NEEDS_REPAIR.search(text) for text in texts)
    for text in random_texts(20_000, [*punctuation, *random.Random(0).choices(latin, k=4), *ascii_], seed=7):
        assert clean(text) == official_clean(text), repr(text)
        shortcuts += not NEEDS_REPAIR.search(text)
    assert shortcuts > 15_000
    # Broken quotes, a letter that is broken by itself, and one that its neighbour breaks, are seen as such.
    assert clean("It’s here, â€™ and a café") == "It's here, ' and a café"
    assert clean("voilÃ  le travail") == "voilà le travail"
    assert NEEDS_REPAIR.search("¾“")
    assert not NEEDS_REPAIR.search("“It’s ¾ of the café – a “naïve” 5 × 3 m wall at 20° – or more…”")


def test_encodings_are_repaired_before_entities() -> None:
    """ftfy leaves entities alone beside a "<"; what they stand for is then not repaired any more."""
    assert clean("<b> &Atilde;&copy;") == "<b> Ã©"


def test_repeated_escaping_is_undone_as_ftfy_does() -> None:
    """Entities escaped over and over come out as ftfy's, also where its own loop would take hours."""
    for levels in (1, 2, 15, 16, 17, 40):
        text = "a &" + levels * "amp;" + "quot; b"
        assert clean(text) == official_clean(text) == 'a " b'
    # A "<" keeps ftfy from undoing any.
    for levels in (1, 2, 15):
        text = "<b> &" + levels * "amp;"
        assert clean(text) == official_clean(text) == "<b> &" + max(levels - 2, 0) * "amp;"
    assert clean("&" + 250_000 * "amp;") == "&"


def test_settings_can_be_turned_off(bert: BertTokenizer) -> None:
    text = "schÃ¶n &amp; gut. [SEP] x"
    raw = LoTLIPTokenizer.from_pretrained(GOLDEN, clean_text=False, split_sentences=False)
    assert raw(text)["input_ids"] == bert(text, split_special_tokens=True)["input_ids"]
    split = LoTLIPTokenizer.from_pretrained(GOLDEN, clean_text=False)
    first, second = (bert(part, split_special_tokens=True)["input_ids"] for part in text.split(". "))
    assert split(text)["input_ids"] == first + second[1:]
    cleaned = LoTLIPTokenizer.from_pretrained(GOLDEN, split_sentences=False)
    assert cleaned(text)["input_ids"] == bert(clean(text), split_special_tokens=True)["input_ids"]


# What a user writes stays text


@pytest.mark.parametrize("special", ["[SEP]", "[MASK]", "[CLS]", "[PAD]", "[UNK]", "[Corner0]", "[Corner1]"])
@pytest.mark.parametrize(
    "form", ["{}", "&#91;{}&#93;", "&amp;#91;{}&amp;#93;", "［{}］", "x{}y", "{0}{0}", "[{}]", "{}. {}"]
)
def test_special_tokens_in_a_text_stay_text(tokenizer: LoTLIPTokenizer, special: str, form: str) -> None:
    for before, after in (("", ""), ("A cat. ", ""), ("", ". A dog."), ("One. Two. ", " three. ")):
        text = before + form.format(special.strip("[]") if "91" in form or "［" in form else special, special) + after
        ids = tokenizer(text)["input_ids"]
        # One separator for each sentence end and one at the end of the text, no other special token but the first.
        assert ids[0] == tokenizer.cls_token_id
        assert ids[-1] == tokenizer.sep_token_id
        assert ids.count(tokenizer.sep_token_id) == text.count(". ") + 1
        assert not {tokenizer.cls_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id} & set(ids[1:])
        assert special.strip("[]").lower() in tokenizer.decode(ids[1:-1]).replace(" ", "")


def test_a_text_with_special_tokens_has_the_ids_of_the_plain_text(
    tokenizer: LoTLIPTokenizer, bert: BertTokenizer
) -> None:
    """Sentence by sentence the ids are those that BERT gives when it knows no special token."""
    for text in random_texts(1000, seed=4):
        if "\x1b" in text:  # what stands on both sides of a sentence end is cleaned together
            continue
        # A joiner that no random text holds and that no cleaning touches.
        parts = official_clean("@@@@".join(text.split(". "))).split("@@@@")
        expected = [bert.encode(part, add_special_tokens=False, split_special_tokens=True) for part in parts]
        joined = [i for part in expected for i in [*part, bert.sep_token_id]]
        assert tokenizer(text)["input_ids"] == [bert.cls_token_id, *joined], text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a\x1b. b [SEP] c", "a SEP b [ sep ] c"),
        ("(SEP) \x1b. (SEP0) [SEP]. d", "( sep ) SEP ( sep ##0 ) [ sep ] SEP d"),
        ("&#40;SEP) [SEP]. x \x1b", "( sep ) [ sep ] SEP x"),
        ("&#91;SEP]. [SEP", "[ sep ] SEP [ sep"),
    ],
)
def test_texts_made_to_confuse_the_sentence_splitter(tokenizer: LoTLIPTokenizer, text: str, tokens: str) -> None:
    assert tokenizer.tokenize(text) == tokens.replace("SEP", "[SEP]").split(" ")


@pytest.mark.parametrize("stock", [toy_roberta, toy_xlm_roberta])
def test_special_tokens_stay_text_in_any_tokenizer(stock: Any) -> None:
    """BPE and Unigram see the characters of "<s>" side by side, as if it were no special token."""
    plain = stock()
    tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(plain)
    pieces = [*"ab <s>/", "<s>", "</s>", "<mask>", "<pad>", "<unk>", "&lt;s&gt;", "＜s＞", "﹤s﹥"]
    specials = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for text in random_texts(300, pieces, seed=5):
        ids = tokenizer(text)["input_ids"]
        assert [i for i in ids if i in specials] == [tokenizer.cls_token_id, tokenizer.sep_token_id], text
        if not isinstance(plain.backend_tokenizer.model, models.Unigram):
            assert ids == plain(clean(text), split_special_tokens=True)["input_ids"], text
        assert tokenizer.tokenize(f"{text}. b").count(tokenizer.sep_token) == 1
        words = tokenizer(text.split(" "), is_split_into_words=True)["input_ids"]
        assert [i for i in words if i in specials] == [tokenizer.cls_token_id, tokenizer.sep_token_id], text
    assert str(tokenizer.backend_tokenizer.normalizer) == str(plain.backend_tokenizer.normalizer)
    assert tokenizer.tokenize("a. a")[1] == "</s>"
    plain.padding_side, plain.truncation_side, plain.model_max_length = "left", "left", 7
    again = LoTLIPTokenizer.from_backbone_tokenizer(plain)
    assert (again.padding_side, again.truncation_side, again.model_max_length) == ("left", "left", 7)
    assert LoTLIPTokenizer.from_backbone_tokenizer(plain, model_max_length=5).model_max_length == 5


def test_a_special_token_that_the_normaliser_would_write_stays_text() -> None:
    """A tokenizer.json may look for its special tokens after normalising, where NFKC has made one of "＜s＞"."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "<": 4, "s": 5, ">": 6}, "<unk>"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens([AddedToken(token, normalized=True, special=True) for token in ("<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    stock = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="<s>", sep_token="</s>", unk_token="<unk>")
    assert stock.tokenize("a ＜s＞") == ["a", "<s>"]
    tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(stock, clean_text=False)
    assert tokenizer.tokenize("a ＜s＞. a <s>") == ["a", "<", "s", ">", "</s>", "a", "<", "s", ">"]


def test_added_words_are_still_recognised(tokenizer: LoTLIPTokenizer) -> None:
    """Only special tokens are text: a word that was added to the vocabulary is meant to be found in texts."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["geraniums!"])
    assert tokenizer.tokenize("red geraniums! [SEP]. x") == ["red", "geraniums!", "[", "sep", "]", "[SEP]", "x"]


# Every way in


def test_every_entry_cleans_and_splits(tokenizer: LoTLIPTokenizer) -> None:
    text, pair = "A  cat &amp; [SEP]. A dog", "schÃ¶n. gut"
    tokens = ["a", "cat", "&", "[", "sep", "]", "[SEP]", "a", "dog"]
    ids = tokenizer.convert_tokens_to_ids(["[CLS]", *tokens, "[SEP]"])
    pair_ids = tokenizer(pair)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(pair_ids) == ["[CLS]", "sc", "##hon", "[SEP]", "gut", "[SEP]"]
    assert tokenizer.tokenize(text) == tokens
    assert tokenizer.encode(text) == ids
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer([text, text])["input_ids"] == [ids, ids]
    assert tokenizer((text,))["input_ids"] == [ids]
    assert tokenizer(text, pair)["input_ids"] == ids + pair_ids[1:]
    assert tokenizer([text], [pair])["input_ids"] == [ids + pair_ids[1:]]
    assert tokenizer([(text, pair)])["input_ids"] == [ids + pair_ids[1:]]
    assert tokenizer([[text, pair]])["input_ids"] == [ids + pair_ids[1:]]
    assert tokenizer(text_target=text)["input_ids"] == ids
    assert tokenizer(pair, text_target=text)["labels"] == ids
    assert list(tokenizer(text)) == ["input_ids", "attention_mask"]


def test_words_are_taken_as_they_are(tokenizer: LoTLIPTokenizer) -> None:
    """With `is_split_into_words` nothing is cleaned or split, and special tokens are text as well."""
    encoding = tokenizer(["A", "&amp;", "[SEP]", "end.", "x"], is_split_into_words=True)
    assert encoding.tokens()[1:-1] == ["a", "&", "amp", ";", "[", "sep", "]", "end", ".", "x"]


def test_the_callers_lists_are_not_changed(tokenizer: LoTLIPTokenizer) -> None:
    texts, pairs = ["A  [SEP]. b", "c"], ["d. e", "&amp;"]
    words = [["[SEP]", "a"]]
    given = copy.deepcopy((texts, pairs, words))
    tokenizer(texts, pairs, padding=True, truncation=True)
    tokenizer(texts, text_target=pairs)
    tokenizer(words, is_split_into_words=True)
    assert (texts, pairs, words) == given


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(tokenizer: LoTLIPTokenizer, side: str) -> None:
    texts = ["a cat", "A cat. A dog. [SEP]"]
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    assert batch["input_ids"].dtype == torch.int64
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == tokenizer(text)["input_ids"]
        assert set(ids[~mask.bool()].tolist()) <= {tokenizer.pad_token_id}
    assert batch["attention_mask"][0, 0 if side == "left" else -1] == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"text": 3}, "text"),
        ({"text": b"a"}, "text"),
        ({"text": ["a", None]}, "text"),
        ({"text": ["a"], "text_pair": [4]}, "text_pair"),
        ({"text": []}, "text"),
        ({"text": ["a", "\udfff"], "is_split_into_words": True}, "surrogate"),
    ],
)
def test_what_is_no_text_is_refused(tokenizer: LoTLIPTokenizer, arguments: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        tokenizer(**arguments)


def test_texts_that_a_setting_cannot_take_are_refused(tokenizer: LoTLIPTokenizer) -> None:
    assert tokenizer.tokenize("a \ud800 b") == ["a", "b"]
    uncleaned = LoTLIPTokenizer.from_pretrained(GOLDEN, clean_text=False)
    for call in (uncleaned, partial(encode_unpadded, uncleaned)):
        with pytest.raises(UnicodeEncodeError):
            call(["a \ud800 b"])
    uncleaned.sep_token = None
    with pytest.raises(ValueError, match="sep_token"):
        uncleaned("a. b")


# Long texts


def test_texts_cut_at_the_limit_are_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN, model_max_length=6)
    texts = ["a b c d", "a b c d e", "[SEP]. a. b. c", "a", 40 * "a "]
    # 4 words fit between [CLS] and [SEP].
    with caplog.at_level("WARNING"):
        batch = tokenizer(texts, truncation=True, padding=True)
        assert tokenizer.count_truncated(batch) == 3
        assert "3 of 5" in caplog.text
        caplog.clear()
        tokenizer(texts, truncation=True)
        tokenizer.encode(texts[1], truncation=True)
        assert not caplog.records
        LoTLIPTokenizer.from_pretrained(GOLDEN, model_max_length=6)(texts, truncation=True, verbose=False)
        LoTLIPTokenizer.from_pretrained(GOLDEN, model_max_length=6)(texts[:1], truncation=True)
        assert not caplog.records
    assert tokenizer.count_truncated(tokenizer(texts[0], truncation=True)) == 0
    assert tokenizer.count_truncated(tokenizer(texts)) == 0
    with pytest.raises(ValueError, match="return_overflowing_tokens"):
        tokenizer.count_truncated(tokenizer(texts, truncation=True, return_overflowing_tokens=True))
    with pytest.raises(ValueError, match="encoding"):
        tokenizer.count_truncated({"input_ids": [[1]]})


# Texts of up to a few hundred tokens, and with words that have none.
LONG_PIECES = [*PIECES, *(" word" for _ in range(60)), *(" \u200b" for _ in range(20)), " don't, ", " _a_ ", " x" * 30]
SETTINGS: list[dict[str, bool]] = [
    {},
    {"split_special_tokens": False},
    {"clean_text": False},
    {"split_sentences": False},
    {"clean_text": False, "split_sentences": False, "split_special_tokens": False},
]


def long_texts(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    texts = random_texts(count, seed=seed)
    return texts + ["".join(generator.choices(LONG_PIECES, k=generator.randint(0, 150))) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_beginning_of_a_long_text_is_enough(settings: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call gives is what it gives when the whole texts are tokenised and then cut."""
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN, **settings)
    texts = long_texts(60, seed=8)
    whole = tokenizer(texts)["input_ids"]
    arguments = {"truncation": True, "return_offsets_mapping": True, "return_length": True, "verbose": False}
    for max_length in (2, 20, 126):
        fast = tokenizer(texts, max_length=max_length, **arguments)
        for ids, full, encoding in zip(fast["input_ids"], whole, fast.encodings, strict=True):
            assert ids == (full if len(full) <= max_length else [*full[: max_length - 1], tokenizer.sep_token_id])
            assert bool(encoding.overflowing) == (len(full) > max_length)
        with monkeypatch.context() as context:
            context.setattr(LoTLIPTokenizer, "is_local_to_words", lambda self: False)
            plain = tokenizer(texts, max_length=max_length, **arguments)
        assert dict(fast) == dict(plain)
        assert tokenizer.count_truncated(fast) == tokenizer.count_truncated(plain) > 0
        assert [tokenizer.encode(text, max_length=max_length, truncation=True) for text in texts[-20:]] == fast[
            "input_ids"
        ][-20:]


def test_the_end_of_a_long_text_is_kept_where_it_counts(tokenizer: LoTLIPTokenizer) -> None:
    text = "word " * 1000 + "end"
    assert tokenizer("\u200b " * 1000 + "end", truncation=True).tokens() == ["[CLS]", "end", "[SEP]"]
    parts = tokenizer(text, truncation=True, return_overflowing_tokens=True)
    assert parts["input_ids"][-1][-2] == tokenizer.convert_tokens_to_ids("end")
    left = LoTLIPTokenizer.from_pretrained(GOLDEN, model_max_length=126, truncation_side="left")
    assert left(text, truncation=True, verbose=False).tokens()[-2] == "end"


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_ids_by_word_are_those_of_a_call(settings: dict[str, bool]) -> None:
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN, model_max_length=126, **settings)
    tokenizer.add_tokens(["geraniums!", "word"])
    texts = [*long_texts(60, seed=9), "\u200b " * 300 + "end", "[MASK] geraniums!red", *TEXTS]
    for max_length in (None, 2, 20, 1000):
        expected = tokenizer(texts, truncation=True, max_length=max_length, padding="max_length", verbose=False)
        ids, was_cut = encode_unpadded(tokenizer, texts, max_length)
        assert was_cut == [bool(encoding.overflowing) for encoding in expected.encodings]
        for row, padded, mask in zip(ids, expected["input_ids"], expected["attention_mask"], strict=True):
            assert row == padded[: sum(mask)]


def test_ids_by_word_of_other_tokenizers(tokenizer: LoTLIPTokenizer) -> None:
    """Where a word's tokens depend on its neighbours, or a text stands between other tokens, it is as a call."""
    two_words, bare = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    two_words.add_tokens(["a cat"])
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing("$A [SEP]", special_tokens=[("[SEP]", 102)])
    left = LoTLIPTokenizer.from_pretrained(GOLDEN, truncation_side="left")
    others = [LoTLIPTokenizer.from_backbone_tokenizer(stock()) for stock in (toy_roberta, toy_xlm_roberta)]
    texts = ["a cat. <s> [SEP] a cat", "a b " * 200, "", "a"]
    for other in (two_words, bare, left, *others):
        expected = other(texts, truncation=True, max_length=30)
        assert encode_unpadded(other, texts, 30) == (expected["input_ids"], [False, True, False, False])
    assert "a cat" in two_words.convert_ids_to_tokens(encode_unpadded(two_words, texts)[0][0])
    assert encode_unpadded(bare, ["a"]) == ([bare.convert_tokens_to_ids(["a", "[SEP]"])], [False])


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["word ", "[SEP]. ", "&amp;", "x", "\n", "a. ", "schÃ¶n ", "猫"])
def test_a_text_of_a_million_characters(tokenizer: LoTLIPTokenizer, piece: str) -> None:
    """The start of the text decides: as for a text just longer than the limit."""
    text = piece * (1_000_000 // len(piece))
    ids = tokenizer(text, truncation=True, verbose=False)["input_ids"]
    assert len(ids) <= 126
    if piece != "x":  # a word of more than 100 characters is one unknown token, at any length
        assert ids == tokenizer(piece * 500, truncation=True, verbose=False)["input_ids"]


@pytest.mark.slow
def test_a_million_characters_made_to_be_slow(tokenizer: LoTLIPTokenizer) -> None:
    """Every joiner that could be tried, and a run of the character that hides special tokens."""
    joiners = "".join(f"(SEP{i})" for i in range(100_000))
    for text in (f"a. b [SEP] (SEP) {joiners}", f"a. b [SEP] {500_000 * chr(0xFDD0)}"):
        ids = tokenizer(text, truncation=True, verbose=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids)[:7] == ["[CLS]", "a", "[SEP]", "b", "[", "sep", "]"]
        assert ids.count(tokenizer.sep_token_id) == 2


# Saving and loading


def test_settings_are_saved_restored_and_overridden(tokenizer: LoTLIPTokenizer, tmp_path: Path) -> None:
    texts = [text for text in TEXTS if text]
    settings = {"clean_text": False, "split_sentences": False, "split_special_tokens": False, "model_max_length": 77}
    LoTLIPTokenizer.from_pretrained(GOLDEN, **settings).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "official")
    for folder, expected in (
        ("other", settings),
        ("official", {**dict.fromkeys(settings, True), "model_max_length": 126}),
    ):
        loaded = LoTLIPTokenizer.from_pretrained(tmp_path / folder)
        assert {name: getattr(loaded, name) for name in settings} == expected
    loaded = LoTLIPTokenizer.from_pretrained(tmp_path / "official")
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    overridden = LoTLIPTokenizer.from_pretrained(tmp_path / "official", clean_text=False, model_max_length=9)
    assert overridden.clean_text is False
    assert overridden.model_max_length == 9
    assert overridden.split_sentences is True
    assert overridden.model_input_names == ["input_ids", "attention_mask"]


def test_loads_by_auto_tokenizer(tokenizer: LoTLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for step in ("alone", "beside a configuration"):
        if step != "alone":
            LoTLIPConfig().save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert type(loaded) is LoTLIPTokenizer, step
        assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path, split_sentences=False).split_sentences is False


def test_copies_and_workers_get_the_same_tokenizer(tokenizer: LoTLIPTokenizer) -> None:
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


@pytest.mark.parametrize("stock", [toy_roberta, toy_xlm_roberta])
def test_any_tokenizer_folder_loads(stock: Any, tmp_path: Path) -> None:
    """A folder saved by a stock tokenizer keeps all of its pipeline, also when saved again as ours."""
    plain = stock()
    plain.save_pretrained(tmp_path / "stock")
    tokenizer = LoTLIPTokenizer.from_pretrained(tmp_path / "stock", model_max_length=20)
    tokenizer.save_pretrained(tmp_path / "ours")
    again = LoTLIPTokenizer.from_pretrained(tmp_path / "ours")
    for text in ("a cab", "abc ba", "a  b"):
        expected = plain(clean(text), split_special_tokens=True)["input_ids"]
        assert tokenizer(text)["input_ids"] == again(text)["input_ids"] == expected
    assert again.model_max_length == 20
    assert again.sep_token == plain.sep_token
    assert len(again) == len(plain)


def test_a_bert_folder_keeps_its_casing(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "vocab.txt", tmp_path)
    assert LoTLIPTokenizer.from_pretrained(tmp_path).tokenize("Cat") == ["cat"]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": false}')
    assert LoTLIPTokenizer.from_pretrained(tmp_path).tokenize("Cat") == ["[UNK]"]
    BertTokenizer(vocab=str(GOLDEN / "vocab.txt"), do_lower_case=False).save_pretrained(tmp_path / "full")
    assert LoTLIPTokenizer.from_pretrained(tmp_path / "full").tokenize("Cat") == ["[UNK]"]


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer.json"):
        LoTLIPTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\na\n", encoding="utf-8")
    with pytest.raises(ValueError, match="vocab.txt"):
        LoTLIPTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing.txt"):
        LoTLIPTokenizer(vocab="missing.txt")
    with pytest.raises(ValueError, match="fast"):
        LoTLIPTokenizer.from_backbone_tokenizer("bert")


# What a call asks for is of that call

CALLS: list[dict[str, Any]] = [
    {"truncation": True, "max_length": 16},
    {"truncation": "only_first", "max_length": 16, "stride": 3, "return_overflowing_tokens": True},
    {"padding": "max_length", "max_length": 16, "padding_side": "left"},
    {"padding": True, "pad_to_multiple_of": 8},
]


@pytest.mark.slow
@pytest.mark.parametrize("stock", [None, toy_roberta, toy_xlm_roberta])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_of_a_call_is_saved(stock: Any, call: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN, model_max_length=126)
    if stock is not None:
        tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(stock(), model_max_length=126)
    texts = ["a b. [SEP] </s> <s> a", "a " * 300]
    tokenizer.save_pretrained(tmp_path / "before")
    backend = tokenizer._tokenizer.to_str()
    tokenizer(texts, verbose=False, **call)
    encode_unpadded(tokenizer, texts, 9)
    assert tokenizer._tokenizer.to_str() == backend
    tokenizer.save_pretrained(tmp_path / "after")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    assert is_clean(tmp_path / "after")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "after")
    assert (loaded.padding_side, loaded.truncation_side) == ("right", "right")
    assert [len(ids) for ids in loaded(texts, truncation=True, verbose=False)["input_ids"]][1] == 126


@pytest.mark.parametrize("max_length", [16, 77, 200])
def test_a_limit_that_a_file_has_kept_does_not_count(
    tokenizer: LoTLIPTokenizer, max_length: int, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = LoTLIPTokenizer.from_pretrained(make_stale(tmp_path, max_length))
    stock = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    around = LoTLIPTokenizer.from_backbone_tokenizer(stock, model_max_length=100, padding_side="right")
    for one, longest in ((loaded, 126), (around, 100)):
        assert not CALL_STATE & one.init_kwargs.keys()
        assert one.padding_side == "right"
        assert len(one.backend_tokenizer.encode("a " * 300)) == 302
        assert len(one("a " * 300, truncation=True, verbose=False)["input_ids"]) == longest
    loaded.save_pretrained(tmp_path)
    assert is_clean(tmp_path)


def test_sides_are_kept(tokenizer: LoTLIPTokenizer, tmp_path: Path) -> None:
    """Which side to pad and to cut is a setting of the tokenizer."""
    other = copy.deepcopy(tokenizer)
    other.padding_side = other.truncation_side = "left"
    other.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.padding_side, loaded.truncation_side) == ("left", "left")


@pytest.mark.slow
@pytest.mark.parametrize("stock", [None, toy_roberta, toy_xlm_roberta])
def test_threads_do_not_see_each_others_calls(stock: Any) -> None:
    """Limits, padding and special tokens written out, all at once: what one thread alone gets."""
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN, model_max_length=126)
    if stock is not None:
        tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(stock(), model_max_length=126)
    texts = ["a b c. d", "[SEP] a. <s> b </s>", "a [MASK] b " * 20, "\ufdd0 [CLS]. <mask>", "a b " * 40]
    calls = [
        ({"max_length": length, "truncation": True, "padding": padding}, some)
        for length in (5, 9, 40)
        for padding in (False, "max_length")
        for some in (texts[:1], texts[1:2], texts[2:], texts)
    ]

    def answer(index: int) -> Any:
        settings, some = calls[index % len(calls)]
        if index % 3 == 0 and not settings["padding"]:
            return encode_unpadded(tokenizer, some, settings["max_length"])[0]
        return tokenizer(some, verbose=False, **settings)["input_ids"]

    backend = tokenizer._tokenizer.to_str()
    expected = [answer(index) for index in range(3 * len(calls))]
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(answer, list(range(3 * len(calls))) * 12))
    assert given == expected * 12
    assert tokenizer._tokenizer.to_str() == backend


def test_a_change_of_the_backend_counts_in_the_next_call(tokenizer: LoTLIPTokenizer) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    assert tokenizer.tokenize("Red geraniums!")[-1] == "!"
    tokenizer.add_tokens(["geraniums!"])
    assert tokenizer.tokenize("red geraniums!")[-1] == "geraniums!"
    backend = tokenizer.backend_tokenizer
    tokenizer("a")
    backend.normalizer = normalizers.Replace("cat", "dog")
    assert tokenizer.tokenize("cat") == ["dog"]
    backend.post_processor = processors.TemplateProcessing("$A [SEP]", special_tokens=[("[SEP]", 102)])
    assert tokenizer("cat")["input_ids"][0] != tokenizer.cls_token_id


# What reads tokenizer.json alone

# What the format cannot express: repairs by ftfy, and entities
BEYOND_THE_FILE = re.compile(r"[ÃâÂ]|&\w*;|&#|[Ａ-Ｚ［］ﬁ]|[\x00-\x08\x0e-\x1f\x7f-\x9f]")


@pytest.mark.parametrize("cleaning", ["official", "sentences"])
def test_the_file_by_itself_gives_the_same_ids(cleaning: str, tmp_path: Path) -> None:
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN, cleaning=cleaning)
    tokenizer.save_pretrained(tmp_path)
    bare = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    special = set(tokenizer.all_special_tokens)
    texts = [text for text in TEXTS if not BEYOND_THE_FILE.search(text)]
    if cleaning == "official":
        texts += [one for one in random_texts(2000, seed=11) if not BEYOND_THE_FILE.search(one) and one not in special]
    else:
        # of its rules a part
        texts = [text for text in texts if not text.startswith("a. a")]
        texts += ["Is it Dr. Li's? Nobody knows. The U.S. flag is No. 5.\nA line\nAnother one! “Yes,” he said. 3.5 m"]
    assert len(texts) > 40
    for text in texts:
        encoding = bare.encode(text)
        assert encoding.ids == tokenizer(text, verbose=False)["input_ids"], text
        assert encoding.tokens == tokenizer.convert_ids_to_tokens(encoding.ids)
    assert bare.encode("A cat. A dog.").tokens == ["[CLS]", "a", "cat", "[SEP]", "a", "dog", ".", "[SEP]"]
    assert bare.decode(bare.encode("A cat").ids) == "a cat"
    assert {token: bare.token_to_id(token) for token in special} == {
        token: tokenizer.convert_tokens_to_ids(token) for token in special
    }


@pytest.mark.parametrize("clean_text", [True, False])
@pytest.mark.parametrize("stock", [toy_roberta, toy_xlm_roberta])
def test_the_file_of_other_tokenizers_gives_the_same_ids(stock: Any, clean_text: bool, tmp_path: Path) -> None:
    tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(stock(), clean_text=clean_text)
    tokenizer.save_pretrained(tmp_path)
    bare = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pieces = ["a", "b", "cab", " ", "  ", ". ", ".", "\n", "\t", "“", "’", "<", "s", ">", "/", "</s>", "<s>", "<mask>"]
    for text in set(random_texts(500, pieces, seed=12)) - set(tokenizer.all_special_tokens):
        assert bare.encode(text).ids == tokenizer(text, verbose=False)["input_ids"], text
    assert "</s>" not in bare.decode(bare.encode("a. b").ids).replace("\u2e3b", "</s>")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [*SETTINGS, {"cleaning": "sentences"}])
@pytest.mark.parametrize("stock", [None, toy_roberta, toy_xlm_roberta])
def test_the_class_does_not_do_it_twice(stock: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """Loaded, the tokenizer is the one that was saved, however often, and other settings start from its own parts."""
    first = LoTLIPTokenizer.from_pretrained(GOLDEN, **settings)
    if stock is not None:
        first = LoTLIPTokenizer.from_backbone_tokenizer(stock(), **settings)
    first.save_pretrained(tmp_path / "1")
    second = AutoTokenizer.from_pretrained(tmp_path / "1")
    second.save_pretrained(tmp_path / "2")
    every = list(range(len(first)))
    assert second.convert_ids_to_tokens(every) == first.convert_ids_to_tokens(every)
    assert second.get_vocab() == first.get_vocab()
    assert second._tokenizer.to_str() == first._tokenizer.to_str()
    assert (tmp_path / "1" / "tokenizer.json").read_bytes() == (tmp_path / "2" / "tokenizer.json").read_bytes()
    raw = LoTLIPTokenizer.from_pretrained(tmp_path / "1", clean_text=False, split_sentences=False)
    assert raw._tokenizer.to_str() == first._tokenizer.to_str()
    assert raw.sep_token not in raw.tokenize("a. b")


# A text of ids


@pytest.mark.parametrize("cleaning", ["official", "sentences"])
def test_decoding_and_encoding_again_gives_the_same_ids(cleaning: str, bert: BertTokenizer) -> None:
    """Of texts without unknown words, which no text stands for."""
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN, cleaning=cleaning)
    texts = [*TEXTS, *random_texts(1500, seed=13), "I do not know. It's 3.5 m (or so)... Isn't it? “Yes”"]
    if cleaning == "sentences":  # whose rules see a text before it is repaired, and take "&amp;" for a word
        texts = [text for text in texts if not BEYOND_THE_FILE.search(text)]
    compared = 0
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.unk_token_id not in ids:
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            assert tokenizer(decoded, verbose=False)["input_ids"] == ids, (text, decoded)
            compared += 1
    assert compared > 300
    ids = tokenizer(["A cat. A dog.", "A boat"], padding=True)["input_ids"]
    written = {"official": "a cat. a dog.", "sentences": "a cat\na dog."}[cleaning]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == [written, "a boat"]
    assert tokenizer.decode(ids[0]) == "[CLS] a cat [SEP] a dog. [SEP]"
    assert tokenizer.decode(ids[0][1:-1], skip_special_tokens=True) == written
    assert tokenizer.decode(ids[0][1], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("clean_text", [True, False])
@pytest.mark.parametrize("stock", [toy_roberta, toy_xlm_roberta])
def test_decoding_and_encoding_again_in_other_tokenizers(stock: Any, clean_text: bool) -> None:
    tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(stock(), clean_text=clean_text)
    for text in random_texts(300, ["a", "b", "cab", " ", ". ", ".", "</s>"], seed=14):
        ids = tokenizer(text, verbose=False)["input_ids"]
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert tokenizer(decoded, verbose=False)["input_ids"] == ids, (text, decoded)


# Where sentences end


def test_sentences_end_by_the_rules_of_training(tmp_path: Path) -> None:
    text = "Dr. X meets J. Smith at 3.5 p.m. today. Is it late? No. 5 is e.g. red! A list\n1. of things."
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN, cleaning="sentences")
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert one.cleaning == "sentences"
        parts = " ".join(one.tokenize(text)).split(" [SEP] ")
        assert len(parts) == len(split_sentences(text)) == 5
        assert [part.split()[0] for part in parts] == ["dr", "is", "no", "a", "1"]
        assert [part.split()[-1] for part in parts] == ["today", "?", "!", "list", "."]
    official = LoTLIPTokenizer.from_pretrained(tmp_path, cleaning="official")
    assert official.tokenize("Dr. X")[1] == "[SEP]"
    assert LoTLIPTokenizer.from_pretrained(GOLDEN).cleaning == "official"
    assert encode_unpadded(tokenizer, [text])[0] == [tokenizer(text)["input_ids"]]
    for rest in ("", "...", "A cat", "\n\n", "!!! A cat."):  # nothing of a text is lost
        assert tokenizer.tokenize(rest) == official.tokenize(rest)
    with pytest.raises(ValueError, match="cleaning"):
        LoTLIPTokenizer.from_pretrained(GOLDEN, cleaning="unofficial")


# Templates

STOCKS = [toy_qwen, toy_llama, toy_roberta, toy_xlm_roberta]
TEMPLATES = ["{}", "Query: {}", 'a cat: "{}" means: "', "Instruct: find it\nQuery:{}"]


def wrapped(stock: Any, template: str, **settings: Any) -> tuple[Any, LoTLIPTokenizer]:
    stock = stock()
    settings = {"split_sentences": False, "pad_token": stock.pad_token or stock.eos_token, **settings}
    return stock, LoTLIPTokenizer.from_backbone_tokenizer(stock, prompt_template=template, **settings)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("stock", STOCKS)
def test_a_text_in_its_template_has_the_ids_of_the_whole(stock: Any, template: str, tmp_path: Path) -> None:
    """In a call, in a batch of cut and whole texts, after a save, by `encode_unpadded` and by the file alone."""
    stock, tokenizer = wrapped(stock, template)
    texts = ["a cat", "a  cat. &amp; a bat", "cat.", "schÃ¶n"]
    cleaned = ["a cat", "a cat. & a bat", "cat.", "schön"]
    expected = stock([template.replace("{}", one) for one in cleaned])["input_ids"]
    assert tokenizer(texts)["input_ids"] == expected
    tokenizer.save_pretrained(tmp_path)
    loaded = LoTLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.prompt_template == template
    assert loaded(texts, truncation=True, max_length=200)["input_ids"] == expected
    assert encode_unpadded(loaded, texts, max_length=200) == (expected, [False] * 4)
    alone = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [alone.encode(one).ids for one in cleaned] == expected


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("stock", STOCKS)
def test_truncation_shortens_the_text_and_keeps_its_template(stock: Any, template: str, side: str) -> None:
    _, tokenizer = wrapped(stock, template, truncation_side=side)
    text = "a cat abc a cat abc"
    whole, short = tokenizer(text)["input_ids"], tokenizer("a")["input_ids"]
    other = tokenizer("c")["input_ids"]
    start = next(i for i, ids in enumerate(zip(short, other, strict=False)) if len(set(ids)) == 2)
    for excess in (1, 3, 5):
        limit = len(whole) - excess
        batch = tokenizer(["a", text], truncation=True, padding=True, max_length=limit, return_offsets_mapping=True)
        end = len(whole) - (len(short) - start - 1)  # of the text's tokens
        first = end - excess if side == "right" else start
        assert batch["input_ids"][1] == whole[:first] + whole[first + excess :]
        assert batch["input_ids"][0] == short + [tokenizer.pad_token_id] * (limit - len(short))
        assert batch["attention_mask"][0] == [1] * len(short) + [0] * (limit - len(short))
        assert tokenizer.count_truncated(batch) == 1
        assert len(batch["offset_mapping"][1]) == limit
        assert encode_unpadded(tokenizer, ["a", text], limit) == ([short, batch["input_ids"][1]], [False, True])


def test_special_tokens_are_those_of_the_template_alone() -> None:
    """Names in a text stay text, also if a part of them is the template's."""
    _, tokenizer = wrapped(toy_qwen, "<|im_end|>a <|im_{}_end|><|endoftext|>")
    special = set(tokenizer.all_special_ids)
    for text in ("cat", "<|im_end|>", "end|> a <|im", "</s>"):
        for limit in (None, 60):
            ids = tokenizer(text, truncation=limit is not None, max_length=limit)["input_ids"]
            assert [i for i in ids if i in special] == [ids[0], ids[-1]]
            assert tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == ["<|im_end|>", "<|endoftext|>"]


def test_the_template_of_words_is_words() -> None:
    _, tokenizer = wrapped(toy_qwen, "a cat: {} a")
    _, plain = wrapped(toy_qwen, "{}")
    words = ["cat", "abc", "<PST>"]
    whole = tokenizer(words, is_split_into_words=True)
    assert whole["input_ids"] == [i for one in ("a cat:", *words, "a") for i in plain(one)["input_ids"]]
    cut = tokenizer([words, ["a"]], is_split_into_words=True, truncation=True, max_length=8, padding="max_length")
    assert cut["input_ids"][0] == whole["input_ids"][:7] + whole["input_ids"][-1:]
    assert cut.word_ids(0)[-1] == 4
    assert sum(cut["attention_mask"][1]) == len("a cat: a a".split()) + 1


@pytest.mark.parametrize(
    ("template", "call", "word"),
    [
        ("no place", None, "prompt_template"),
        ("{} and {}", None, "prompt_template"),
        ("Query: {}", {"text": "a", "text_pair": "b"}, "prompt_template"),
        ("Query: {}", {"text": [("a", "b")]}, "prompt_template"),
        ("Query: {}", {"text": "a", "return_overflowing_tokens": True}, "prompt_template"),
        ("Query: {}", {"text": "a", "truncation": True, "max_length": 3}, "max_length"),
    ],
)
def test_what_a_template_cannot_do_is_refused(template: str, call: dict[str, Any] | None, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        wrapped(toy_qwen, template)[1](**(call or {"text": "a"}))
