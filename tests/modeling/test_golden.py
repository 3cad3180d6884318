"""Parity with what the official code answered (tests/golden), through conversion and `AutoModel`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from lotlip_hf import LoTLIPModel, LoTLIPTextModelWithProjection, LoTLIPVisionModelWithProjection
from lotlip_hf.conversion.official import convert, official_layout
from lotlip_hf.modeling.backbones_lotlip import TEXT_BACKBONES
from lotlip_hf.modeling.masking_lotlip import create_corner_mask

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
WORDS = "text.transformer.embeddings.word_embeddings.weight"


class Official:
    """One golden folder: its converted checkpoint and the answers of the official code."""

    def __init__(self, folder: Path, tokenizer: Path, output: Path) -> None:
        text_cfg = json.loads((folder / "open_clip_config.json").read_text())["text_cfg"]
        self.num_corner_tokens = text_cfg["num_corner_token"]
        self.expected = load_file(folder / "expected.safetensors")
        self.checkpoint = convert(folder / "model.pt", folder / "open_clip_config.json", tokenizer, output)
        self.model = AutoModel.from_pretrained(self.checkpoint).eval()

    def without_corners(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The official code keeps the corner tokens behind [CLS]; here they are no part of the text."""
        places = [0, *range(1 + self.num_corner_tokens, tensor.shape[dim])]
        return tensor.index_select(dim, torch.tensor(places))

    def input_ids(self, name: str) -> torch.Tensor:
        return self.without_corners(self.expected[f"{name}_input_ids"], -1)


@pytest.fixture(scope="module", params=["official-corners2", "official-corners0"])
def official(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Official:
    return Official(golden / request.param, golden / "tokenizer", tmp_path_factory.mktemp("golden") / "checkpoint")


def test_the_files_hold_nothing_untested(official: Official) -> None:
    texts = ("input_ids", "attention_mask", "last_hidden_state", "all_features", "text_features")
    tested = {f"{name}_{key}" for name in ("short", "long") for key in (*texts, "text_features_normalized")}
    tested |= {"multi_input_ids", "multi_text_features", "multi_image_features", "logit_scale_exp", "pixel_values"}
    tested |= {"image_last_hidden_state", "image_features"}
    tested |= {"loss_short", "loss_long", "loss_total", "loss_single_long"}
    tested |= {f"gradnorm.{name}" for name in official_layout(official.model)}
    assert set(official.expected) == tested


def test_images(official: Official) -> None:
    with torch.no_grad():
        outputs = official.model.get_image_features(official.expected["pixel_values"])
    torch.testing.assert_close(outputs.last_hidden_state, official.expected["image_last_hidden_state"], **TOLERANCE)
    torch.testing.assert_close(outputs.pooler_output, official.expected["image_features"], **TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("with_corners", [True, False])
@pytest.mark.parametrize("name", ["short", "long"])
def test_texts(official: Official, name: str, with_corners: bool, attention: str) -> None:
    official.model.set_attn_implementation(attention)
    ids = official.input_ids(name)
    with torch.no_grad():
        outputs = official.model.get_text_features(ids, output_corner_embeds=with_corners)
    expected = official.without_corners(official.expected[f"{name}_last_hidden_state"], 1)
    is_text = ids != 0
    torch.testing.assert_close(outputs.last_hidden_state[is_text], expected[is_text], **TOLERANCE)
    torch.testing.assert_close(outputs.pooler_output, official.expected[f"{name}_text_features"], **TOLERANCE)
    torch.testing.assert_close(
        torch.nn.functional.normalize(outputs.pooler_output, dim=-1),
        official.expected[f"{name}_text_features_normalized"],
        **TOLERANCE,
    )
    features = outputs.pooler_output.unsqueeze(1)
    if with_corners and official.num_corner_tokens:
        features = torch.cat([features, outputs.corner_embeds], dim=1)
        torch.testing.assert_close(features, official.expected[f"{name}_all_features"], **TOLERANCE)
    else:
        assert outputs.corner_embeds is None


@pytest.mark.parametrize("name", ["short", "long"])
def test_attention_mask(official: Official, name: str) -> None:
    """The official mask, 0 and 1 over [queries, keys] (over keys alone without corners), against the model's."""
    mask, ids = official.expected[f"{name}_attention_mask"], official.input_ids(name)
    if not official.num_corner_tokens:
        assert torch.equal(mask.bool(), ids != 0)
        return
    official.model.set_attn_implementation("sdpa")
    config, m = official.model.config.text_config.backbone_config, official.num_corner_tokens
    ours = create_corner_mask(
        TEXT_BACKBONES["bert"],
        config,
        torch.zeros(*official.expected[f"{name}_input_ids"].shape, 1),
        ids != 0,
        (ids != 0).int().argmax(-1),
    )
    # from text, corners to [CLS], corners, words
    length = ids.shape[1]
    order = torch.tensor([0, *range(length, length + m), *range(1, length)])
    ours = ours[:, 0][:, order][:, :, order]
    # what padding sees does not matter
    queries = torch.cat([torch.ones(len(ids), 1 + m, dtype=torch.bool), ids[:, 1:] != 0], dim=1)
    assert torch.equal(ours[queries], mask.bool()[queries])


def test_many_texts_an_image(official: Official) -> None:
    model = official.model.eval()
    model.set_attn_implementation("sdpa")
    model.zero_grad()
    outputs = model(official.input_ids("multi"), official.expected["pixel_values"], return_loss=True)

    long_texts = outputs.text_embeds[:, 1:].unsqueeze(2)
    if official.num_corner_tokens:
        long_texts = torch.cat([long_texts, outputs.corner_embeds[:, 1:]], dim=2)
    features = torch.cat([outputs.text_embeds[:, :1], long_texts.flatten(1, 2)], dim=1)
    torch.testing.assert_close(features, official.expected["multi_text_features"], **TOLERANCE)
    torch.testing.assert_close(outputs.image_embeds, official.expected["multi_image_features"], **TOLERANCE)
    torch.testing.assert_close(model.logit_scale.exp()[None], official.expected["logit_scale_exp"], **TOLERANCE)
    for name, value in (("short", outputs.loss_short), ("long", outputs.loss_long), ("total", outputs.loss)):
        torch.testing.assert_close(value[None], official.expected[f"loss_{name}"], **TOLERANCE)

    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, parts in official_layout(model).items():
        norm = torch.stack([gradients[part].norm() for part in parts]).norm()
        torch.testing.assert_close(norm[None], official.expected[f"gradnorm.{name}"], **TOLERANCE)


def test_one_text_an_image(official: Official) -> None:
    outputs = official.model(official.input_ids("long"), official.expected["pixel_values"], return_loss=True)
    torch.testing.assert_close(outputs.loss[None], official.expected["loss_single_long"], **TOLERANCE)


def test_each_tower_alone(official: Official) -> None:
    text_model = LoTLIPTextModelWithProjection.from_pretrained(official.checkpoint)
    vision_model = LoTLIPVisionModelWithProjection.from_pretrained(official.checkpoint)
    with torch.no_grad():
        text_embeds = text_model(official.input_ids("long")).text_embeds
        image_embeds = vision_model(official.expected["pixel_values"]).image_embeds
    torch.testing.assert_close(text_embeds, official.expected["long_text_features"], **TOLERANCE)
    torch.testing.assert_close(image_embeds, official.expected["image_features"], **TOLERANCE)


def test_auto_model_is_ours(official: Official) -> None:
    assert type(official.model) is LoTLIPModel
