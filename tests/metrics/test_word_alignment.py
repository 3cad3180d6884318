"""Word alignment: what the attention of each family says, whatever the batches, and an exchanged word on Scenes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tiny_clip
from lotlip_hf import Encoder, load_encoder
from lotlip_hf.attribution import eager, relevance
from lotlip_hf.conversion.clip import convert
from lotlip_hf.metrics import WordScore, token_relevance, word_alignment
from lotlip_hf.scenes.dataset import long_captions, render, scene
from lotlip_hf.scenes.small import small_model
from scripts import load_script

SCENES = [scene(index, split="test") for index in range(3)]
PICTURES = [render(one) for one in SCENES]
TEXTS = ["A red star.", long_captions(SCENES[1])[0], "Zebras aren't blue-green: is a star red? No."]
CLOSE = {"rtol": 0.0, "atol": 1e-6}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(*small_model(hidden_size=32))


@pytest.mark.parametrize("rows", ["all", "pooled"])
@pytest.mark.parametrize("layers", [None, [-1], [0]])
def test_values_are_those_of_one_text_by_hand(rows: Any, layers: list[int] | None, encoder: Encoder) -> None:
    model, tokenizer = encoder.engine.model, encoder.engine.tokenizer
    found = word_alignment(PICTURES, TEXTS, encoder, rows=rows, layers=layers)
    single = word_alignment(PICTURES, TEXTS, encoder, rows=rows, layers=layers, batch_size=1)
    images = encoder.encode_images(PICTURES, progress=False)
    for text, image, words, alone in zip(TEXTS, images, found, single, strict=True):
        assert [text[word.start : word.end] for word in words] == [word.text for word in words]
        inputs = tokenizer(text, return_tensors="pt")
        with eager(model):
            output = model.get_text_features(**inputs, output_attentions=True)
        chosen = [output.attentions[layer] for layer in layers or range(2)]
        matrix = relevance(F.normalize(output.pooler_output, dim=-1)[0] @ image, chosen)[0]
        tokens = matrix.sum(0) if rows == "all" else matrix[0]  # [CLS] is pooled
        # Each letter of a word that the vocabulary has not is a token; the other tokens are [CLS], [SEP] and signs.
        total = sum(
            value.item()
            for token, value in zip(inputs.tokens(), tokens, strict=True)
            if token.strip("#").isalnum() or (token in "'-" and text == TEXTS[2])
        )
        assert sum(word.value for word in words) == pytest.approx(total, abs=1e-5)
        for word, other in zip(words, alone, strict=True):
            assert word[:3] == other[:3]
            assert word.value == pytest.approx(other.value, abs=1e-5)
    assert found[0][1] == WordScore("red", 2, 5, found[0][1].value)
    assert [word.text for word in found[2]][:3] == ["Zebras", "aren't", "blue-green"]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooled_rows_are_those_of_the_pooling(pooling: str, encoder: Encoder) -> None:
    model, tokenizer = encoder.engine.model, encoder.engine.tokenizer
    inputs = dict(tokenizer(TEXTS[:2], padding=True, return_tensors="pt"))
    image = F.normalize(torch.randn(2, 32), dim=-1)
    config = model.config.text_config
    former, config.pooling = config.pooling, pooling
    try:
        found = token_relevance(model, inputs, image, rows="pooled")
        with eager(model):
            output = model.get_text_features(**inputs, output_attentions=True)
        cosines = (F.normalize(output.pooler_output, dim=-1) * image).sum(-1)
        matrices = relevance(cosines, output.attentions)
    finally:
        config.pooling = former
    for values, matrix, mask in zip(found, matrices, inputs["attention_mask"], strict=True):
        expected = matrix[0] if pooling == "cls" else matrix[: mask.sum()].mean(0)
        torch.testing.assert_close(values, expected, **CLOSE)
        assert not values[mask.sum() :].any()


def test_the_model_is_left_as_it_was(encoder: Encoder) -> None:
    model = encoder.engine.model
    model.train()
    model.requires_grad_(False)  # frozen models have values, too
    former = model.text_model.backbone.config._attn_implementation
    try:
        found = word_alignment(PICTURES, TEXTS, encoder)
        assert model.training
        assert not model.text_model.get_input_embeddings()._forward_hooks
        assert model.text_model.backbone.config._attn_implementation == former != "eager"
    finally:
        model.eval()
        model.requires_grad_(True)
    assert found == word_alignment(PICTURES, TEXTS, encoder)
    assert all(one.grad is None for one in model.parameters())


def test_clip_and_lotlip_over_its_towers(tmp_path: Path) -> None:
    tiny_clip.save_clip(tmp_path / "clip")
    convert(tmp_path / "clip", tmp_path / "lotlip", num_corner_tokens=0)
    texts = ["a red car", "a dog and a cat, the house", ""]
    lotlip = load_encoder(tmp_path / "lotlip", device="cpu")
    stock = load_encoder(tmp_path / "clip", device="cpu")
    ours, others = (word_alignment(PICTURES, texts, one) for one in (lotlip, stock))
    assert [len(words) for words in ours] == [3, 7, 0]
    for words, same in zip(ours, others, strict=True):
        assert [word[:3] for word in words] == [word[:3] for word in same]
        assert [word.value for word in words] == pytest.approx([word.value for word in same], abs=1e-6)
    assert word_alignment(PICTURES, texts, lotlip, rows="pooled") != ours
    with pytest.raises(ValueError, match="`rows`"):
        word_alignment(PICTURES, texts, stock, rows="pooled")


def test_words_beyond_the_longest_text_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(*small_model(hidden_size=16, max_text_length=8))
    (words,) = word_alignment(PICTURES[:1], ["a red star, a blue circle, a green cross"], encoder)
    assert [word.text for word in words] == ["a", "red", "star", "a", "blue"]
    assert "1 of 1 texts" in caplog.text


def test_padding_on_the_left_shifts_nothing(encoder: Encoder) -> None:
    expected = word_alignment(PICTURES, TEXTS, encoder)
    tokenizer = encoder.engine.tokenizer
    tokenizer.padding_side = "left"
    try:
        found = word_alignment(PICTURES, TEXTS, encoder)
    finally:
        tokenizer.padding_side = "right"
    for words, same in zip(found, expected, strict=True):
        assert [word.value for word in words] == pytest.approx([word.value for word in same], abs=1e-5)


def test_wrong_arguments(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        word_alignment(PICTURES[:2], TEXTS[:1], encoder)
    engine: Any = SimpleNamespace(name="onnx folder")
    with pytest.raises(ValueError, match="`encoder`"):
        word_alignment(PICTURES, TEXTS, Encoder.from_engine(engine))
    with pytest.raises(ValueError, match="`rows`"):
        word_alignment(PICTURES, TEXTS, encoder, rows="some")  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_exchanged_colour_has_the_lowest_value(trained_on_scenes: Path) -> None:
    """In a small model that was trained on other pictures. By chance, one lowest word in 40 is exchanged."""
    script = load_script("benchmarks/exchanged_words.py")
    encoder = load_encoder(trained_on_scenes, device="cpu")
    captions = script.exchanged([scene(index, split="test") for index in range(150)], encoder)
    captions = [one for one in captions if one.attribute == "colour"]
    found, pooled = (script.measure(script.by_attention(encoder, rows=rows), captions) for rows in ("all", "pooled"))
    assert found["lowest"] > 0.5
    assert found["above"] > 0.85
    assert found["below_true"] > 0.6
    assert found["lowest"] > pooled["lowest"]
