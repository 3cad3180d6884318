"""Score maps, heat maps and calibrated patches."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import tiny_clip
from lotlip_hf import Encoder, LoTLIPConfig, LoTLIPModel, LoTLIPProcessor, load_encoder
from lotlip_hf.dense import calibrated, calibrated_weights, can_calibrate, enrich_classes, heat_maps, score_maps
from lotlip_hf.evaluation.benchmarks.registry import load_benchmark
from lotlip_hf.evaluation.evaluate import evaluate
from lotlip_hf.scenes.dataset import GRID, regions, render, scene, write_segmentation
from lotlip_hf.scenes.small import small_model
from tiny_vision import FAMILIES, Family, spread

CLOSE = {"rtol": 0.0, "atol": 1e-5}
TEXTS = ["a large red star", "There is nothing in the center."]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(*small_model(hidden_size=32))


def lotlip_model(encoder: Encoder) -> LoTLIPModel:
    return encoder.engine.model  # pyright: ignore[reportAttributeAccessIssue]


def encoder_of(family: Family, **options: Any) -> Encoder:
    """A LoTLIP with the image tower of a family, and all weights frozen."""
    small, processor = small_model(hidden_size=32, num_hidden_layers=1)
    config = LoTLIPConfig(
        text_config=small.config.text_config, vision_config=family.config(projection_dim=32, **options)
    )
    model = spread(LoTLIPModel(config)).requires_grad_(False)
    return Encoder(model, LoTLIPProcessor(family.image_processor(), processor.tokenizer))


def pictures(count: int) -> list[Image.Image]:
    return [render(scene(number)) for number in range(count)]


def test_score_maps_are_cosines_of_patches_on_the_grid(encoder: Encoder) -> None:
    images = pictures(3)
    maps = score_maps(encoder, images, TEXTS, batch_size=2)
    assert maps.shape == (3, 2, GRID, GRID)
    pixels = torch.from_numpy(encoder.engine.pixels(images[2])["pixel_values"])
    with torch.no_grad():
        patches = lotlip_model(encoder)(pixel_values=pixels, output_patch_embeds=True).patch_embeds[0]
    texts = encoder.encode_texts(TEXTS, progress=False)
    torch.testing.assert_close(maps[2, 1].flatten(), patches @ texts[1], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_all_towers(family: Family) -> None:
    encoder = encoder_of(family)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8))
    maps, heat = score_maps(encoder, [image], TEXTS)[0], heat_maps(encoder, image, TEXTS)
    assert maps.shape == heat.shape
    if family.model_type == "siglip2_vision_model":
        assert maps.shape == (2, 3, 6)
    assert heat.min() >= 0
    if maps[0].numel() > 1:
        torch.testing.assert_close(heat.amax((1, 2)), torch.ones(2))
    if can_calibrate(lotlip_model(encoder)):
        assert not torch.equal(score_maps(encoder, [image], TEXTS, calibrated=True)[0], maps)
        return
    assert family.model_type == "timm_wrapper" or "convnext" in family.model_type
    torch.testing.assert_close(heat, heat_maps(encoder, image, TEXTS, method="patches"))
    for method in ("calibrated", "gradient"):
        with pytest.raises(ValueError, match=family.model_type):
            heat_maps(encoder, image, TEXTS, method=method)


def test_images_with_other_grids_are_refused() -> None:
    encoder = encoder_of(next(family for family in FAMILIES if family.model_type == "siglip2_vision_model"))
    with pytest.raises(ValueError, match="images"):
        score_maps(encoder, [Image.new("RGB", (64, 128)), Image.new("RGB", (128, 64))], TEXTS)


def test_an_unknown_method_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="method"):
        heat_maps(encoder, pictures(1)[0], TEXTS, method="gradients")  # pyright: ignore[reportArgumentType]


def test_other_models_are_refused(tmp_path: Path) -> None:
    tiny_clip.save_clip(tmp_path)
    with pytest.raises(ValueError, match="LoTLIP"):
        score_maps(load_encoder(tmp_path), pictures(1), TEXTS)


def test_calibrated_weights_by_hand() -> None:
    states = torch.zeros(1, 3, 4, 8)
    torch.testing.assert_close(calibrated_weights(states, states, states), torch.full((1, 4, 4), 3 / 4))
    seen = torch.tensor([True, True, True, False]).expand(1, 1, 4, 4)
    expected = 3 / 3 * seen[0].float()
    torch.testing.assert_close(calibrated_weights(states, states, states, seen), expected)
    added = torch.zeros(1, 1, 4, 4).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(calibrated_weights(states, states, states, added), expected)
    query, key, value = torch.randn(3, 2, 3, 4, 8)
    weights = calibrated_weights(query, key, value)
    of_head = [
        F.softmax(one[1, head, 2] @ one[1, head].T / 8**0.5, dim=-1)
        for one in (query, key, value)
        for head in range(3)
    ]
    torch.testing.assert_close(weights[1, 2], torch.stack(of_head).sum(0) / 3)


def test_calibrated_patches_by_hand(encoder: Encoder) -> None:
    """The states before the layers and the outputs of their attention; the class token stays as it is."""
    model = lotlip_model(encoder)
    backbone = model.vision_model.backbone
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = model.vision_model(pixels, output_hidden_states=True, output_patch_embeds=True)
        with calibrated(model):
            output = model.vision_model(pixels, output_patch_embeds=True)
            pooled = model.vision_model(pixels, pooled_only=True).pooler_output
        expected = plain.hidden_states[0]
        for layer, states in zip(backbone.layers, plain.hidden_states[:-1], strict=True):
            states, attention = layer.layernorm_before(states), layer.attention
            query, key, value = (
                one(states).view(2, 10, 4, 8).transpose(1, 2)
                for one in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            weights = calibrated_weights(query, key, value)
            expected = expected + attention.o_proj(torch.einsum("bij,bhjd->bihd", weights, value).flatten(2))
        expected = backbone.layernorm(expected)[:, 1:]
        after = model.vision_model(pixels, output_patch_embeds=True)
    torch.testing.assert_close(output.patch_embeds, expected, **CLOSE)
    torch.testing.assert_close(output.pooler_output, plain.pooler_output, **CLOSE)
    torch.testing.assert_close(pooled, plain.pooler_output, **CLOSE)
    torch.testing.assert_close(after.patch_embeds, plain.patch_embeds, rtol=0, atol=0)


def test_heat_maps_leave_the_model_as_it_is(encoder: Encoder) -> None:
    model = lotlip_model(encoder)
    before = model.vision_model.backbone.config._attn_implementation
    model.train()
    try:
        maps = heat_maps(encoder, pictures(1)[0], TEXTS, method="gradient")
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert model.vision_model.backbone.config._attn_implementation == before != "eager"
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(maps, heat_maps(encoder, pictures(1)[0], TEXTS[::-1], method="gradient").flip(0))
    torch.testing.assert_close(maps, heat_maps(encoder, pictures(1)[0], TEXTS))


def test_enriched_classes_by_hand() -> None:
    classes, descriptions = (F.normalize(torch.randn(size, 6), dim=-1) for size in (3, 10))
    scores = classes @ descriptions.T
    worst = scores.argmin(1)
    expected = []
    for embeds, row, left_out in zip(classes, scores, worst, strict=True):
        kept = torch.arange(10) != left_out
        expected.append(F.normalize(embeds + row[kept].softmax(0) @ descriptions[kept], dim=0))
    torch.testing.assert_close(enrich_classes(classes, descriptions, 10), torch.stack(expected))
    groups = F.normalize(torch.eye(6)[[0] * 4 + [1] * 4] + 0.05 * torch.randn(8, 6), dim=-1)
    centres = torch.stack([groups[:4].mean(0), groups[4:].mean(0)])
    expected = F.normalize(classes + (classes @ centres.T).softmax(-1) @ centres, dim=-1)
    torch.testing.assert_close(enrich_classes(classes, groups, 2), expected)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_on_scenes(trained_on_scenes: Path, tmp_path: Path) -> None:
    """After a short training, most heat is in the object's cell, and calibration makes segmentation better."""
    encoder = load_encoder(trained_on_scenes)
    shares: dict[str, list[float]] = {"gradient": [], "calibrated": []}
    for number in range(60):
        one = scene(number, split="test")
        found = regions(one)
        for method, own in shares.items():
            maps = heat_maps(encoder, render(one), [region["text"] for region in found], method=method)
            for region, heat in zip(found, maps, strict=True):
                column, row = (round(GRID * side) for side in region["box"][:2])
                own.append((heat[row, column] / heat.sum()).item())
    mean = {method: sum(own) / len(own) for method, own in shares.items()}
    assert mean["gradient"] > 0.5  # chance: 1 / 9
    assert mean["calibrated"] > 0.3
    write_segmentation(tmp_path / "masks", 100)
    data = load_benchmark("segmentation", tmp_path / "masks")
    metrics = evaluate(encoder, data, templates=["a {}."], progress=False)["metrics"]
    assert metrics["calibrated_mean_iou"] > metrics["mean_iou"] + 0.1
