"""Masked words: their probabilities, which tokens they are, the file of scores, and what a batch has."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lotlip_hf import LoTLIPProcessor, LoTLIPTokenizer
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.masking import IGNORED, Masking, WordScores, noise_probability, prediction_probability
from lotlip_hf.data.sampling import SubCaptions
from lotlip_hf.files import FileError, LineError
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.scenes.small import small_model
from tiny_clip import clip_tokenizer
from tiny_tokenizers import toy_llama, toy_qwen, toy_roberta


@pytest.fixture(scope="module")
def scenes_processor() -> LoTLIPProcessor:
    return small_model(hidden_size=32, num_hidden_layers=1)[1]


def write(file: Path, *lines: Any) -> Path:
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return file


def test_the_probabilities_are_those_of_ga_dms(golden: Path) -> None:
    file = load_file(golden / "terms" / "ga_dms.safetensors")
    for function, name in ((noise_probability, "noise"), (prediction_probability, "prediction")):
        found = torch.tensor([function(score) for score in file["scores"].tolist()], dtype=torch.float64)
        torch.testing.assert_close(found, file[name], rtol=0, atol=1e-12)
    assert (noise_probability(None), prediction_probability(None)) == (0.0, 0.15)


@pytest.mark.parametrize("template", ["{}", "red query: {} star"])
@pytest.mark.parametrize(
    ("text", "max_length", "words"),
    [
        ("A large red star. It’s  blue-green, isn't it?", 40, "A large red star It's blue-green isn't it"),
        ("[SEP] a star. red", 40, "S E P a star red"),
        ("a large red star. green", 8, "a large red star green"),
        ("a large red star. green", 5, "a large red"),
        (",", 40, ""),
    ],
)
def test_words_are_those_of_the_text(
    template: str, text: str, max_length: int, words: str, scenes_processor: LoTLIPProcessor
) -> None:
    """Not of the template and of separators, nor those that are cut."""
    tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(scenes_processor.tokenizer, prompt_template=template)
    room = max_length + len(tokenizer.tokenize("a")) - 1  # for the template
    encoding = tokenizer(
        [text], return_tensors="pt", return_offsets_mapping=True, truncation=True, max_length=room, verbose=False
    )
    ids = encoding["input_ids"][0]
    found, tokens = Masking(tokenizer).words(text, ids, encoding["offset_mapping"][0])
    assert found == words.split()
    pieces = ["".join(tokenizer.convert_ids_to_tokens(ids[own].tolist())).replace("##", "") for own in tokens]
    assert pieces == words.lower().split()


@pytest.mark.parametrize("make", [toy_roberta, toy_qwen, toy_llama, clip_tokenizer])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_words_of_other_tokenizers(make: Callable[[], Any], is_wrapped: bool) -> None:
    tokenizer = make()
    tokenizer.mask_token = tokenizer.mask_token or tokenizer.convert_ids_to_tokens(5)
    if is_wrapped:
        has_separator = tokenizer.sep_token is not None
        tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(tokenizer, split_sentences=has_separator)
    text = "a cat sleeps. the cat's  red, big"
    encoding = tokenizer([text], return_tensors="pt", return_offsets_mapping=True)
    ids = encoding["input_ids"][0]
    found, tokens = Masking(tokenizer).words(text, ids, encoding["offset_mapping"][0])
    assert found == ["a", "cat", "sleeps", "the", "cat's", "red", "big"]
    pieces = ["".join(tokenizer.convert_ids_to_tokens(ids[own].tolist())) for own in tokens]
    for sign in ("</w>", "Ġ", "▁"):
        pieces = [piece.replace(sign, "") for piece in pieces]
    bytes_of = {f"<0x{ord(one):02X}>": one for one in "' acstbighredlp"}  # of Llama
    assert [re.sub("<0x..>", lambda found: bytes_of[found[0]], piece) for piece in pieces] == found


def test_shares_of_masked_words(scenes_processor: LoTLIPProcessor) -> None:
    """Words are masked whole; 80 % become mask tokens, and 10 % others."""
    tokenizer = scenes_processor.tokenizer
    masking, rng = Masking(tokenizer), Random(0)
    before = torch.arange(len(tokenizer) - 30, len(tokenizer)).repeat(2)
    words = [[3 * number, 3 * number + 1, 3 * number + 2] for number in range(20)]
    kinds = {"chosen": 0, "mask": 0, "kept": 0, "random": 0}
    for _ in range(500):
        ids = before.clone()
        labels = masking.mask(ids, words, [0.3] * 10 + [0.0] * 10, rng)
        assert (labels[30:] == IGNORED).all()
        assert torch.equal(ids[labels == IGNORED], before[labels == IGNORED])
        assert torch.equal(labels[labels != IGNORED], before[labels != IGNORED])
        for word in words[:10]:
            is_masked, is_kept = (ids[word] == tokenizer.mask_token_id).all(), torch.equal(ids[word], before[word])
            kinds["chosen"] += bool((labels[word] != IGNORED).all())
            kinds["mask"] += bool(is_masked)
            kinds["random"] += not (is_masked or is_kept)
            assert not set(ids[word].tolist()) & set(tokenizer.all_special_ids) or is_masked
    assert kinds["chosen"] / 5000 == pytest.approx(0.3, abs=0.03)
    assert kinds["mask"] / kinds["chosen"] == pytest.approx(0.8, abs=0.05)
    assert kinds["random"] / kinds["chosen"] == pytest.approx(0.1, abs=0.04)
    assert (masking.mask(before.clone(), words, [0.0] * 20, rng, at_least=1) != IGNORED).sum() == 3
    assert (masking.mask(before.clone(), [], [], rng, at_least=1) == IGNORED).all()


def test_a_tokenizer_without_a_mask_token_is_refused(scenes_processor: LoTLIPProcessor) -> None:
    tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(scenes_processor.tokenizer)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="mask_token"):
        Masking(tokenizer)


# The file


def test_scores_of_drawn_texts(tmp_path: Path) -> None:
    """A word has the score that it has among the same words. Values are those of GA-DMS: cut at 0, at most 1."""
    first = [["A", 0.5], ["red", 2.0], ["cat", 4.0], ["A", -1.0], ["red", -3.0], ["dog", 1.0]]
    file = write(
        tmp_path / "scores.jsonl",
        {"id": "b", "texts": [[["no", -1], ["one", 0]]]},
        {"id": "a", "texts": [first, [["It’s", 3], ["red", 6]]]},
    )
    scores = WordScores(file)
    assert len(scores) == 2
    drawn = [["a", "red", "dog", "A", "red", "cat"], ["dog", "RED"], ["it's", "red", "fish"], []]
    assert scores.scores("a", drawn) == [[0, 0, 0.25, 0.125, 0.5, 1], [0.25, 0.5], [0.5, 1, None], []]
    assert scores.scores("b", [["no", "one"]]) == [[0, 0]]
    assert scores.scores("c", [["a"]]) == [[None]]
    write(file, {"id": "b", "texts": []}, {"id": "c", "texts": [[["no", -1], ["one", 0]]]})
    with pytest.raises(FileError, match=r"scores\.jsonl"):
        scores.texts("a")


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"id": 1, "texts": []}',
        '{"id": "a"}',
        '{"id": "a", "texts": [{"red": 1}]}',
        '{"id": "a", "texts": [[["red"]]]}',
        '{"id": "a", "texts": [[["red", "1"]]]}',
        '{"id": "a", "texts": [[["red", NaN]]]}',
        '{"id": "a", "texts": [[["red", 1e999]]]}',
        '{"id": "a", "texts": [[["red", true]]]}',
        "{",
    ],
)
def test_a_damaged_file_is_refused(line: str, tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    file.write_text(f'{{"id": "b", "texts": []}}\n{line}\n')
    with pytest.raises(LineError, match="line 2"):
        WordScores(file)
    file.write_text("")
    with pytest.raises(FileError, match="word_scores"):
        WordScores(file)


# Batches


@pytest.mark.parametrize("num_long_texts", [0, 2])
@pytest.mark.parametrize("is_scored", [False, True])
def test_the_masked_text_is_the_last(
    num_long_texts: int, is_scored: bool, scenes_processor: LoTLIPProcessor, tmp_path: Path
) -> None:
    """Without scores it alone has masked words, and negatives and regions never have any."""
    records, lines = [dict(row) for row in scenes_dataset(6)], []
    for row in records:
        texts = [row["short_caption"], *row["long_captions"]]
        lines.append({"id": row["id"], "texts": [[[word.strip(".,"), 0.0] for word in one.split()] for one in texts]})
    scores = WordScores(write(tmp_path / "scores.jsonl", *lines)) if is_scored else None
    draw, options = SubCaptions(num_long_texts), {"num_negatives": 1, "num_regions": 2, "return_texts": True}
    plain = LoTLIPCollator(scenes_processor, draw, **options)(records)
    batches = [
        LoTLIPCollator(scenes_processor, draw, mask_words=True, word_scores=scores, **options)(records)
        for _ in range(2)
    ]
    batch, again = batches
    assert all(torch.equal(batch[name], again[name]) for name in ("input_ids", "long_input_ids", "masked_labels"))
    texts = [row[1] if num_long_texts else row[0] for row in plain["texts"]]
    assert [row[-1] for row in batch["texts"]] == texts
    assert [row[:-1] for row in batch["texts"]] == plain["texts"]
    ids, labels = batch["long_input_ids"][:, -1], batch["masked_labels"][:, 0]
    unmasked = scenes_processor(text=[row[1:] for row in batch["texts"]], return_tensors="pt")["input_ids"]
    assert labels.shape == ids.shape
    assert (labels != IGNORED).any(1).all()
    assert torch.equal(torch.where(labels == IGNORED, unmasked[:, -1], labels), unmasked[:, -1])
    assert torch.equal(ids[labels == IGNORED], unmasked[:, -1][labels == IGNORED])
    assert torch.equal(batch["long_input_ids"][:, num_long_texts:-1], unmasked[:, num_long_texts:-1])
    has_noise = [
        not torch.equal(batch["input_ids"], plain["input_ids"]),
        not torch.equal(batch["long_input_ids"][:, :num_long_texts], unmasked[:, :num_long_texts]),
    ]
    assert has_noise == [is_scored, is_scored and num_long_texts > 0]
    assert torch.equal(batch["attention_mask"], plain["attention_mask"])


def test_groups(processor: LoTLIPProcessor) -> None:
    """A record without a group is alone, whatever its id is."""
    rows = [dict(scenes_dataset(1, image_size=32)[0]) for _ in range(6)]
    for row, name, group in zip(rows, "abcABA", ("x", "y", "x", None, "", "B"), strict=True):
        row.update(id=name, group=group)
    groups = LoTLIPCollator(processor, return_groups=True)(rows)["groups"].tolist()
    assert groups[0] == groups[2]
    assert len(set(groups)) == 5


def test_frozen_texts_have_no_tokens_to_mask(processor: LoTLIPProcessor) -> None:
    with pytest.raises(ValueError, match="mask_words"):
        LoTLIPCollator(processor, mask_words=True, frozen=("text",))
