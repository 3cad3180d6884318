"""The towers over CLIP: without corner tokens they are stock CLIP, with them every text token's state still is."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, CLIPConfig, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

import tiny
from lotlip_hf import (
    LoTLIPConfig,
    LoTLIPModel,
    LoTLIPTextConfig,
    LoTLIPTextModel,
    LoTLIPTextModelWithProjection,
    LoTLIPVisionConfig,
    from_backbones,
)
from lotlip_hf.diffusion.stretch import clip_text_model, stretch_positions, stretch_text_model

BOS, EOS, LENGTH = 97, 98, 20
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def spread(model: nn.Module) -> Any:
    """Weights large enough that attention, positions and corner tokens matter to the outputs."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def clip_model(eos_token_id: int = EOS) -> CLIPModel:
    text = {**tiny.TEXT_SIZE, "max_position_embeddings": LENGTH, "bos_token_id": BOS, "eos_token_id": eos_token_id}
    vision = {**tiny.IMAGE_SIZE, "hidden_size": 40}
    return spread(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)))


def lotlip_of(clip: CLIPModel, num_corner_tokens: int = 2) -> LoTLIPModel:
    config = LoTLIPConfig(
        text_config=LoTLIPTextConfig(
            backbone_config=clip.config.text_config.to_dict(), num_corner_tokens=num_corner_tokens, projection_dim=24
        ),
        vision_config=LoTLIPVisionConfig(
            backbone_config=clip.config.vision_config.to_dict(), pooling="pooler", projection_dim=24
        ),
    )
    model = spread(LoTLIPModel(config))
    for ours, theirs in (
        (model.text_model.backbone, clip.text_model),
        (model.vision_model.backbone, clip.vision_model),
        (model.text_projection, clip.text_projection),
        (model.visual_projection, clip.visual_projection),
    ):
        ours.load_state_dict(theirs.state_dict())
    model.logit_scale.data.copy_(clip.logit_scale.data)
    return model


def texts(*lengths: int, length: int = LENGTH, pad_token_id: int = EOS) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of texts of so many tokens, the first and the last included."""
    ids = torch.randint(0, BOS, (len(lengths), length))
    mask = torch.zeros_like(ids)
    for row, end in enumerate(lengths):
        ids[row, 0], ids[row, end - 1], ids[row, end:], mask[row, :end] = BOS, EOS, pad_token_id, 1
    return ids, mask


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("with_corners", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(("eos_token_id", "pad_token_id"), [(EOS, EOS), (EOS, 0), (2, EOS)])
def test_every_output_is_clips(
    eos_token_id: int, pad_token_id: int, with_mask: bool, with_corners: bool, attention: str
) -> None:
    """With padding by [EOT] or by "!" (SD 2.x), and with the wrong [EOT] of old configurations."""
    clip = clip_model(eos_token_id)
    model = lotlip_of(clip)
    for one in (clip, model):
        one.set_attn_implementation(attention)
    ids, mask = texts(LENGTH, 3, 9, 2, pad_token_id=pad_token_id)
    arguments = {"attention_mask": mask if with_mask else None, "output_hidden_states": True}
    arguments["output_attentions"] = attention == "eager"
    with torch.no_grad():
        expected = clip.text_model(ids, **arguments)
        answer = model.text_model(ids, output_corner_embeds=with_corners, **arguments)
        features = clip.get_text_features(ids, attention_mask=arguments["attention_mask"]).pooler_output
        ours = model.get_text_features(ids, attention_mask=arguments["attention_mask"]).pooler_output
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(answer[name], expected[name], **TOLERANCE)
    for name in ("hidden_states", "attentions"):
        torch.testing.assert_close(answer.get(name), expected.get(name), **TOLERANCE)
    torch.testing.assert_close(ours, features, **TOLERANCE)
    assert (answer.corner_embeds is not None) == with_corners


def test_the_whole_model_is_clip() -> None:
    clip = clip_model()
    model, images = lotlip_of(clip), tiny.pixel_values()
    ids, mask = texts(LENGTH, 5, 11)
    with torch.no_grad():
        expected = clip(ids, images, mask, return_loss=True)
        answer = model(ids, images, mask, return_loss=True)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds", "loss"):
        torch.testing.assert_close(answer[name], expected[name], rtol=1e-5, atol=1e-5)


def naive_corners(model: LoTLIPTextModel, ids: torch.Tensor, end: int) -> torch.Tensor:
    """The corner tokens of one text [1, L] whose [EOT] is at `end`, each in a sequence of its own: what stands before
    [EOT], and itself."""
    backbone = model.backbone
    words = backbone.embeddings(ids[:, :end])
    states = []
    for corner in model.corner_embeds:
        sequence = torch.cat([words, corner.expand(1, 1, -1)], dim=1)
        allowed = torch.ones(end + 1, end + 1).tril().bool()
        hidden = sequence
        for layer in backbone.encoder.layers:
            mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
            hidden = layer(hidden, mask)
        states.append(backbone.final_layer_norm(hidden)[:, -1])
    return torch.stack(states, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_corner_tokens_see_all_before_the_end_and_themselves(
    attention: str, with_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.leave_flex_attention_uncompiled(monkeypatch)
    model = spread(LoTLIPTextModel(clip_text_config()))
    model.set_attn_implementation("eager")
    ids, mask = texts(LENGTH, 3, 9)
    with torch.no_grad():
        expected = torch.cat([naive_corners(model, ids[[row]], end - 1) for row, end in enumerate((LENGTH, 3, 9))])
        model.set_attn_implementation(attention)
        answer = model(ids, attention_mask=mask if with_mask else None, output_corner_embeds=True)
    torch.testing.assert_close(answer.corner_embeds, expected, **TOLERANCE)
    assert torch.pdist(answer.corner_embeds[0]).min() > 1e-2


def clip_text_config(**kwargs: Any) -> LoTLIPTextConfig:
    backbone = clip_model().config.text_config.to_dict()
    return LoTLIPTextConfig(backbone_config=backbone, **{"projection_dim": 24, **kwargs})


@pytest.mark.parametrize("with_corners", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [7, LENGTH + 5])
def test_padding_does_not_matter(length: int, side: str, with_corners: bool) -> None:
    """Also on the left, where stock CLIP would count the padding's places, and beyond the positions."""
    model = spread(LoTLIPTextModelWithProjection(clip_text_config()))
    ids, _ = texts(8, length=8)
    padding = torch.full((1, length), EOS)
    longer = torch.cat([padding, ids] if side == "left" else [ids, padding], dim=1)
    mask = torch.cat([padding * 0, ids * 0 + 1] if side == "left" else [ids * 0 + 1, padding * 0], dim=1)
    with torch.no_grad():
        expected = model(ids, output_corner_embeds=with_corners)
        answer = model(longer, attention_mask=mask, output_corner_embeds=with_corners)
        words = model.get_input_embeddings()(longer)
        embedded = model(inputs_embeds=words, attention_mask=mask, output_corner_embeds=with_corners)
    for one in (answer, embedded):
        torch.testing.assert_close(one.text_embeds, expected.text_embeds, **TOLERANCE)
        if with_corners:
            torch.testing.assert_close(one.corner_embeds, expected.corner_embeds, **TOLERANCE)


