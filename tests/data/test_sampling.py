"""Sub-captions: how captions are split, what is drawn, and that a draw depends on seed, epoch and record alone."""

import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from lotlip_hf.data.record import Texts, record_rng
from lotlip_hf.data.sampling import SubCaptions
from lotlip_hf.data.sentences import split_full_stops, split_sentences
from lotlip_hf.modeling.sentences_lotlip import ABBREVIATIONS, NUMBERED, OPENING, find_sentences

# "0a. 0b. ... 0h." and so on: every sentence tells its captioner and its number.
CAPTIONS = [" ".join(f"{captioner}{letter}." for letter in "abcdefgh") for captioner in range(3)]


def sample(
    captions: list[str] = CAPTIONS, seed: int = 7, epoch: int = 0, record_id: str = "r", **options: Any
) -> Texts:
    record: Any = {"short_caption": "short", "long_captions": captions, "id": record_id}
    (texts,) = SubCaptions(**options)([record], [record_rng(seed, epoch, record_id)])
    return texts


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A cat sleeps. A dog barks.", ["A cat sleeps", "A dog barks"]),
        ("one line\nanother\n\n", ["one line", "another"]),
        ("The end.</s>Not yet</s>", ["The end", "Not yet"]),
        ("It is 3.5 m long. Version 2.0.", ["It is 3.5 m long", "Version 2.0"]),
        ("Dr. Li waves. Mr. J. Smith, e.g. him, too.", ["Dr. Li waves", "Mr. J. Smith, e.g. him, too"]),
        ("A U.S. flag at 5 p.m. today. At 5 p.m. It rains", ["A U.S. flag at 5 p.m. today", "At 5 p.m", "It rains"]),
        ("Who is it? Nobody! Then...  night", ["Who is it?", "Nobody!", "Then", "night"]),
        ('A sign says "Stop." Cars wait. (They honk.) Go', ['A sign says "Stop"', "Cars wait", "(They honk)", "Go"]),
        ("See example.com and file.txt now", ["See example.com and file.txt now"]),
        ("The sky is blue.The sea too.", ["The sky is blue", "The sea too"]),
        ("一只猫。它在睡觉吗？是的", ["一只猫", "它在睡觉吗？", "是的"]),
        ("एक बिल्ली। वह सो रही है। كلب؟ نعم", ["एक बिल्ली", "वह सो रही है", "كلب؟", "نعم"]),
        ("It fades… The sea is calm.", ["It fades", "The sea is calm"]),
        ("1. A cat. 2. A dog on platform No. 5. b) A bird", ["1. A cat", "2. A dog on platform No. 5", "b) A bird"]),
        ("...", []),
        (" \n ", []),
        ("", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def naive_split_sentences(text: str) -> list[str]:
    """The rules of `split_sentences` as they read, without regard to time."""
    wide = "[。！？．｡।॥؟۔]+"
    end_of_sentence = rf"\n|</s>|[.!?…]+[\"'”’)\]]*(?=\s|</s>|$)|{wide}|\.(?<=[a-z]{{2}}\.)(?=[A-Z][a-z])"
    sentences, start = [], 0
    for end in re.finditer(end_of_sentence, text):
        sentence, rest = text[start : end.start()], text[end.end() :].lstrip()
        words = sentence.split()
        if end[0] == "." and words:
            word = words[-1].lstrip(OPENING)
            is_initial = len(word) == 1 and word.isupper() and len(words) > 1
            is_dotted = re.fullmatch(r"(?:[A-Za-z]\.)+[A-Za-z]", word) is not None
            is_marker = len(words) == 1 and re.fullmatch(r"\d{1,3}|[A-Za-z]", word) is not None
            if is_initial or is_marker or word.lower() in ABBREVIATIONS:
                continue
            if (is_dotted and rest[:1].islower()) or (word.lower() in NUMBERED and rest[:1].isdecimal()):
                continue
        sentences.append((sentence, end[0]))
        start = end.end()
    sentences.append((text[start:], ""))
    return [
        (sentence + re.sub(r"[.…。．｡।॥۔\n]|</s>", "", mark)).strip()
        for sentence, mark in sentences
        if re.search(r"[^\W_]", sentence)
    ]


@pytest.mark.slow
def test_sentences_are_those_of_the_plain_rules() -> None:
    pieces = [
        *("a", "b c", "Dr", "Mr", "J", "U.S", "p.m", "e.g", "etc", "Smith", "The", "the", "x.The", "ab.The", "3.5"),
        *(" ", "  ", "\n", "\r\n", "\xa0", "\x1c", ". ", ".", "..", "...", "!", "?", "?!", " . ", ".com", "_", "-"),
        *("</s>", "<", "/s>", "。", "！", "？", '"', "'", "”", "’", ")", "]", "(", "[", "“", "‘", "猫"),
        *("1.", "No", "5", "…", "।", "؟"),
    ]
    generator = Random(0)
    seen = Counter()
    for _ in range(40_000):
        text = "".join(generator.choices(pieces, k=generator.randint(0, 14)))
        sentences = split_sentences(text)
        assert sentences == naive_split_sentences(text), repr(text)
        assert [text[start:end].strip()[:1] for start, end, _ in find_sentences(text)] == [one[0] for one in sentences]
        seen[len(sentences)] += 1
    assert seen[0] < 10_000
    assert seen[2] > 5_000
    assert seen[4] > 1_000


def test_a_row_of_marks_is_read_in_one_go() -> None:
    """As a broken captioner writes it; looking at each mark's followers in turn would take hours."""
    assert split_sentences("A cat" + 300_000 * "!" + "a cat. A dog.") == ["A cat" + 300_000 * "!" + "a cat", "A dog"]
    assert split_sentences("A cat " + 300_000 * "J. ") == ["A cat " + 299_999 * "J. " + "J."]


def test_full_stops_as_in_the_official_code() -> None:
    assert split_full_stops("A 3.5 m boat.\nIt is</s> red.. ") == ["A 3", "5 m boat", "It is", "red"]
    assert sample(["A 3.5 m boat."], num_long_texts=1).long == ["A 3.5 m boat"]
    assert sample(["A 3.5 m boat."], num_long_texts=1, splitter="full_stops").long == ["A 3. 5 m boat"]


def test_consecutive_sentences_of_each_captioner() -> None:
    seen = Counter()
    for epoch in range(200):
        texts = sample(epoch=epoch)
        assert texts.short == "short"
        assert not texts.stand_in
        assert len(texts.long) == 3
        assert {text[0] for text in texts.long} == {"0", "1", "2"}
        for text in texts.long:
            sentences = text.split(". ")
            assert len(sentences) == 3
            assert len({sentence[0] for sentence in sentences}) == 1
            assert all(ord(second[1]) - ord(first[1]) == 1 for first, second in pairwise(sentences))
            seen[sentences[0]] += 1
    # Each of the 6 starts of 3 captions is drawn about 200 / 6 = 33 times.
    assert len(seen) == 18
    assert min(seen.values()) > 10


def test_number_of_sentences_and_of_texts() -> None:
    assert sorted(sample(num_sentences=None).long) == [text.removesuffix(".") for text in CAPTIONS]
    assert all(text.count(". ") == 0 for text in sample(num_sentences=1).long)
    assert sorted(sample(num_sentences=50).long) == sorted(sample(num_sentences=None).long)
    assert sample(num_long_texts=0) == Texts("short", [], stand_in=False)
    assert len(sample(num_long_texts=1).long) == 1


def test_more_texts_than_captions_repeat_as_late_as_possible() -> None:
    texts = sample([CAPTIONS[0]], num_long_texts=6).long
    assert len(set(texts)) == 6  # 8 sentences have 6 runs of 3
    repeated = sample([CAPTIONS[0]], num_long_texts=12).long
    assert Counter(repeated) == Counter(dict.fromkeys(texts, 2))
    assert sample(["One. Two."], num_long_texts=2).long == ["One. Two"] * 2
    assert Counter(text[0] for text in sample(num_long_texts=7).long).most_common()[-1][1] == 2


def test_captioners() -> None:
    for epoch in range(20):
        assert {text[0] for text in sample(epoch=epoch, captioners=(0, 2)).long} == {"0", "2"}
        assert {text[0] for text in sample(["", CAPTIONS[1], " "], epoch=epoch).long} == {"1"}
    with pytest.raises(ValueError, match="captioners"):
        sample(captioners=(3,))


def test_order() -> None:
    orders = {
        tuple(text.split(". ")) for epoch in range(60) for text in sample(epoch=epoch, sentence_order="shuffled").long
    }
    assert any(list(order) != sorted(order) for order in orders)
    for order in orders:
        letters = sorted(sentence[1] for sentence in order)
        assert all(ord(second) - ord(first) == 1 for first, second in pairwise(letters))
    assert all(text.split(". ") == sorted(text.split(". ")) for text in sample(sentence_order="written").long)


def test_the_short_caption_stands_in_and_says_so() -> None:
    for captions in ([], [""], ["...", "\n"]):
        assert sample(captions) == Texts("short", ["short"] * 3, stand_in=True)
    assert not sample([], num_long_texts=0).stand_in
    assert sample(["", CAPTIONS[1], ""], captioners=(0, 2)).stand_in


@pytest.mark.slow
def test_a_draw_depends_on_seed_epoch_and_record_alone() -> None:
    drawn = {
        (seed, epoch, record_id): tuple(sample(seed=seed, epoch=epoch, record_id=record_id).long)
        for seed in range(3)
        for epoch in range(3)
        for record_id in ("a", "b", "1", "11")
    }
    assert len(set(drawn.values())) > 30  # of 36, with 6^3 * 3! possible
    # In another process, whose strings hash otherwise.
    program = (
        "from lotlip_hf.data.record import record_rng\n"
        "from lotlip_hf.data.sampling import SubCaptions\n"
        f"record = {{'id': 'b', 'short_caption': 'short', 'long_captions': {CAPTIONS!r}}}\n"
        "print(SubCaptions()([record], [record_rng(2, 1, 'b')])[0].long)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == str(list(drawn[2, 1, "b"]))


@pytest.mark.parametrize(
    "options",
    [
        {"num_long_texts": -1},
        {"num_sentences": -1},
        {"captioners": (1, 1)},
        {"captioners": (-1,)},
        {"sentence_order": "random"},
        {"splitter": "words"},
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SubCaptions(**options)
    assert SubCaptions(captioners=[0, 1]).captioners == (0, 1)  # as a YAML file gives it
