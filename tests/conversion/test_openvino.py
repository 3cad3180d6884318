"""OpenVINO: the graphs compute PyTorch's features at any size of batch and text, and int8 ranks as float32 does."""

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
import tiny_clip
import tiny_families
import tiny_vision
from lotlip_hf import (
    LoTLIPModel,
    LoTLIPTextConfig,
    LoTLIPTextModelWithProjection,
    LoTLIPVisionModelWithProjection,
    load_encoder,
)
from lotlip_hf.cli import main as lotlip
from lotlip_hf.conversion import openvino as openvino_conversion
from lotlip_hf.conversion.common import ConversionError
from lotlip_hf.conversion.openvino import convert
from lotlip_hf.engines.openvino import open_tower
from lotlip_hf.scenes.dataset import scenes_dataset

pytestmark = pytest.mark.slow

FEATURES = {"atol": 1e-5, "rtol": 1e-5}


def check_texts(folder: Path, model: Any, limit: int = 20) -> None:
    """A tower of texts computes as in PyTorch, padded on either side."""
    run = open_tower(folder, "text")
    for lengths, width, side in (([1], 1, "right"), ([8, 3], 8, "right"), ([limit, 2, 5], limit + 3, "left")):
        input_ids = torch.randint(7, 90, (len(lengths), width))
        positions = torch.arange(width) - (torch.tensor([[width - one] for one in lengths]) if side == "left" else 0)
        mask = ((positions >= 0) & (positions < torch.tensor(lengths)[:, None])).long()
        if model.config.family.is_causal:
            input_ids[positions == torch.tensor(lengths)[:, None] - 1] = model.config.eos_token_id
        with torch.no_grad():
            expected = model(input_ids=input_ids, attention_mask=mask).text_embeds
        given = run({"input_ids": input_ids.numpy(), "attention_mask": mask.numpy()})
        torch.testing.assert_close(torch.from_numpy(given), expected, **FEATURES)


@pytest.mark.parametrize(
    ("name", "changes", "fields"),
    [
        ("bert", {"num_hidden_layers": 1}, {}),
        ("modernbert", {}, {"projection": "residual_mlp", "projection_layers": 1, "pooling": "mean"}),
        ("deberta-v2", {"num_hidden_layers": 1}, {}),
        ("t5", {"num_layers": 1}, {}),
        ("llama", {"num_hidden_layers": 1}, {"attention": "bidirectional", "pooling": "weighted_mean"}),
    ],
)
def test_families_of_text_encoders(tmp_path: Path, name: str, changes: dict[str, int], fields: dict[str, Any]) -> None:
    backbone_config = tiny_families.FAMILIES[name].stock_config(**changes)
    config = LoTLIPTextConfig(backbone_config=backbone_config, projection_dim=24, **fields)
    model = tiny_families.spread(LoTLIPTextModelWithProjection(config))
    model.save_pretrained(tmp_path / "tower")
    assert convert(tmp_path / "tower", tmp_path / "openvino").towers[0].difference < 1e-5
    check_texts(tmp_path / "openvino", model)


@pytest.mark.parametrize(
    ("name", "pooling", "layers"), [("dinov2_with_registers", "cls+mean", 2), ("dinov3_vit", "mean", 1)]
)
def test_families_of_image_encoders(tmp_path: Path, name: str, pooling: str, layers: int) -> None:
    (family,) = (one for one in tiny_vision.FAMILIES if one.name == name)
    model = LoTLIPVisionModelWithProjection(family.config(pooling=pooling, pooled_layers=layers, projection_dim=24))
    tiny_clip.random_weights(model)
    model.eval().save_pretrained(tmp_path / "tower")
    assert convert(tmp_path / "tower", tmp_path / "openvino").towers[0].difference < 1e-5
    run = open_tower(tmp_path / "openvino", "vision")
    for size in ((32, 32), (48, 24)):
        images = torch.randn(3, 3, *size)
        with torch.no_grad():
            expected = model(images).image_embeds
        given = torch.from_numpy(run({"pixel_values": images.numpy()}))
        torch.testing.assert_close(given, expected, **FEATURES)