def test_training_moves_the_corner_tokens() -> None:
    model, images = lotlip_of(clip_model()).train(), tiny.pixel_values(2)
    (short, short_mask), (long, long_mask) = texts(4, 6, length=6), texts(LENGTH, 9, 12, 20)
    outputs = model(
        short,
        images,
        short_mask,
        return_loss=True,
        long_input_ids=long.unflatten(0, (2, 2)),
        long_attention_mask=long_mask.unflatten(0, (2, 2)),
    )
    outputs.loss.backward()
    assert outputs.corner_embeds.shape == (2, 2, 2, 24)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in [model.text_model.corner_embeds])
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without


@pytest.mark.parametrize("padding", [0, 4])
def test_a_model_saved_is_the_model_loaded(padding: int, tmp_path: Any) -> None:
    model = lotlip_of(clip_model())
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids, mask = texts(LENGTH - padding)
    with torch.no_grad():
        expected = model.get_text_features(ids, mask).pooler_output
        torch.testing.assert_close(loaded.get_text_features(ids, mask).pooler_output, expected, **TOLERANCE)
    text = LoTLIPTextModelWithProjection.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(text(ids, mask).text_embeds, expected, **TOLERANCE)


def test_from_backbones_takes_clips_towers(tmp_path: Any) -> None:
    clip = clip_model()
    clip.save_pretrained(tmp_path)
    ids, mask = texts(9)
    for source in (clip, tmp_path):
        model = from_backbones(source, source, num_corner_tokens=3).eval()
        assert model.config.text_config.pooling == "eos"
        assert model.config.text_config.max_position_embeddings == LENGTH
        with torch.no_grad():
            expected = clip.text_model(ids, mask).pooler_output
            torch.testing.assert_close(model.text_model(ids, mask).pooler_output, expected, **TOLERANCE)


def test_a_live_models_configuration_is_copied() -> None:
    """Building another model of it would reset its attention implementation."""
    clip = clip_model()
    ids, mask = texts(9)
    with torch.no_grad():
        expected = clip.text_model(ids, mask).pooler_output
        text = LoTLIPTextConfig(backbone_config=clip.config.text_config, projection_dim=24)
        tower = LoTLIPTextModel(text)
        answer = tower.eval()(ids, mask).pooler_output
        LoTLIPModel(LoTLIPConfig(text_config=tower.config, vision_config=tiny.vision_config()))
        torch.testing.assert_close(clip.text_model(ids, mask).pooler_output, expected, **TOLERANCE)
        torch.testing.assert_close(tower(ids, mask).pooler_output, answer, **TOLERANCE)


