"""Retrieval: exact against brute force whatever the blocks, fair to ties, and no number for broken embeddings."""

import pytest
import torch
from torch.nn import functional as F

from lotlip_hf.evaluation.retrieval import recalls

DIRECTIONS = ("image_to_text", "text_to_image")


def brute_force(images: torch.Tensor, texts: torch.Tensor, k: int) -> dict[str, float]:
    """Recall at k of embeddings without ties, by sorting the whole matrix of similarities in float64."""
    similarities = F.normalize(images.double(), dim=1) @ F.normalize(texts.double(), dim=1).t()
    own = torch.arange(len(images))[:, None]
    results = {}
    for direction, queries in zip(DIRECTIONS, (similarities, similarities.t()), strict=True):
        nearest = queries.argsort(dim=1, descending=True)[:, :k]
        results[f"{direction}_r{k}"] = (nearest == own).any(1).double().mean().item()
    return results


def mean_over_orders(images: torch.Tensor, texts: torch.Tensor, k: int, trials: int = 4000) -> dict[str, float]:
    """Recall at k where the candidates are put in a random order before they are sorted, on average."""
    similarities = (F.normalize(images.double(), dim=1) @ F.normalize(texts.double(), dim=1).t()).round(decimals=9)
    totals = dict.fromkeys([f"{direction}_r{k}" for direction in DIRECTIONS], 0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(trials):
        order = torch.randperm(len(images), generator=generator)
        for direction, queries in zip(DIRECTIONS, (similarities, similarities.t()), strict=True):
            nearest = order[queries[:, order].argsort(dim=1, descending=True, stable=True)[:, :k]]
            totals[f"{direction}_r{k}"] += (nearest == torch.arange(len(images))[:, None]).any(1).double().mean()
    return {name: float(total / trials) for name, total in totals.items()}


def noisy_pairs(number: int, dim: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(number, dim)
    return images, images + noise * torch.randn(number, dim)


@pytest.mark.parametrize("block_size", [1, 7, 64, 301, 4096])
@pytest.mark.parametrize("noise", [0.3, 1.5, 30.0])
def test_agrees_with_brute_force(block_size, noise):
    images, texts = noisy_pairs(301 if block_size > 1 else 40, 16, noise)
    results = recalls(images, texts, block_size=block_size)
    assert list(results) == [f"{direction}_r{k}" for k in (1, 5, 10) for direction in DIRECTIONS]
    for k in (1, 5, 10):
        for name, value in brute_force(images, texts, k).items():
            assert results[name] == pytest.approx(value, abs=1e-12), name


def test_directions_are_told_apart():
    # every image is nearest to text 0, which is nearest to image 0; each other text is nearest to its own image
    images = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.8, 0.0, 0.6]])
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    expected = {"image_to_text_r1": 1 / 3, "text_to_image_r1": 1.0}
    assert recalls(images, texts, ks=[1]) == pytest.approx(expected, abs=1e-12)
    swapped = {"image_to_text_r1": 1.0, "text_to_image_r1": 1 / 3}
    assert recalls(texts, images, ks=[1]) == pytest.approx(swapped, abs=1e-12)


def test_length_does_not_count():
    images, texts = noisy_pairs(50, 8, 1.0)
    scaled = recalls(images * torch.rand(50, 1).exp(), 1e-3 * texts)
    assert scaled == pytest.approx(recalls(images, texts), abs=1e-12)


@pytest.mark.parametrize("constant", ["images", "texts", "both"])
@pytest.mark.parametrize("block_size", [3, 100, 4096])
def test_constant_embeddings_score_chance(constant, block_size):
    number, dim = 337, 67  # odd, so that blocks end in the middle of a vector instruction
    images, texts = noisy_pairs(number, dim, 0.1)
    if constant in ("images", "both"):
        images = images[:1].expand(number, -1)
    if constant in ("texts", "both"):
        texts = texts[:1].expand(number, -1)
    results = recalls(images, texts, ks=(1, 5, 10, 337, 1000), block_size=block_size)
    for k in (1, 5, 10, 337, 1000):
        for direction in DIRECTIONS:
            assert results[f"{direction}_r{k}"] == pytest.approx(min(k / number, 1), abs=1e-12)


