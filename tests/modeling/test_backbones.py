"""A family and a pooling of a user's own, added in one line each; and towers that compute some patches alone."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel

import tiny
import tiny_rotary
from lotlip_hf import LoTLIPConfig, LoTLIPModel, LoTLIPTextConfig, LoTLIPTextModel, LoTLIPVisionModel, from_backbones
from lotlip_hf.modeling.backbones_lotlip import POOLINGS, TEXT_BACKBONES

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
EXACT = {"rtol": 1e-6, "atol": 1e-6}
PATCHES = 16


def spread(model: nn.Module) -> Any:
    """Weights large enough that attention, positions and corner tokens matter to the outputs."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    tiny_rotary.register()
    POOLINGS["max"] = largest
    yield
    del TEXT_BACKBONES["tiny_rotary"], POOLINGS["max"]


def largest(states: torch.Tensor, mask: torch.Tensor | None, index: torch.Tensor | None) -> torch.Tensor:
    return (states if mask is None else states.masked_fill(~mask.bool().unsqueeze(-1), -torch.inf)).amax(1)


def rotary_config(**kwargs: Any) -> LoTLIPTextConfig:
    return LoTLIPTextConfig(backbone_config=tiny_rotary.TinyRotaryConfig(), **{"projection_dim": 24, **kwargs})


def padded_ids(*lengths: int, side: str = "right") -> torch.Tensor:
    rows = [nn.functional.pad(tiny.input_ids(1, n), (0, 12 - n) if side == "right" else (12 - n, 0)) for n in lengths]
    return torch.cat(rows)


# A text encoder with rotary positions, whose layers are of two types


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_text_does_not_see_corner_tokens(pooling: str) -> None:
    model = spread(LoTLIPTextModel(rotary_config(pooling=pooling)))
    ids = tiny.input_ids(3, 9)
    with torch.no_grad():
        without, answer = model(ids), model(ids, output_corner_embeds=True)
    torch.testing.assert_close(answer.last_hidden_state, without.last_hidden_state, **TOLERANCE)
    torch.testing.assert_close(answer.pooler_output, without.pooler_output, **TOLERANCE)
    assert answer.corner_embeds.shape == (3, 2, 32)
    assert torch.pdist(answer.corner_embeds[0]).min() > 1e-2


def test_corner_tokens_follow_the_rule_in_layers_of_every_type() -> None:
    """The masks and positions written out."""
    model, ids, m = spread(LoTLIPTextModel(rotary_config())), tiny.input_ids(3, 9), 2
    text, corner = torch.arange(9 + m) < 9, torch.arange(9 + m) >= 9
    full = text.expand(9 + m, -1).clone()
    full[corner, 0] = False  # a corner token does not see [CLS]
    full.fill_diagonal_(True)
    distance = (torch.arange(9 + m)[:, None] - torch.arange(9 + m)).abs()
    sliding = full & ((distance <= model.backbone.config.sliding_window) | corner[:, None])
    words = model.get_input_embeddings()(ids)
    with torch.no_grad():
        stock = model.backbone(
            inputs_embeds=torch.cat([words, model.corner_embeds.expand(3, -1, -1)], dim=1),
            attention_mask={
                "full_attention": full.expand(3, 1, -1, -1),
                "sliding_attention": sliding.expand(3, 1, -1, -1),
            },
            position_ids=torch.tensor([0, *range(m + 1, m + 9), *range(1, m + 1)]).expand(3, -1),
        ).last_hidden_state
        answer = model(ids, output_corner_embeds=True)
    torch.testing.assert_close(answer.last_hidden_state, stock[:, :9], **TOLERANCE)
    torch.testing.assert_close(answer.corner_embeds, stock[:, 9:], **TOLERANCE)
    assert model.config.max_position_embeddings == 38


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "unpadded"])
def test_attention_implementations_agree(attention: str, side: str) -> None:
    model = spread(LoTLIPTextModel(rotary_config()))
    ids = padded_ids(12, 7, 4, side=side)
    with torch.no_grad():
        expected = model(ids, output_corner_embeds=True)
        model.set_attn_implementation(attention)
        answer = model(ids, output_corner_embeds=True, pooled_only=True)
        alone = model(ids[[2]][:, :4] if side == "right" else ids[[2]][:, 8:], output_corner_embeds=True)
    for name in ("pooler_output", "corner_embeds"):
        torch.testing.assert_close(answer[name], expected[name], **TOLERANCE)
        torch.testing.assert_close(answer[name][2:], alone[name], **TOLERANCE)