@pytest.mark.parametrize(("backbone", "pooling"), [("clip", "cls"), ("bert", "eos")])
def test_pooling_that_does_not_go_with_the_backbone(backbone: str, pooling: str) -> None:
    with pytest.raises(Exception, match="eos"):
        tiny.text_config(backbone, pooling=pooling)


def test_wrong_input_is_named() -> None:
    model = spread(LoTLIPTextModel(clip_text_config()))
    ids, _ = texts(LENGTH + 1, length=LENGTH + 1)
    with pytest.raises(ValueError, match="truncation=True"):
        model(ids)
    with pytest.raises(ValueError, match="token_type_ids"):
        model(ids[:, :5], token_type_ids=torch.ones(1, 5, dtype=torch.long))


# Positions


def long_clip_table(positions: torch.Tensor) -> torch.Tensor:
    """Long-CLIP's recipe, one position after another: 77 become 248."""
    kept, count = 20, len(positions)
    table = torch.zeros(4 * count - 3 * kept, positions.shape[1])
    table[:kept] = positions[:kept]
    for row in range(kept, count):
        step = (positions[row + 1] if row + 1 < count else 2 * positions[row] - positions[row - 1]) - positions[row]
        for quarter in range(4):
            table[kept + 4 * (row - kept) + quarter] = positions[row] + quarter / 4 * step
    return table


def test_knowledge_preserved_stretching_is_long_clips() -> None:
    positions = torch.randn(77, 16)
    table = stretch_positions(positions, 248)
    torch.testing.assert_close(table, long_clip_table(positions), **TOLERANCE)
    assert torch.equal(table[:20], positions[:20])


