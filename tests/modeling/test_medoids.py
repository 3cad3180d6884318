"""Medoids of patches inside the image tower."""

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import SiglipConfig, SiglipModel

import patches
import tiny
import tiny_clip
from lotlip_hf import Encoder, LoTLIPProcessor, LoTLIPVisionModel, cli, load_encoder
from lotlip_hf.dense import heat_maps
from lotlip_hf.loading import load_model, use_medoids
from lotlip_hf.modeling.medoids_lotlip import medoids
from tiny_vision import FAMILIES, Family, spread

EXACT = {"rtol": 1e-6, "atol": 1e-6}
SUPPORTED = [family for family in FAMILIES if family.keeps_patches and family.model_type != "siglip2_vision_model"]
OTHERS = [family for family in FAMILIES if family not in SUPPORTED and family.model_type != "timm_wrapper"]
supported = pytest.mark.parametrize("family", SUPPORTED, ids=lambda family: family.name)


def naive_medoids(points: torch.Tensor, num_centers: int) -> list[int]:
    """The same clustering of one image [P, W] in loops."""
    number = len(points)
    distances = [[float((a - b).norm()) for b in points] for a in points]
    chosen = [max(range(number), key=lambda i: float(points[i].norm()))]
    while len(chosen) < num_centers:
        left = [i for i in range(number) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distances[i][c] for c in chosen)))
    while True:
        cluster = [
            chosen.index(i) if i in chosen else min(range(num_centers), key=lambda k: distances[i][chosen[k]])
            for i in range(number)
        ]
        members = [[i for i in range(number) if cluster[i] == k] for k in range(num_centers)]
        moved = [min(own, key=lambda i: sum(distances[i][j] for j in own)) for own in members]
        if moved == chosen:
            return sorted(chosen)
        chosen = moved


def cost(points: torch.Tensor, chosen: Any) -> float:
    """The sum of distances to the nearest chosen point."""
    return float(torch.cdist(points, points[list(chosen)]).amin(1).sum())


@pytest.mark.parametrize("num_centers", [1, 2, 3, 7, 8])
def test_medoids_are_those_of_loops(num_centers: int) -> None:
    points = torch.randn(12, 8, 3)
    answer = medoids(points, num_centers)
    assert answer.tolist() == [naive_medoids(one, num_centers) for one in points]
    assert torch.equal(medoids(points[7:8], num_centers), answer[7:8])
    assert torch.equal(medoids(points.bfloat16(), num_centers), medoids(points.bfloat16().float(), num_centers))


@pytest.mark.parametrize("num_centers", [2, 3])
def test_separate_clusters_get_the_best_of_all_choices(num_centers: int) -> None:
    centers = 20 * torch.eye(3)[:num_centers]
    points = torch.stack([centers[torch.randperm(8) % num_centers] + torch.randn(8, 3) for _ in range(30)])
    for one, chosen in zip(points, medoids(points, num_centers), strict=True):
        best = min(cost(one, choice) for choice in itertools.combinations(range(8), num_centers))
        assert cost(one, chosen.tolist()) == pytest.approx(best, rel=1e-5)


def test_planted_clusters_of_patches() -> None:
    """Each of 14 groups of patches has its centre among them."""
    centers, is_center = 30 * torch.randn(2, 14, 64), torch.arange(196) % 14 == torch.arange(196) // 14
    noise = torch.randn(2, 196, 64).masked_fill(is_center.unsqueeze(-1), 0)
    points = centers.repeat_interleave(14, 1) + noise
    assert torch.equal(medoids(points, 14), is_center.nonzero().squeeze(1).expand(2, -1))


def test_equal_points_are_chosen_once() -> None:
    points = torch.ones(2, 6, 4)
    points[1, 3:] = 2
    for number in range(1, 7):
        assert all(len(set(row)) == number for row in medoids(points, number).tolist())


