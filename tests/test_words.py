"""Words of a text, and the spans of tokens in a text that a tokenizer cleaned."""

import pytest
import torch

from lotlip_hf import LoTLIPTokenizer
from lotlip_hf.words import original_offsets, split_words, to_words
from tiny_tokenizers import GOLDEN, TEXTS, random_texts, toy_roberta, toy_xlm_roberta


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" ... - '", []),
        ("A cat.A dog!", ["A", "cat", "A", "dog"]),
        ("It's Dr. Lee’s 'well-known' dogs'.", ["It's", "Dr", "Lee’s", "well-known", "dogs"]),
        ("3.5 m, 1,000 or 20%: 3.x 2nd", ["3.5", "m", "1,000", "or", "20", "3", "x", "2nd"]),
        ("snake_case--dash a/b", ["snake", "case", "dash", "a", "b"]),
        ("e\u0301te\u0301 हिन्दी 猫", ["e\u0301te\u0301", "हिन्दी", "猫"]),
        ("a \u2764\ufe0f heart, 1\ufe0f\u20e3", ["a", "heart", "1\ufe0f\u20e3"]),  # marks of emoji
    ],
)
def test_words(text: str, words: list[str]) -> None:
    found = split_words(text)
    assert [word.text for word in found] == words
    assert [text[word.start : word.end] for word in found] == words


def test_values_are_added_up_over_words() -> None:
    words = split_words("ab c-d e")
    offsets = [(0, 0), (0, 1), (1, 2), (1, 4), (3, 4), (4, 5), (5, 6), (6, 7), (0, 0)]
    values = torch.tensor([[1.0, 2, 4, 8, 16, 32, 64, 128, 256], [0, 0, 0, 0, 0, 0, 0, 1, 0]])
    # the token (1, 4) has one character of each of two words
    assert to_words(values, offsets, words).tolist() == [[14.0, 112.0, 0.0], [0.0, 0.0, 0.0]]
    assert to_words(values[0], offsets, words).tolist() == [14.0, 112.0, 0.0]
    assert to_words(values, offsets, []).shape == (2, 0)


TOKENIZERS = {
    "official": lambda: LoTLIPTokenizer.from_pretrained(GOLDEN),
    "sentences": lambda: LoTLIPTokenizer.from_pretrained(GOLDEN, cleaning="sentences"),
    "template": lambda: LoTLIPTokenizer.from_pretrained(GOLDEN, prompt_template="A photo. {} The end."),
    "special": lambda: LoTLIPTokenizer.from_pretrained(GOLDEN, split_special_tokens=False),
    "bytes": lambda: LoTLIPTokenizer.from_backbone_tokenizer(toy_roberta()),
    "unigram": lambda: LoTLIPTokenizer.from_backbone_tokenizer(toy_xlm_roberta()),
}


TEXT = "The  cafe's &amp; “big”\nsign.  Dr. Lee saw 3.5 m!  [SEP] It is cat-like. schÃ¶n END."


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_found_in_the_text_before_cleaning(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    plain = TOKENIZERS["official"]() if name == "template" else tokenizer
    words = split_words(TEXT)
    call = tokenizer(TEXT, return_offsets_mapping=True)
    offsets = original_offsets(tokenizer, TEXT, call["offset_mapping"])
    counts = to_words(torch.ones(len(offsets)), offsets, words).tolist()
    for word, count in zip(words, counts, strict=True):
        if word.text in ("amp", "schÃ", "n", "SEP"):  # parts that cleaning replaces, and a name of a special token
            continue
        alone = plain(word.text, add_special_tokens=False)["input_ids"]
        begins_with_space = name in ("bytes", "unigram") and TEXT[max(word.start - 1, 0)] == " "
        assert count in (len(alone), len(alone) - (name == "unigram"), len(alone) + begins_with_space), word.text
    assert sum(counts) < len(offsets)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_token_has_the_characters_of_its_span(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for text in [*TEXTS[:40], *random_texts(200)]:
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        prepared = tokenizer.offset_text(text)
        found = original_offsets(tokenizer, text, offsets)
        assert len(found) == len(offsets)
        for (start, end), (first, last) in zip(offsets, found, strict=True):
            assert 0 <= first <= last <= len(text)
            if start == end:
                assert first == last
            if text == prepared and "[SEP]" not in text and not text[start:end].isspace():
                assert text[first:last] == text[start:end].strip()


def test_other_tokenizers_have_offsets_of_the_text() -> None:
    assert original_offsets(toy_roberta(), "a  cat", [(0, 1), (3, 6)]) == [(0, 1), (3, 6)]