def test_zeros_score_chance():
    assert recalls(torch.zeros(8, 4), torch.randn(8, 4), ks=[2])["image_to_text_r2"] == pytest.approx(0.25, abs=1e-12)


def test_shared_captions_are_shared_fairly():
    # as the held-out Scenes' short captions: groups of four images with one caption, all of them told apart perfectly
    images = torch.eye(25).repeat_interleave(4, 0)
    texts = images + 1e-8 * torch.randn(100, 25)  # what another padding does
    results = recalls(images, texts, ks=(1, 3, 4), block_size=13)
    for direction in DIRECTIONS:
        assert results[f"{direction}_r1"] == pytest.approx(0.25, abs=1e-12)
        assert results[f"{direction}_r3"] == pytest.approx(0.75, abs=1e-12)
        assert results[f"{direction}_r4"] == pytest.approx(1.0, abs=1e-12)


def test_many_ties_agree_with_random_orders():
    # few values in few dimensions: groups of candidates that are tied with, before and behind the match
    images, texts = (torch.randint(-1, 2, (24, 3)).float() for _ in range(2))
    for k in (1, 3, 8):
        results = recalls(images, texts, ks=[k], block_size=5)
        for name, value in mean_over_orders(images, texts, k).items():
            assert results[name] == pytest.approx(value, abs=0.01), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    images, texts = noisy_pairs(60, 16, 1.0)
    images, texts = images.to(dtype), texts.to(dtype)
    expected = {**brute_force(images, texts, 1), **brute_force(images, texts, 5)}
    assert recalls(images, texts, ks=(1, 5)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_on_an_accelerator():
    device = torch.accelerator.current_accelerator()
    images, texts = noisy_pairs(3000, 64, 3.0)
    on_device = recalls(images.to(device), texts.to(device), block_size=1000)
    assert on_device == pytest.approx(recalls(images, texts), abs=1e-12)
    constant = recalls(images[:1].to(device).expand(3000, -1), texts.to(device), ks=[1], block_size=999)
    assert constant["image_to_text_r1"] == pytest.approx(1 / 3000, abs=1e-12)


def test_precision_is_not_the_callers():
    # neighbours that bfloat16, with its 8 bits, cannot tell apart
    angles = torch.arange(200) * 0.004
    images = torch.stack([angles.cos(), angles.sin()], dim=1).repeat(1, 16)
    exact = recalls(images, images, ks=[1])
    assert exact == pytest.approx({"image_to_text_r1": 1.0, "text_to_image_r1": 1.0}, abs=1e-12)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert recalls(images, images, ks=[1]) == exact
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


def test_inputs_are_left_alone():
    images, texts = noisy_pairs(10, 4, 0.5)
    images.requires_grad_()
    before = images.detach().clone(), texts.clone()
    recalls(images, texts, block_size=3)
    assert torch.equal(images.detach(), before[0])
    assert torch.equal(texts, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["image_embeds", "text_embeds"])
def test_broken_embeddings_are_refused(name, value):
    embeds = dict(zip(("image_embeds", "text_embeds"), noisy_pairs(9, 4, 0.5), strict=True))
    embeds[name][7, 2] = value
    with pytest.raises(ValueError, match=f"`{name}` hold NaN or infinity, first in row 7 of 9"):
        recalls(**embeds, block_size=4)


@pytest.mark.parametrize(
    ("images", "texts"), [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((4, 2, 3), (4, 2, 3)), ((0, 3), (0, 3))]
)
def test_shapes_are_checked(images, texts):
    with pytest.raises(ValueError, match=r"\[N, dim\]"):
        recalls(torch.ones(images), torch.ones(texts))


@pytest.mark.parametrize("arguments", [{"ks": [1, 0]}, {"block_size": 0}])
def test_numbers_are_checked(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be at least 1"):
        recalls(torch.eye(3), torch.eye(3), **arguments)