def naive(model: LoTLIPVisionModel, prefix: int, num_centers: int, first: int, **inputs: Any) -> torch.Tensor:
    """The pooled states of each image alone, of a plain tower whose layers get gathered tokens and positions."""
    pooled = []
    for image in inputs.pop("pixel_values"):
        one, chosen = copy.deepcopy(model), []

        def gather(module: Any, args: Any, kwargs: Any, one: Any = one, chosen: list = chosen) -> Any:
            layer = one.config.family.layers(one.backbone).index(module)
            states = args[0]
            if layer == first:
                chosen += naive_medoids(states[0, prefix:], num_centers)
                tokens = [*range(prefix), *(prefix + index for index in chosen)]
                args = (states[:, tokens], *args[1:])
            if "position_embeddings" in kwargs and chosen:
                kwargs["position_embeddings"] = tuple(p[..., chosen, :] for p in kwargs["position_embeddings"])
            return args, kwargs

        for layer in one.config.family.layers(one.backbone):
            layer.register_forward_pre_hook(gather, with_kwargs=True)
        pooled.append(one(image.unsqueeze(0), **inputs).pooler_output)
    return torch.cat(pooled)


def pair(family: Family, **options: Any) -> tuple[LoTLIPVisionModel, LoTLIPVisionModel]:
    """A tower with medoids, and a plain one with the same weights."""
    of_medoids = {"image_token_centers": options.pop("centers", 5), "image_token_layer": options.pop("layer", None)}
    model = spread(LoTLIPVisionModel(family.config(**of_medoids, **options)))
    plain = LoTLIPVisionModel(family.config(**options)).eval()
    plain.load_state_dict(model.state_dict())
    return model, plain


@supported
@pytest.mark.parametrize("layer", [None, 0])
def test_towers_compute_medoids(family: Family, layer: int | None) -> None:
    for options in family.variants:
        model, plain = pair(family, layer=layer, **options)
        model, inputs = pickle.loads(pickle.dumps(model)), family.inputs()
        with torch.no_grad():
            expected = naive(plain, family.prefix, 5, 1 if layer is None else 0, **inputs)
            torch.testing.assert_close(model(**inputs).pooler_output, expected, **EXACT)
            torch.testing.assert_close(model(**inputs, pooled_only=True).pooler_output, expected, **EXACT)
        assert model(**inputs).last_hidden_state.shape == (3, family.prefix + 5, 32)


@supported
def test_at_least_as_many_centers_as_patches_change_no_bit(family: Family) -> None:
    inputs, number = family.inputs(), 16
    for centers in (number, number + 1):
        model, plain = pair(family, centers=centers)
        with torch.no_grad():
            assert torch.equal(model(**inputs).last_hidden_state, plain(**inputs).last_hidden_state)
            assert torch.equal(model(**inputs).pooler_output, plain(**inputs).pooler_output)


@supported
def test_medoids_of_kept_patches(family: Family) -> None:
    model, plain = pair(family, centers=3)
    inputs, kept = family.inputs(), torch.stack([torch.randperm(16)[:7] for _ in range(3)])
    with torch.no_grad():
        for index in range(3):
            one = {name: value[index : index + 1] for name, value in inputs.items()}
            expected = naive(plain, family.prefix, 3, 1, **one, kept_patches=kept[index : index + 1])
            answer = model(**one, kept_patches=kept[index : index + 1]).pooler_output
            torch.testing.assert_close(answer, expected, **EXACT)
        few = kept[:, :3]
        expected = plain(**inputs, kept_patches=few).pooler_output
        assert torch.equal(model(**inputs, kept_patches=few).pooler_output, expected)


@supported
def test_gradients_with_and_without_checkpointing(family: Family) -> None:
    model, inputs, gradients = pair(family, layer=0)[0].train(), family.inputs(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs).pooler_output.square().sum().backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("embeddings" in name for name in gradients[0])
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], **EXACT, msg=name)


@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
def test_other_families_are_refused(family: Family) -> None:
    with pytest.raises(Exception, match="image_token_centers"):
        family.config(image_token_centers=4)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"image_token_centers": 0}, "image_token_centers"),
        ({"image_token_layer": 1}, "image_token_centers"),
        ({"image_token_centers": 4, "image_token_layer": 2}, "image_token_layer"),
        ({"image_token_centers": 4, "image_token_layer": -1}, "image_token_layer"),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, int], name: str) -> None:
    with pytest.raises(Exception, match=name):
        tiny.vision_config(**options)


def stock_siglip(processor: LoTLIPProcessor) -> SiglipModel:
    text = {**tiny.SIZE, "vocab_size": len(processor.tokenizer), "max_position_embeddings": 40}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=tiny.IMAGE_SIZE)).eval()


