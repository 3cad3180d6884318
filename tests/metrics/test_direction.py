"""Direction between two sets of embeddings, and embeddings without the part of a text."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lotlip_hf import Encoder
from lotlip_hf.metrics import direction, direction_of, text_part, without_text
from lotlip_hf.scenes.small import small_model

CLOSE = {"rtol": 0.0, "atol": 1e-6}


@pytest.mark.parametrize(
    ("like", "unlike", "expected"),
    [
        ([[1.0, 0.0]], [[0.0, 1.0]], [0.5**0.5, -(0.5**0.5)]),
        ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0]], [-(0.5**0.5), 0.5**0.5]),
        ([[2.0, 0.0], [0.0, 2.0]], [], [0.5**0.5, 0.5**0.5]),
        ([], [[0.0, 3.0]], [0.0, -1.0]),
    ],
)
def test_a_direction_is_the_difference_of_means(
    like: list[list[float]], unlike: list[list[float]], expected: list[float]
) -> None:
    sets = (torch.tensor(one).reshape(-1, 2) for one in (like, unlike))
    torch.testing.assert_close(direction_of(*sets), torch.tensor(expected), **CLOSE)


def test_a_direction_of_images() -> None:
    encoder = Encoder(*small_model(hidden_size=16))
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "orange", "blue", "green")]
    embeds = encoder.encode_images(images, progress=False)
    found = direction(images[:2], images[2:], encoder)
    torch.testing.assert_close(found, direction_of(embeds[:2], embeds[2:]), **CLOSE)
    assert (embeds @ found)[:2].mean() > (embeds @ found)[2:].mean()


@pytest.mark.parametrize(("number", "match"), [(0, "`like`"), (1, "same mean")])
def test_there_is_no_direction(number: int, match: str) -> None:
    embeds = torch.eye(3)[:number]
    with pytest.raises(ValueError, match=match):
        direction_of(embeds, embeds)


def test_projecting_the_query_orders_images_as_projecting_the_images() -> None:
    images, (query, text) = (F.normalize(torch.randn(shape, 8, dtype=torch.double), dim=-1) for shape in (50, 2))
    projected = without_text(query, 3 * text)
    torch.testing.assert_close(projected @ text, torch.zeros((), dtype=torch.double), **CLOSE)
    torch.testing.assert_close(images @ projected, without_text(images, text) @ query, **CLOSE)
    torch.testing.assert_close(without_text(projected, text), projected, **CLOSE)
    torch.testing.assert_close(without_text(images, torch.stack([text] * 50)), without_text(images, text), **CLOSE)


def test_what_a_text_explains_is_the_residual_of_least_squares() -> None:
    texts = torch.randn(40, 6, dtype=torch.double)
    images = texts @ torch.randn(6, 6, dtype=torch.double) + torch.randn(40, 6, dtype=torch.double)
    solution = torch.linalg.lstsq(texts, images).solution
    part = text_part(images, texts)
    torch.testing.assert_close(part, solution, **CLOSE)
    # the form of the paper: the covariances of texts and images
    torch.testing.assert_close(part, torch.linalg.inv(texts.T @ texts / 40) @ (texts.T @ images / 40), **CLOSE)
    residuals = without_text(images, texts, part)
    torch.testing.assert_close(residuals, images - texts @ solution, **CLOSE)
    torch.testing.assert_close(texts.T @ residuals, torch.zeros(6, 6, dtype=torch.double), rtol=0, atol=1e-9)