def test_a_causal_family_puts_corner_tokens_behind_the_text() -> None:
    """Their positions follow the text's, and the pooled token is the last."""

    class Decoder(type(TEXT_BACKBONES["tiny_rotary"])):
        is_causal = True

    family, mask = Decoder(), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    config = rotary_config().backbone_config
    assert family.pooled_index(config, mask, None).tolist() == [3, 1]
    positions = family.count_positions(config, mask)
    backbone = AutoModel.from_config(config)
    inputs = family.embed(backbone, torch.zeros(2, 4, 32), positions, 2, torch.ones(2, 32))
    assert inputs["position_ids"].tolist() == [[0, 0, 1, 2, 3, 4], [0, 1, 1, 1, 2, 3]]
    assert inputs["inputs_embeds"].shape == (2, 6, 32)
    assert family.max_length(config, 2) == 38


@pytest.mark.parametrize("pooling", ["mean", "max", None])
def test_it_is_saved_loaded_and_trained(pooling: str | None, tmp_path: Path) -> None:
    config = LoTLIPConfig(
        text_config=rotary_config(pooling=pooling), vision_config=tiny.vision_config(), projection_dim=24
    )
    model = spread(LoTLIPModel(config)).train()
    ids, images = torch.stack([tiny.input_ids(3, 8)] * 3, dim=1), tiny.pixel_values()
    model(ids + 0, images, return_loss=True).loss.backward()
    assert model.text_model.corner_embeds.grad.abs().max() > 0
    model.eval().save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.text_config.pooling == (pooling or "mean")
    with torch.no_grad():
        expected, answer = model(ids[:, 0], images), loaded(ids[:, 0], images)
    torch.testing.assert_close(answer.logits_per_image, expected.logits_per_image, **TOLERANCE)


def test_from_backbones(tmp_path: Path) -> None:
    text = spread(tiny_rotary.TinyRotaryModel(tiny_rotary.TinyRotaryConfig()))
    text.save_pretrained(tmp_path)
    vision = AutoModel.from_config(tiny.vision_config().backbone_config)
    for source in (text, tmp_path):
        model = from_backbones(source, vision, num_corner_tokens=0).eval()
        assert model.config.text_config.pooling == "mean"
        ids = tiny.input_ids(2, 9)
        with torch.no_grad():
            expected = text(ids).last_hidden_state.mean(1)
            torch.testing.assert_close(model.text_model(ids).pooler_output, expected, **TOLERANCE)


@pytest.mark.parametrize("pooling", ["pooler", "eos", "nothing"])
def test_poolings_without_sense_are_refused(pooling: str) -> None:
    with pytest.raises(Exception, match="pooling"):
        rotary_config(pooling=pooling)


# A pooling of one's own


@pytest.mark.parametrize("backbone", ["bert", "roberta"])
def test_a_pooling_of_texts(backbone: str) -> None:
    model = spread(LoTLIPTextModel(tiny.text_config(backbone, pooling="max")))
    ids = padded_ids(12, 7, 4)
    ids[ids == 0] = model.config.pad_token_id
    with torch.no_grad():
        answer = model(ids, output_corner_embeds=True, pooled_only=True)
    for row, length in enumerate((12, 7, 4)):
        expected = answer.last_hidden_state[row, :length].amax(0)
        torch.testing.assert_close(answer.pooler_output[row], expected, **TOLERANCE)
    assert model.backbone.pooler is None


@pytest.mark.parametrize("backbone", tiny.VISION_BACKBONES)
def test_a_pooling_of_images(backbone: str) -> None:
    model = spread(LoTLIPVisionModel(tiny.vision_config(backbone, pooling="max")))
    with torch.no_grad():
        answer = model(tiny.pixel_values(), pooled_only=True)
    torch.testing.assert_close(answer.pooler_output, answer.last_hidden_state[:, -PATCHES:].amax(1), **TOLERANCE)


# Patches that are kept

POOLED = [(name, pooling) for name in tiny.VISION_BACKBONES for pooling in ("pooler", "mean")]
POOLED += [("vit", "cls"), ("dinov2", "cls")]


def vision_model(backbone: str, pooling: str) -> LoTLIPVisionModel:
    return spread(LoTLIPVisionModel(tiny.vision_config(backbone, pooling=pooling)))