def test_the_option_is_the_field(official_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    images = sorted(photos.rglob("*.png"))
    options = {"image_token_centers": 2, "image_token_layer": 1}
    plain, encoder = load_encoder(official_checkpoint), load_encoder(official_checkpoint, **options)
    expected = encoder.encode_images(images, progress=False)
    assert not torch.allclose(expected, plain.encode_images(images, progress=False))
    assert encoder.fingerprint("image") != plain.fingerprint("image")
    assert encoder.fingerprint("text") == plain.fingerprint("text")
    _, model = encoder.lotlip()
    model.save_pretrained(tmp_path / "saved")
    LoTLIPProcessor.from_pretrained(official_checkpoint).save_pretrained(tmp_path / "saved")
    saved = load_encoder(tmp_path / "saved")
    assert torch.equal(saved.encode_images(images, progress=False), expected)
    assert saved.fingerprint("image") == encoder.fingerprint("image")
    with pytest.raises(ValueError, match="image_token_centers"):
        heat_maps(saved, images[0], ["a cat"])
    with pytest.raises(ValueError, match="image_token_centers"):
        model(pixel_values=torch.zeros(1, 3, *[model.config.vision_config.image_size] * 2), output_patch_embeds=True)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_stock_models(kind: str, official_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    images = sorted(photos.rglob("*.png"))
    if kind == "clip":
        model, processor = tiny_clip.clip_model(), None
        tiny_clip.save_clip(tmp_path / "stock", model)
        plain = load_encoder(tmp_path / "stock")
        of_options = load_encoder(tmp_path / "stock", image_token_centers=1, image_token_layer=0)
        of_options.engine.model.save_pretrained(tmp_path / "stock")
        again = load_encoder(tmp_path / "stock")
        assert again.fingerprint("image") == of_options.fingerprint("image") != plain.fingerprint("image")
    else:
        processor = LoTLIPProcessor.from_pretrained(official_checkpoint)
        model = stock_siglip(processor)
        plain, of_options = Encoder(copy.deepcopy(model), processor), Encoder(model, processor)
        use_medoids(model, 1, 0)
        again = of_options
    expected = of_options.encode_images(images, progress=False)
    assert torch.equal(again.encode_images(images, progress=False), expected)
    assert not torch.allclose(expected, plain.encode_images(images, progress=False))


def test_the_commands(official_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    """`lotlip embed` writes other embeddings with the option."""
    flags = ["--model", str(official_checkpoint), "--images", str(photos)]
    few = ["--image-token-centers", "1", "--image-token-layer", "0"]
    for name, options in (("all", []), ("few", few)):
        assert cli.main(["embed", *flags, *options, "--output", str(tmp_path / f"{name}.parquet")]) == 0
    written = [pq.read_table(tmp_path / f"{name}.parquet")["embedding"].to_pylist() for name in ("all", "few")]
    expected = load_encoder(official_checkpoint, image_token_centers=1, image_token_layer=0)
    images = expected.encode_images(sorted(photos.rglob("*.png")), progress=False)
    assert not torch.allclose(torch.as_tensor(written[0]), images)
    torch.testing.assert_close(torch.as_tensor(written[1]), images, **EXACT)


def test_wrong_options_of_commands(
    official_checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", "--images", str(photos), "a cat", "--model"]
    assert cli.main([*command, str(official_checkpoint), "--image-token-layer", "1"]) == 2
    assert "image_token_centers" in capsys.readouterr().err
    assert (
        cli.main([*command, str(official_checkpoint), "--image-token-centers", "2", "--image-token-layer", "99"]) == 2
    )
    assert "image_token_layer" in capsys.readouterr().err
    assert cli.main([*command, "open_clip:ViT-B-32/none", "--image-token-centers", "2"]) == 2
    assert "image_token_centers" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["onnx", "openvino", "stock"])
def test_exports_are_refused(kind: str, official_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    model, processor = load_model(official_checkpoint, image_token_centers=2)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    assert cli.main(["convert", kind, "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]) == 2
    assert "image_token_centers" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_on_scenes(trained_on_scenes: Path) -> None:
    """Medoids of a half of the patches lose less R@1 than a random half in the same layer."""
    found = dict(zip(patches.SETTINGS, patches.retrieval(trained_on_scenes, 300), strict=True))
    for depth in patches.DEPTHS:
        assert found["medoids", depth, 0.5] > found["random", depth, 0.5] + 5, depth