@pytest.mark.parametrize("max_positions", [78, 128, 300])
def test_linear_stretching_keeps_a_straight_line(max_positions: int) -> None:
    line = torch.arange(77.0).unsqueeze(1) * torch.tensor([1.0, -2.0])
    table = stretch_positions(line, max_positions, "linear")
    expected = torch.arange(max_positions).unsqueeze(1) * 77 / max_positions * torch.tensor([1.0, -2.0])
    torch.testing.assert_close(table, expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(stretch_positions(line, 77, "linear"), line)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((torch.ones(77, 4), 76), "max_positions"),
        ((torch.ones(21, 4), 40), "22"),
        ((torch.ones(77, 4), 80, "cubic"), "cubic"),
    ],
)
def test_stretching_refuses(arguments: tuple, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        stretch_positions(*arguments)


@pytest.mark.parametrize("kind", ["stock", "stock with projection", "tower", "tower with projection", "whole"])
def test_a_stretched_model_takes_long_texts_and_saves(kind: str, tmp_path: Any) -> None:
    backbone = {**clip_model().config.text_config.to_dict(), "max_position_embeddings": 30}
    config = LoTLIPTextConfig(backbone_config=backbone, projection_dim=24)
    model = {
        "stock": lambda: CLIPTextModel(config.backbone_config),
        "stock with projection": lambda: CLIPTextModelWithProjection(config.backbone_config),
        "tower": lambda: LoTLIPTextModel(config),
        "tower with projection": lambda: LoTLIPTextModelWithProjection(config),
        "whole": lambda: LoTLIPModel(LoTLIPConfig(text_config=config, vision_config=tiny.vision_config())),
    }[kind]()
    spread(model)
    run = model.get_text_features if kind == "whole" else model
    (ids, mask), (long_ids, long_mask) = texts(15), texts(50, length=50)
    with torch.no_grad():
        before = run(ids, mask).last_hidden_state
        stretch_text_model(model, 50)
        torch.testing.assert_close(
            run(ids, mask).last_hidden_state, before, **TOLERANCE
        )  # the first 20 positions stay
        after = run(long_ids, long_mask).last_hidden_state
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    run = loaded.get_text_features if kind == "whole" else loaded
    with torch.no_grad():
        torch.testing.assert_close(run(long_ids, long_mask).last_hidden_state, after, **TOLERANCE)


def test_a_stock_text_model_out_of_ours() -> None:
    model = lotlip_of(clip_model())
    ids, mask = texts(LENGTH, 4)
    plain, projected = clip_text_model(model), clip_text_model(model, with_projection=True)
    assert (type(plain), type(projected)) == (CLIPTextModel, CLIPTextModelWithProjection)
    with torch.no_grad():
        ours = model.get_text_features(ids, mask)
        torch.testing.assert_close(plain(ids, mask).last_hidden_state, ours.last_hidden_state, **TOLERANCE)
        torch.testing.assert_close(projected(ids, mask).text_embeds, ours.pooler_output, **TOLERANCE)
    with pytest.raises(ValueError, match="BertModel"):
        clip_text_model(LoTLIPTextModel(tiny.text_config()))


def test_what_is_frozen_stays_so() -> None:
    model = lotlip_of(clip_model())
    model.text_model.backbone.encoder.requires_grad_(False)
    stock = clip_text_model(model, with_projection=True)
    frozen = {name for name, parameter in stock.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in stock.named_parameters() if name.startswith("text_model.encoder.")}


# CLIP's names, where other tools have CLIP

TEXT_NAMES = ("embeddings", "encoder", "final_layer_norm")
VISION_NAMES = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")


@pytest.mark.parametrize(
    "again", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_clips_names_are_found(again: Callable[[LoTLIPModel], LoTLIPModel]) -> None:
    model = again(LoTLIPModel(tiny.config("clip", "clip")))
    for tower, names in ((model.text_model, TEXT_NAMES), (model.vision_model, VISION_NAMES)):
        for name in names:
            assert getattr(tower, name) is getattr(tower.backbone, name)
    names = [name for name, _ in model.named_modules()]
    assert len(names) == len(set(names))
    assert not any(name.split(".")[1] != "backbone" for name in names if name.startswith("vision_model."))
    assert {name.split(".")[1] for name in model.state_dict() if name.startswith("text_model.")} == {
        "backbone",
        "corner_embeds",
    }


@pytest.mark.parametrize(("text", "vision"), [("bert", "vit"), ("roberta", "dinov2"), ("xlm-roberta", "siglip")])
def test_other_backbones_have_their_own_names(text: str, vision: str) -> None:
    model = LoTLIPModel(tiny.config(text, vision))
    for tower, other in ((model.text_model, "final_layer_norm"), (model.vision_model, "pre_layrnorm")):
        for name, module in tower.backbone.named_children():
            assert getattr(tower, name) is module
        with pytest.raises(AttributeError, match=f"{type(tower).__name__}.*{other}"):
            getattr(tower, other)
        assert not hasattr(tower, "nothing")


def test_grad_cam_hooks_a_layer_by_clips_name() -> None:
    """As grad-cam does it in its example of CLIP: the layer's output and its gradient, of an image's probability."""
    model = LoTLIPModel(tiny.config("clip", "clip")).eval()
    (layer,) = [model.vision_model.encoder.layers[-1].layer_norm1]
    seen: dict[str, torch.Tensor] = {}

    def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen["activations"] = output.detach()
        output.register_hook(lambda gradient: seen.__setitem__("gradients", gradient))

    handle = layer.register_forward_hook(hook)
    outputs = model(tiny.input_ids(2, 8), tiny.pixel_values(1))
    outputs.logits_per_image.softmax(dim=1)[0, 0].backward()
    handle.remove()
    patches = (tiny.IMAGE_SIZE["image_size"] // tiny.IMAGE_SIZE["patch_size"]) ** 2
    assert seen["activations"].shape == seen["gradients"].shape == (1, 1 + patches, tiny.SIZE["hidden_size"])
    assert seen["gradients"].abs().sum() > 0


@pytest.mark.parametrize(
    ("config_class", "backbone", "fields"),
    [
        (LoTLIPTextConfig, "clip", {"layer_norm_eps": 0.125, "hidden_act": "gelu", "attention_dropout": 0.5}),
        (LoTLIPVisionConfig, "clip", {"layer_norm_eps": 0.125, "hidden_act": "gelu", "attention_dropout": 0.5}),
        (LoTLIPTextConfig, "bert", {"layer_norm_eps": 0.125, "hidden_act": "relu", "type_vocab_size": 3}),
        (LoTLIPVisionConfig, "dinov2", {"layer_norm_eps": 0.125, "hidden_act": "relu", "use_swiglu_ffn": True}),
    ],
)
def test_a_configuration_gives_back_what_it_takes(config_class: type, backbone: str, fields: dict[str, Any]) -> None:
    make = tiny.text_config if config_class is LoTLIPTextConfig else tiny.vision_config
    plain, given, changed = make(backbone), make(backbone, **fields), make(backbone)
    for name, value in fields.items():
        assert getattr(plain, name) == getattr(plain.backbone_config, name) != value
        setattr(changed, name, value)
    for config in (given, changed, copy.deepcopy(given), config_class.from_dict(given.to_dict())):
        assert {name: getattr(config, name) for name in fields} == fields
        assert config.to_dict() == given.to_dict()
        assert not fields.keys() & config.to_dict().keys()  # their home is the backbone's configuration
    with pytest.raises(AttributeError, match=f"{config_class.__name__}.*nothing"):
        plain.nothing  # noqa: B018