def test_a_family_that_has_no_graph(tmp_path: Path) -> None:
    (family,) = (one for one in tiny_vision.FAMILIES if one.name == "siglip2_vision_model")
    LoTLIPVisionModelWithProjection(family.config(projection_dim=24)).save_pretrained(tmp_path / "tower")
    with pytest.raises(ConversionError, match="siglip2_vision_model"):
        convert(tmp_path / "tower", tmp_path / "openvino")


def test_int8_ranks_scenes_as_float32(
    tmp_path: Path, trained_on_scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R@1 of 500 pictures within a point, cosines of at least 0.98: calibrated by the Scenes that come with it."""
    output = ["--output", str(tmp_path / "int8"), "--quantize", "int8"]
    assert lotlip(["convert", "openvino", "--model", str(trained_on_scenes), *output]) == 0
    assert "R@1" in capsys.readouterr().out
    scenes = scenes_dataset(500, split="test")
    texts = [captions[0] for captions in scenes["long_captions"]]
    recalls = []
    embeddings = []
    for encoder in (load_encoder(trained_on_scenes, device="cpu"), load_encoder(tmp_path / "int8")):
        both = encoder.encode_texts(texts, progress=False), encoder.encode_images(scenes["image"], progress=False)
        recalls.append(((both[0] @ both[1].T).argmax(1) == torch.arange(500)).float().mean().item())
        embeddings.append(torch.cat(both))
    cosines = (embeddings[0] * embeddings[1]).sum(1)
    assert 0.98 <= cosines.min() < 1 - 1e-5  # it is quantised
    assert recalls[0] > 0.5
    assert abs(recalls[0] - recalls[1]) <= 0.01


def test_captions_and_pictures_of_the_user_calibrate(
    tmp_path: Path, official_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "photos" / f"{index}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"none")
    (tmp_path / "texts.txt").write_text("A cat.\nA house.\nA dog on a lawn. It barks.\n")
    samples = []
    monkeypatch.setattr(openvino_conversion, "_quantize", lambda *given: samples.append(given[-1]) or 1 / 0)
    for tower in ("text", "vision"):
        with pytest.raises(ZeroDivisionError):
            convert(
                official_checkpoint,
                tmp_path / "int8",
                quantize="int8",
                texts=tmp_path / "texts.txt",
                images=tmp_path / "photos",
                towers=(tower,),
            )
    assert [len(one) for one in samples] == [2, 3]  # the second is held out, the broken one skipped
    assert samples[0][1][0].shape[1] > samples[0][0][0].shape[1]  # no padding
    assert not (tmp_path / "int8").exists()


# Refused: nothing is written


def test_a_graph_that_differs_is_refused(
    tmp_path: Path, official_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = openvino_conversion._export

    def changed(module: Any, *arguments: Any) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.01)
        export(module, *arguments)

    monkeypatch.setattr(openvino_conversion, "_export", changed)
    with pytest.raises(ConversionError, match=r"vision_model\.xml"):
        convert(official_checkpoint, tmp_path / "openvino", towers=("vision",))
    assert not (tmp_path / "openvino").exists()


def test_wrong_arguments(tmp_path: Path, official_checkpoint: Path) -> None:
    model = LoTLIPTextModelWithProjection(tiny.text_config(num_hidden_layers=1, projection_dim=24))
    model.save_pretrained(tmp_path / "tower")
    (tmp_path / "one.txt").write_text("A cat.\n")
    for checkpoint, options, message in (
        (official_checkpoint, {"quantize": "int4"}, "--quantize"),
        (official_checkpoint, {"texts": tmp_path / "one.txt"}, "--quantize"),
        (official_checkpoint, {"quantize": "int8", "texts": tmp_path / "one.txt"}, "--texts"),
        (tmp_path / "tower", {"quantize": "int8"}, "tokenizer"),
        (tmp_path / "tower", {"towers": ("vision",)}, "vision"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(checkpoint, tmp_path / "openvino", **options)
    assert not (tmp_path / "openvino").exists()


def test_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO and NNCF report their use by default."""
    looked_up = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **_: looked_up.append(given) or [])
    LoTLIPModel(tiny.config(num_hidden_layers=1)).save_pretrained(tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "openvino", towers=("text",))
    assert looked_up == []