def naive(model: LoTLIPVisionModel, images: torch.Tensor, kept: torch.Tensor, **options: Any) -> Any:
    """The stock encoder, whose embeddings are gathered by a hook."""
    stock = copy.deepcopy(model)
    prefix = 0 if model.config.backbone_config.model_type.startswith("siglip") else 1

    def gather(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        rows = [torch.cat([row[:prefix], row[prefix:][index]]) for row, index in zip(output, kept, strict=True)]
        return torch.stack(rows)

    stock.backbone.embeddings.register_forward_hook(gather)
    return stock(images, **options)


@pytest.mark.parametrize(("backbone", "pooling"), POOLED)
@pytest.mark.parametrize("pooled_only", [False, True])
def test_kept_patches_are_those_of_the_stock_encoder(backbone: str, pooling: str, pooled_only: bool) -> None:
    model, images = vision_model(backbone, pooling), tiny.pixel_values()
    kept = torch.stack([torch.randperm(PATCHES)[:5] for _ in range(3)])
    expected = naive(model, images, kept, output_hidden_states=not pooled_only)
    answer = model(images, kept_patches=kept, pooled_only=pooled_only, output_hidden_states=not pooled_only)
    torch.testing.assert_close(answer.pooler_output, expected.pooler_output, **EXACT)
    if not pooled_only:
        torch.testing.assert_close(answer.last_hidden_state, expected.last_hidden_state, **EXACT)
        torch.testing.assert_close(answer.hidden_states, expected.hidden_states, **EXACT)
    answer.pooler_output.square().sum().backward()
    gradient = model.backbone.get_input_embeddings()
    assert any(parameter.grad.abs().max() > 0 for parameter in gradient.parameters())
    if pooling == "mean":
        mean = expected.last_hidden_state[:, -5:].mean(1)
        torch.testing.assert_close(answer.pooler_output, mean, **EXACT)


@pytest.mark.parametrize(("backbone", "pooling"), POOLED)
def test_all_patches_in_order_are_the_plain_tower(backbone: str, pooling: str) -> None:
    model, images = vision_model(backbone, pooling), tiny.pixel_values()
    everything = torch.arange(PATCHES).expand(3, -1)
    assert model.config.num_patches == PATCHES
    with torch.no_grad():
        expected, answer = model(images), model(images, kept_patches=everything)
    assert torch.equal(answer.pooler_output, expected.pooler_output)
    assert torch.equal(answer.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("backbone", tiny.VISION_BACKBONES)
def test_kept_patches_of_other_image_sizes_and_in_the_whole_model(backbone: str) -> None:
    model = spread(LoTLIPModel(tiny.config(vision_backbone=backbone)))
    images, kept = torch.randn(3, 3, 48, 64), torch.tensor([[47, 3], [0, 20], [9, 8]])
    with torch.no_grad():
        expected = naive(model.vision_model, images, kept, interpolate_pos_encoding=True).pooler_output
        expected = model.visual_projection(expected)
        options = {"interpolate_pos_encoding": True, "kept_patches": kept}
        answer = model.get_image_features(images, **options).pooler_output
        whole = model(tiny.input_ids(3, 8), images, **options, pooled_only=True)
    torch.testing.assert_close(answer, expected, **EXACT)
    torch.testing.assert_close(whole.image_embeds, nn.functional.normalize(expected, dim=-1), **EXACT)
    assert whole.logits_per_image is whole.logits_per_text is None


@pytest.mark.parametrize("index", [-1, PATCHES])
def test_patches_beyond_the_image_are_refused_and_nothing_is_left_behind(index: int) -> None:
    model, images = vision_model("vit", "cls"), tiny.pixel_values()
    expected = model(images).pooler_output
    with pytest.raises(ValueError, match="kept_patches"):
        model(images, kept_patches=torch.full((3, 2), index))
    assert torch.equal(model(images).pooler_output, expected)


def test_threads_do_not_mix_their_patches() -> None:
    model, images = vision_model("clip", "pooler"), tiny.pixel_values()
    choices = [None, *torch.stack([torch.randperm(PATCHES)[:4] for _ in range(9)]).view(3, 3, 4)]
    with torch.no_grad():
        expected = [model(images, kept_patches=kept).pooler_output for kept in choices]
    answers: list[list[torch.Tensor]] = [[] for _ in choices]

    def work(number: int) -> None:
        with torch.no_grad():
            answers[number] += [model(images, kept_patches=choices[number]).pooler_output for _ in range(10)]

    threads = [Thread(target=work, args=(number,)) for number in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, answer in enumerate(answers):
        assert len(answer) == 10
        torch.testing.assert_close(torch.stack(answer), expected[number].expand(10, -1, -1), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", tiny.VISION_BACKBONES)
def test_kept_patches_compile_without_graph_breaks(backbone: str) -> None:
    model, images = pickle.loads(pickle.dumps(vision_model(backbone, "pooler"))), tiny.pixel_values()
    kept = torch.stack([torch.randperm(PATCHES)[:5] for _ in range(3)])
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(images, kept_patches=kept, pooled_only=True).pooler_output
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(
            compiled(images, kept_patches=kept, pooled_only=True).pooler_output, expected, **EXACT
        )
