"""Schur complement entropy, caption reward and composed score: by hand, by the formulas, and against authors' code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from lotlip_hf import Encoder
from lotlip_hf.metrics import (
    aggregate,
    caption_reward,
    caption_reward_of,
    composed_features,
    composed_score,
    schur_entropy,
    schur_entropy_of,
)
from lotlip_hf.metrics.composed_score import only_boxes
from lotlip_hf.scenes.small import small_model

CLOSE = {"rtol": 0.0, "atol": 1e-6}
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 40, 3), dtype=np.uint8)) for seed in range(4)
]
TEXTS = ["A red star.", "A blue circle is in the center.", "a green cross", "a plain square"]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(*small_model(hidden_size=32))


# Schur complement entropy


def test_images_that_are_linear_in_their_texts_have_none() -> None:
    texts = F.normalize(torch.randn(60, 8), dim=-1)
    assert schur_entropy_of(texts @ torch.randn(8, 8), texts) == pytest.approx(0, abs=1e-6)
    assert schur_entropy_of(texts, texts) == pytest.approx(0, abs=1e-6)


def test_texts_that_explain_nothing_leave_the_entropy_of_the_images() -> None:
    images = torch.eye(4).repeat(10, 1)  # four kinds of images, with eigenvalues of 1 / 4
    assert schur_entropy_of(images, torch.zeros(40, 4)) == pytest.approx(math.log(4))
    # a text for each of two kinds explains these two: eigenvalues of 1 / 4, twice
    texts = images * torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert schur_entropy_of(images, texts) == pytest.approx(math.log(2) / 2)
    assert schur_entropy_of(images, torch.ones(40, 4)) < math.log(4)


def test_the_entropy_is_that_of_the_schur_complement() -> None:
    images, texts = (F.normalize(torch.randn(50, 6, dtype=torch.double), dim=-1) for _ in range(2))
    images = F.normalize(images + texts, dim=-1)
    yy, xy, xx = images.T @ images / 50, texts.T @ images / 50, texts.T @ texts / 50
    values = torch.linalg.eigvalsh(yy - xy.T @ torch.linalg.inv(xx) @ xy)
    expected = -(values * (values / values.sum()).log()).sum().item()
    assert schur_entropy_of(images, texts) == pytest.approx(expected)


def test_random_features_stand_for_the_gaussian_kernel() -> None:
    images, constant = torch.randn(200, 3), torch.ones(200, 3)
    sigma = 1.5
    kernel = (-torch.cdist(images, images).square() / (2 * sigma**2)).exp().double() / 200
    centre = torch.eye(200, dtype=torch.double) - 1 / 200  # what the constant feature of one text explains
    values = torch.linalg.eigvalsh(centre @ kernel @ centre).clamp(min=1e-12)
    expected = -(values * (values / values.sum()).log()).sum().item()
    found = schur_entropy_of(images, constant, sigma=sigma, num_features=1000)
    assert found == pytest.approx(expected, rel=0.03)
    assert found == schur_entropy_of(images, constant, sigma=sigma, num_features=1000)
    assert schur_entropy_of(images, images, sigma=sigma, num_features=50) == pytest.approx(0, abs=1e-6)


def test_the_entropy_of_pictures(encoder: Encoder) -> None:
    same = schur_entropy(PICTURES, ["a star"] * 4, encoder)
    assert same == pytest.approx(
        schur_entropy_of(encoder.encode_images(PICTURES), encoder.encode_texts(["a star"] * 4))
    )
    assert same > 0


# Caption reward


def test_the_target_is_the_weighted_corpus() -> None:
    images, corpus = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    weights = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).mul(5).softmax(-1)
    torch.testing.assert_close(aggregate(images, corpus, sharpness=5), weights @ corpus, **CLOSE)


def test_the_reward_is_the_authors(golden: Path) -> None:
    authors = load_file(golden / "scores" / "cgtgan.safetensors")
    images, corpus = authors["images"], authors["corpus"]
    targets = aggregate(images, corpus)
    torch.testing.assert_close(targets, authors["targets"], **CLOSE)
    for image_weight in (0.0, 0.3):
        options = {"cosine_weight": 0.4, "image_weight": image_weight, "scale": 20.0}
        found = caption_reward_of(authors["texts"], targets, images, **options)
        torch.testing.assert_close(found, authors[f"rewards_{image_weight}"], rtol=0, atol=1e-5)


def test_the_reward_of_pictures(encoder: Encoder) -> None:
    corpus = [*TEXTS, "a tiny pink star"]
    found = caption_reward(PICTURES, TEXTS, corpus, encoder)
    images, texts, known = (
        encoder.encode_images(PICTURES),
        encoder.encode_texts(TEXTS),
        encoder.encode_texts(corpus),
    )
    expected = caption_reward_of(texts, aggregate(images, known), images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(caption_reward(PICTURES, TEXTS, known, encoder), expected, rtol=0, atol=1e-4)
    target = aggregate(images, known)
    torch.testing.assert_close(caption_reward_of(target, target, images), torch.full((4,), 100.0))
    with pytest.raises(ValueError, match="corpus"):
        caption_reward(PICTURES, TEXTS, [], encoder)


# Composed score


def test_parts_are_weighted_by_their_words(golden: Path) -> None:
    authors = load_file(golden / "scores" / "comclip.safetensors")
    image, parts, words = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.eye(2)
    # similarities 0 and 1
    torch.testing.assert_close(composed_features(image, parts, words), torch.tensor([2.0, 1.0]), **CLOSE)
    assert composed_features(image, parts[:0], words[:0]) is image
    image, parts, words = (authors[name] for name in ("image", "parts", "words"))
    score = F.cosine_similarity(composed_features(image, parts, words), authors["text"], dim=0)
    torch.testing.assert_close(score, authors["score"].squeeze(), **CLOSE)


def test_the_score_of_a_picture(encoder: Encoder) -> None:
    picture, text = PICTURES[0], TEXTS[0]
    cosine = (encoder.encode_images([picture]) @ encoder.encode_texts([text]).T).item()
    assert composed_score(picture, text, [], encoder) == pytest.approx(cosine, abs=1e-5)
    boxes = [[0, 0, 0.5, 1], [0.5, 0.5, 1, 1]]
    parts = [("red", boxes[:1]), ("a star", boxes[1:]), ("is beside", boxes)]
    engine = encoder.engine
    blackened = [picture, *(only_boxes(picture, one) for _, one in parts)]
    features = torch.cat([torch.from_numpy(engine.features("image", engine.pixels(one))) for one in blackened])
    inputs, _ = engine.tokenize([text, *(words for words, _ in parts)], 64)
    words = torch.from_numpy(engine.features("text", engine.pad(inputs)))
    expected = F.cosine_similarity(composed_features(features[0], features[1:], words[1:]), words[0], dim=0)
    assert composed_score(picture, text, parts, encoder) == pytest.approx(expected.item(), abs=1e-5)


def test_boxes_are_checked() -> None:
    for boxes, word in (([0, 0, 1, 1], "list of boxes"), ([[0, 0, 1]], "not a box"), ([[0, 0, 2, 1]], "outside")):
        with pytest.raises(ValueError, match=word):
            only_boxes(PICTURES[0], boxes)


def test_a_part_is_black_outside_of_its_boxes() -> None:
    white = Image.new("RGB", (10, 8), "white")
    part = np.asarray(only_boxes(white, [[0, 0, 0.2, 0.5], [0.5, 0.25, 1, 0.3]]))[..., 0] > 0
    expected = np.zeros((8, 10), dtype=bool)
    expected[:4, :2] = expected[2:3, 5:] = True
    assert (part == expected).all()
    for box in ([0.5, 0, 0.5, 1], [0, 0, 2, 1]):
        with pytest.raises(ValueError, match="`parts`"):
            only_boxes(white, [box])
