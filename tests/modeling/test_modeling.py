"""The model against stock backbones and naive formulations, and its answers to wrong input."""

import copy
import inspect
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, CLIPModel
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

import tiny
from lotlip_hf import (
    LoTLIPConfig,
    LoTLIPModel,
    LoTLIPTextConfig,
    LoTLIPTextModel,
    LoTLIPTextModelWithProjection,
    LoTLIPVisionConfig,
    LoTLIPVisionModel,
    LoTLIPVisionModelWithProjection,
    from_backbones,
)
from lotlip_hf.modeling import modeling_lotlip
from lotlip_hf.modeling.backbones_lotlip import TEXT_BACKBONES
from lotlip_hf.modeling.fast_paths_lotlip import fast_options, make_row
from lotlip_hf.modeling.loss_lotlip import lotlip_loss
from lotlip_hf.modeling.masking_lotlip import create_corner_mask

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def text_model(backbone: str = "bert", **kwargs) -> LoTLIPTextModel:
    return _spread(LoTLIPTextModel(tiny.text_config(backbone, **kwargs)))


def dual_model(text_backbone: str = "bert", vision_backbone: str = "vit", **kwargs) -> LoTLIPModel:
    return _spread(LoTLIPModel(tiny.config(text_backbone, vision_backbone, **kwargs)))


def _spread(model: nn.Module) -> nn.Module:
    """Weights large enough that attention, positions and corner tokens matter to the outputs."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def offset(config: LoTLIPTextConfig) -> int:
    return config.family.position_offset(config.backbone_config)


def padded(ids: torch.Tensor, length: int, side: str, pad_token_id: int) -> torch.Tensor:
    padding = torch.full((ids.shape[0], length - ids.shape[1]), pad_token_id)
    return torch.cat([padding, ids] if side == "left" else [ids, padding], dim=1)


@pytest.fixture(params=list(tiny.TEXT_BACKBONES))
def text_backbone(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name in tiny.TEXT_BACKBONES if name != "clip"])
def bidirectional_backbone(request: pytest.FixtureRequest) -> str:
    """test_modeling_clip.py has the causal one."""
    return request.param


@pytest.fixture(params=list(tiny.VISION_BACKBONES))
def vision_backbone(request: pytest.FixtureRequest) -> str:
    return request.param


# Corner tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_mask_is_the_papers_rule(side: str) -> None:
    num_words, num_corners, length = 5, 2, 9
    ids = padded(tiny.input_ids(1, num_words), length, side, 0)
    config = tiny.text_config().backbone_config
    config._attn_implementation = "sdpa"
    mask = create_corner_mask(
        TEXT_BACKBONES["bert"],
        config,
        torch.zeros(1, length + num_corners, 1),
        ids != 0,
        (ids != 0).int().argmax(-1),
    )[0, 0]
    text = (ids[0] != 0).nonzero().flatten().tolist()
    cls, words, corners = text[0], text[1:], [length, length + 1]
    for query in text + corners:
        for key in range(length + num_corners):
            if query == key:
                allowed = True
            elif query in corners:
                allowed = key in words
            else:
                allowed = key in words or key == cls
            assert bool(mask[query, key]) == allowed, (query, key)


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_leaving_corner_tokens_out_changes_nothing(bidirectional_backbone: str, pooling: str) -> None:
    model = text_model(bidirectional_backbone, pooling=pooling)
    ids = tiny.input_ids(3, 9)
    with torch.no_grad():
        without, with_corners = model(ids), model(ids, output_corner_embeds=True)
    torch.testing.assert_close(with_corners.last_hidden_state, without.last_hidden_state, **TOLERANCE)
    torch.testing.assert_close(with_corners.pooler_output, without.pooler_output, **TOLERANCE)
    assert without.corner_embeds is None
    assert with_corners.corner_embeds.shape == (3, 2, 32)
    # the corner tokens see the words and differ from one another and from [CLS]
    features = torch.cat([with_corners.pooler_output.unsqueeze(1), with_corners.corner_embeds], dim=1)
    assert torch.pdist(features[0]).min() > 1e-2
    other = ids.clone()
    other[:, 4] = 7 + (other[:, 4] - 6) % 90
    with torch.no_grad():
        changed = model(other, output_corner_embeds=True).corner_embeds
    assert (changed - with_corners.corner_embeds).abs().amax(-1).min() > 1e-3


def test_corner_tokens_are_computed_in_training_and_on_request() -> None:
    model, ids = text_model(), tiny.input_ids(2, 6)
    assert model(ids).corner_embeds is None
    assert model.train()(ids).corner_embeds is not None
    assert model(ids, output_corner_embeds=False).corner_embeds is None
    assert text_model(num_corner_tokens=0)(ids, output_corner_embeds=True).corner_embeds is None


def test_inference_is_the_stock_backbone_with_shifted_positions(bidirectional_backbone: str) -> None:
    model = text_model(bidirectional_backbone)
    config = model.config
    ids = tiny.input_ids(3, 9)
    positions = torch.tensor([0, *range(3, 11)]) + offset(config)
    with torch.no_grad():
        stock = model.backbone(ids, position_ids=positions.expand(3, -1))
        ours = model(ids)
    torch.testing.assert_close(ours.last_hidden_state, stock.last_hidden_state, **TOLERANCE)
    torch.testing.assert_close(ours.pooler_output, stock.pooler_output, **TOLERANCE)


def test_corner_tokens_are_the_stock_backbone_with_them_behind_cls(bidirectional_backbone: str) -> None:
    """The official layout: corner tokens in memory where they are in position, the mask written out."""
    model, ids, m = text_model(bidirectional_backbone), tiny.input_ids(3, 9), 2
    words = model.get_input_embeddings()(ids)
    corners = model.corner_embeds.expand(3, -1, -1)
    allowed = torch.ones(9 + m, 9 + m, dtype=torch.bool)
    allowed[:, 1 : m + 1] = False  # no token attends to corner tokens
    allowed[1 : m + 1, 0] = False  # nor does a corner see [CLS]
    allowed.fill_diagonal_(True)
    with torch.no_grad():
        stock = model.backbone(
            inputs_embeds=torch.cat([words[:, :1], corners, words[:, 1:]], dim=1),
            attention_mask=allowed.expand(3, 1, -1, -1),
            position_ids=(torch.arange(9 + m) + offset(model.config)).expand(3, -1),
        ).last_hidden_state
        ours = model(ids, output_corner_embeds=True)
        pooled = [model.backbone.pooler(stock[:, [index]]) for index in range(m + 1)]
    text = torch.cat([stock[:, :1], stock[:, m + 1 :]], dim=1)
    torch.testing.assert_close(ours.last_hidden_state, text, **TOLERANCE)
    features = torch.cat([ours.pooler_output.unsqueeze(1), ours.corner_embeds], dim=1)
    torch.testing.assert_close(features, torch.stack(pooled, dim=1), **TOLERANCE)


def test_without_corner_tokens_it_is_the_stock_backbone(bidirectional_backbone: str) -> None:
    model = text_model(bidirectional_backbone, num_corner_tokens=0)
    ids = tiny.input_ids(3, 9)
    with torch.no_grad():
        stock, ours = model.backbone(ids), model(ids, output_hidden_states=True)
    torch.testing.assert_close(ours.last_hidden_state, stock.last_hidden_state, **TOLERANCE)
    assert ours.hidden_states[-1] is ours.last_hidden_state


# Attention implementations, precision, compilation


@pytest.mark.slow
@pytest.mark.parametrize(("side", "with_corners"), [("right", True), ("right", False), ("left", True)])
def test_attention_implementations_agree(
    text_backbone: str, side: str, with_corners: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (text_backbone, side, with_corners) != ("bert", "right", True):  # compiling takes long: once will do
        tiny.leave_flex_attention_uncompiled(monkeypatch)
    model = text_model(text_backbone)
    ids = torch.cat([padded(tiny.input_ids(1, n), 12, side, model.config.pad_token_id) for n in (12, 7, 4)])
    answers = {}
    for attention in ("eager", "sdpa", "unpadded", "flex_attention"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            answers[attention] = model(ids, output_corner_embeds=with_corners)
    for attention in ("sdpa", "unpadded", "flex_attention"):
        for name in ("pooler_output", "corner_embeds") if with_corners else ("pooler_output",):
            torch.testing.assert_close(answers[attention][name], answers["eager"][name], **TOLERANCE)


@pytest.mark.parametrize(("side", "with_corners"), [("right", True), ("right", False), ("left", True)])
def test_flex_attention_over_a_row(
    text_backbone: str, side: str, with_corners: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; here without compiling, which fails on CPUs for a row."""

    def in_a_row(family: Any, config: Any, *texts: Any) -> dict[str, Any]:
        return fast_options(family, SimpleNamespace(_attn_implementation="unpadded"), *texts)

    model = text_model(text_backbone)
    texts = [tiny.input_ids(1, n) for n in (12, 7, 4)]
    ids = torch.cat([padded(text, 12, side, model.config.pad_token_id) for text in texts])
    mask = torch.cat([padded(torch.ones_like(text), 12, side, 0) for text in texts])
    with torch.no_grad():
        expected = model(ids, mask, output_corner_embeds=with_corners)
        model.set_attn_implementation("flex_attention")
        tiny.leave_flex_attention_uncompiled(monkeypatch)
        monkeypatch.setattr(modeling_lotlip, "fast_options", in_a_row)
        rows = []
        model.backbone.register_forward_hook(lambda *call: rows.append(call[-1].last_hidden_state.shape[:2]))
        answer = model(ids, mask, output_corner_embeds=with_corners)
    m = model.config.num_corner_tokens if with_corners else 0
    assert rows == [(1, 12 + 7 + 4 + 3 * m)]
    for name in ("pooler_output", "corner_embeds") if with_corners else ("pooler_output",):
        torch.testing.assert_close(answer[name], expected[name], **TOLERANCE)


def test_flash_attention_refuses_corner_tokens_and_gets_a_padding_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn itself needs a GPU: a stand-in with its contract (a [B, L] mask or none) takes its place here."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    masks = []

    def flash(module, query, key, value, attention_mask, scaling=None, **kwargs):
        masks.append(attention_mask)
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return output.transpose(1, 2), None

    model, ids = text_model(), padded(tiny.input_ids(2, 6), 9, "right", 0)
    with torch.no_grad():
        expected = model(ids)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    assert "flash_attention_2" in ALL_MASK_ATTENTION_FUNCTIONS
    model.config._attn_implementation = "flash_attention_2"
    with torch.no_grad():
        answer = model(ids)
    torch.testing.assert_close(answer.pooler_output, expected.pooler_output, **TOLERANCE)
    assert [mask.shape for mask in masks] == [ids.shape] * 2
    with pytest.raises(ValueError, match="sdpa"):
        model(ids, output_corner_embeds=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, ids, images = dual_model(), tiny.input_ids(3, 2, 8), tiny.pixel_values()
    with torch.no_grad():
        expected = model(ids, images, return_loss=True)
        answer = model.to(dtype)(ids, images, return_loss=True)
    assert answer.text_embeds.dtype == answer.corner_embeds.dtype == answer.loss.dtype == dtype
    cosine = nn.functional.cosine_similarity(answer.text_embeds.float(), expected.text_embeds, dim=-1)
    assert cosine.min() > 0.99


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    model, images = dual_model(num_hidden_layers=1).train(), tiny.pixel_values()
    ids = padded(tiny.input_ids(3, 8), 10, "right", 0).unsqueeze(1).repeat(1, 3, 1)
    expected = model(ids, images, return_loss=True)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    answer = compiled(ids, images, return_loss=True)
    torch.testing.assert_close(answer.loss, expected.loss, **TOLERANCE)
    torch.testing.assert_close(answer.text_embeds, expected.text_embeds, **TOLERANCE)
    torch.testing.assert_close(answer.corner_embeds, expected.corner_embeds, **TOLERANCE)


@pytest.mark.slow
def test_compiles_to_machine_code() -> None:
    model, images = dual_model(num_hidden_layers=1), tiny.pixel_values()
    ids = padded(tiny.input_ids(3, 8), 10, "right", 0)
    torch.compiler.reset()
    with torch.inference_mode():
        expected = model(ids, images)
        answer = torch.compile(model, fullgraph=True)(ids, images)
    torch.testing.assert_close(answer.logits_per_image, expected.logits_per_image, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "pooling"), [("bert", "pooler"), ("bert", "mean"), ("clip", "eos")])
def test_text_tower_is_exported_for_any_batch_and_length(backbone: str, pooling: str) -> None:
    model = _spread(LoTLIPTextModelWithProjection(tiny.text_config(backbone, pooling=pooling)))
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=38)}
    ids = padded(tiny.input_ids(3, 8), 10, "right", 0)
    exported = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes={"input_ids": sizes}).module()
    other = padded(tiny.input_ids(5, 6), 13, "right", 0)
    torch.testing.assert_close(exported(input_ids=other).text_embeds, model(other).text_embeds, **TOLERANCE)


@pytest.mark.slow
def test_image_tower_is_exported_for_any_batch(vision_backbone: str) -> None:
    model = _spread(LoTLIPVisionModelWithProjection(tiny.vision_config(vision_backbone, projection_dim=24)))
    sizes = {"pixel_values": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(model, (), {"pixel_values": tiny.pixel_values()}, dynamic_shapes=sizes).module()
    other = tiny.pixel_values(5)
    torch.testing.assert_close(exported(pixel_values=other).image_embeds, model(other).image_embeds, **TOLERANCE)


# Texts without their padding


EXACT = {"rtol": 1e-6, "atol": 1e-6}


def texts_of_lengths(*lengths: int, side: str = "right", length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids [N, length], garbage for padding, and their attention mask."""
    masks = [padded(torch.ones(1, n, dtype=torch.long), length, side, 0) for n in lengths]
    ids = [padded(tiny.input_ids(1, n), length, side, 9) for n in lengths]
    return torch.cat(ids), torch.cat(masks)


def with_gradients(model: nn.Module, *args: torch.Tensor, **kwargs) -> tuple:
    """The answer, and the gradient of all that training uses with respect to every parameter."""
    model.zero_grad()
    answer = model(*args, **kwargs)
    used = [answer.pooler_output, *([] if answer.corner_embeds is None else [answer.corner_embeds])]
    torch.stack([(value * torch.linspace(-1, 1, value.shape[-1])).mean() for value in used]).sum().backward()
    return answer, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", [(6,), (3, 2)])
@pytest.mark.parametrize("with_corners", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_unpadded_texts_are_the_padded_ones(
    text_backbone: str, side: str, with_corners: bool, shape: tuple[int, ...]
) -> None:
    model = text_model(text_backbone)
    lengths = [12, *torch.randint(2, 13, (5,)).tolist()]
    ids, mask = (tensor.reshape(*shape, -1) for tensor in texts_of_lengths(*lengths, side=side))
    arguments = {"output_corner_embeds": with_corners, "output_hidden_states": True}
    expected, expected_grads = with_gradients(model, ids, mask, **arguments)

    rows = []
    layers = next(module for module in model.backbone.modules() if isinstance(module, nn.ModuleList))
    layers[0].register_forward_hook(lambda module, args, output: rows.append(args[0].shape))
    model.set_attn_implementation("unpadded")
    answer, grads = with_gradients(model, ids, mask, **arguments)
    # its layers saw no padding
    assert rows == [(1, sum(lengths) + 6 * (2 if with_corners else 0), 32)]
    torch.testing.assert_close(answer.pooler_output, expected.pooler_output, **EXACT)
    torch.testing.assert_close(answer.corner_embeds, expected.corner_embeds, **EXACT)
    is_text = mask.bool()
    assert len(answer.hidden_states) == len(expected.hidden_states)
    for name in range(len(answer.hidden_states)):
        torch.testing.assert_close(answer.hidden_states[name][is_text], expected.hidden_states[name][is_text], **EXACT)
    torch.testing.assert_close(
        answer.last_hidden_state, expected.last_hidden_state.masked_fill(~is_text.unsqueeze(-1), 0.0), **EXACT
    )
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-5, atol=1e-6, msg=name)


# The pooled states alone


@pytest.mark.parametrize("attention", ["sdpa", "unpadded"])
@pytest.mark.parametrize("with_corners", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["pooler", "cls"])
def test_pooled_states_alone_are_those_of_all(
    bidirectional_backbone: str, pooling: str, side: str, with_corners: bool, attention: str
) -> None:
    model = text_model(bidirectional_backbone, pooling=pooling)
    ids, mask = (tensor.reshape(2, 3, -1) for tensor in texts_of_lengths(12, 5, 2, 9, 12, 7, side=side))
    expected, expected_grads = with_gradients(model, ids, mask, output_corner_embeds=with_corners)

    widths = []
    last = model.backbone.encoder.layer[-1]
    last.output.register_forward_hook(lambda module, args, output: widths.append(output.shape[:-1]))
    model.set_attn_implementation(attention)
    answer, grads = with_gradients(model, ids, mask, output_corner_embeds=with_corners, pooled_only=True)
    assert widths == [(6, 3 if with_corners else 1)]
    assert answer.last_hidden_state is None
    assert answer.pooler_output.shape == (2, 3, 32)
    torch.testing.assert_close(answer.pooler_output, expected.pooler_output, **EXACT)
    torch.testing.assert_close(answer.corner_embeds, expected.corner_embeds, **EXACT)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("backbone", "pooling", "attention", "arguments"),
    [
        ("bert", "mean", "sdpa", {}),
        ("bert", "pooler", "eager", {}),
        ("bert", "pooler", "sdpa", {"output_hidden_states": True}),
        ("bert", "pooler", "eager", {"output_attentions": True}),
        ("clip", "pooler", "sdpa", {}),
    ],
)
def test_all_states_are_computed_where_they_are_needed(
    backbone: str, pooling: str, attention: str, arguments: dict
) -> None:
    model = text_model(backbone, **({} if backbone == "clip" else {"pooling": pooling}))
    model.set_attn_implementation(attention)
    ids = tiny.input_ids(3, 8)
    with torch.no_grad():
        expected, answer = model(ids, **arguments), model(ids, **arguments, pooled_only=True)
    torch.testing.assert_close(answer.last_hidden_state, expected.last_hidden_state, **TOLERANCE)
    torch.testing.assert_close(answer.pooler_output, expected.pooler_output, **TOLERANCE)


@pytest.mark.parametrize(
    ("vision_backbone", "pooling"),
    [("vit", "cls"), ("vit", "pooler"), ("vit", "mean"), ("dinov2", "cls"), ("siglip", "pooler"), ("clip", "pooler")],
)
def test_the_pooled_state_of_an_image_alone(vision_backbone: str, pooling: str) -> None:
    model = _spread(LoTLIPVisionModel(tiny.vision_config(vision_backbone, pooling=pooling)))
    pixel_values = torch.randn(3, 3, 32, 32)
    expected, answer = model(pixel_values), model(pixel_values, pooled_only=True)
    torch.testing.assert_close(answer.pooler_output, expected.pooler_output, **EXACT)
    is_left_out = vision_backbone == "vit" and pooling != "mean"
    assert (answer.last_hidden_state is None) == is_left_out
    model.set_attn_implementation("eager")
    assert model(pixel_values, pooled_only=True).last_hidden_state is not None


def test_a_whole_model_gives_the_same_with_pooled_states_alone() -> None:
    model = dual_model().train()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": tiny.input_ids(3, 6),
        "long_input_ids": torch.stack([tiny.input_ids(2, 9) for _ in range(3)]),
        "pixel_values": torch.randn(3, 3, 32, 32, generator=generator),
    }
    answers, gradients = [], []
    for pooled_only in (False, True):
        model.zero_grad()
        answers.append(model(**inputs, return_loss=True, pooled_only=pooled_only))
        answers[-1].loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    expected, answer = answers
    assert answer.vision_model_output.last_hidden_state is None
    assert answer.logits_per_text is answer.logits_per_image is None
    assert expected.vision_model_output.last_hidden_state is not None
    for name in ("loss", "text_embeds", "image_embeds", "corner_embeds"):
        torch.testing.assert_close(answer[name], expected[name], **EXACT)
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_last_layer_stays_one_for_those_who_look_for_its_class() -> None:
    model = copy.deepcopy(LoTLIPModel(tiny.config()))
    layer = pickle.loads(pickle.dumps(model.text_model.backbone.encoder.layer[-1]))
    assert isinstance(layer, BertLayer)
    assert {type(layer).__name__, "BertLayer", "LoTLIPViTLayer"} <= set(model._no_split_modules)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_pooled_states_alone_compile_without_graph_breaks(dynamic: bool) -> None:
    model, ids = text_model(), tiny.input_ids(3, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        expected = model(ids)
        answer = compiled(ids, pooled_only=True)
    torch.testing.assert_close(answer.pooler_output, expected.pooler_output, **EXACT)


def test_texts_of_one_length_are_not_laid_out() -> None:
    model, ids = text_model(), tiny.input_ids(3, 8)
    shapes = []
    model.backbone.encoder.layer[0].register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    with torch.no_grad():
        expected = model(ids, output_corner_embeds=True)
        model.set_attn_implementation("unpadded")
        answer = model(ids, output_corner_embeds=True)
    assert shapes == [(3, 10, 32)] * 2
    torch.testing.assert_close(answer.corner_embeds, expected.corner_embeds, **TOLERANCE)


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_unpadded_arguments_are_lined_up(pooling: str) -> None:
    """Word embeddings, positions and token types of one's own, in place of those that are made."""
    model, (ids, mask) = text_model(pooling=pooling), texts_of_lengths(12, 5, 8)
    arguments = {
        "inputs_embeds": model.get_input_embeddings()(ids).detach(),
        "attention_mask": mask,
        "position_ids": torch.arange(12) * 2,
        "token_type_ids": torch.randint(2, ids.shape),
    }
    expected, _ = with_gradients(model, **arguments)
    model.set_attn_implementation("unpadded")
    answer, _ = with_gradients(model, **arguments)
    torch.testing.assert_close(answer.pooler_output, expected.pooler_output, **EXACT)


def test_unpadded_texts_with_dropout_of_the_attention() -> None:
    """Gradient checkpointing draws the same again."""
    model, (ids, mask) = text_model().train(), texts_of_lengths(12, 5, 8)
    for layer in model.backbone.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    model.set_attn_implementation("unpadded")
    torch.manual_seed(5)
    expected, expected_grads = with_gradients(model, ids, mask)
    model.gradient_checkpointing_enable()
    torch.manual_seed(5)
    answer, grads = with_gradients(model, ids, mask)
    torch.testing.assert_close(answer.corner_embeds, expected.corner_embeds, **EXACT)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-5, atol=1e-6, msg=name)
    assert (with_gradients(model, ids, mask)[0].corner_embeds - answer.corner_embeds).abs().max() > 1e-3


def test_a_whole_model_is_unpadded_and_forgets_it_when_saved(tmp_path: Path) -> None:
    model, images = dual_model(), tiny.pixel_values()
    short, short_mask = texts_of_lengths(6, 3, 4, length=6)
    long, long_mask = (tensor.unsqueeze(1) for tensor in texts_of_lengths(5, 12, 9))
    arguments = {
        "attention_mask": short_mask,
        "long_input_ids": long,
        "long_attention_mask": long_mask,
        "return_loss": True,
    }
    with torch.no_grad():
        expected = model(short, images, **arguments)
        model.set_attn_implementation("unpadded")
        assert model.vision_model.backbone.config._attn_implementation == "unpadded"
        answer = model(short, images, **arguments)
    for name in ("loss", "text_embeds", "image_embeds", "corner_embeds"):
        torch.testing.assert_close(answer[name], expected[name], **EXACT)
    model.save_pretrained(tmp_path)
    assert "unpadded" not in (tmp_path / "config.json").read_text()
    assert LoTLIPModel.from_pretrained(tmp_path).text_model.backbone.config._attn_implementation == "sdpa"
    loaded = LoTLIPModel.from_pretrained(tmp_path, attn_implementation="unpadded")
    assert loaded.text_model.backbone.config._attn_implementation == "unpadded"
    with torch.no_grad():
        torch.testing.assert_close(loaded(short, images, **arguments).loss, expected.loss, **TOLERANCE)


@pytest.mark.slow
def test_compiled_texts_keep_their_padding() -> None:
    model, (ids, mask) = text_model(), texts_of_lengths(12, 5, 8)
    model.set_attn_implementation("unpadded")
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(ids, mask, output_corner_embeds=True)
        answer = torch.compile(model, fullgraph=True, backend="eager")(ids, mask, output_corner_embeds=True)
    torch.testing.assert_close(answer.corner_embeds, expected.corner_embeds, **EXACT)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_mask_over_a_row_is_each_texts_own(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flex_attention` gets one block mask for texts without their padding."""
    tiny.leave_flex_attention_uncompiled(monkeypatch)
    _, mask = texts_of_lengths(5, 2, 4, length=5)
    config, pooled_index = text_model().config.backbone_config, mask.sum(1) - 1 if is_causal else mask.argmax(1)
    row, masks = make_row(mask, 2), {}
    for attention, own in {"sdpa": None, "flex_attention": row}.items():
        config._attn_implementation = attention
        family = TEXT_BACKBONES["clip_text_model" if is_causal else "bert"]
        masks[attention] = create_corner_mask(family, config, torch.zeros(3, 7, 8), mask, pooled_index, own)
    block_mask = masks["flex_attention"]
    assert block_mask.shape == (1, 1, 17, 17)
    places = torch.arange(17)
    of_row = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places)
    texts, within = row.index // 7, row.index % 7
    expected = masks["sdpa"][texts[:, None], 0, within[:, None], within] & (texts[:, None] == texts)
    assert torch.equal(of_row, expected)


# Padding and batches


@pytest.mark.parametrize("with_corners", [True, False])
def test_padding_and_batch_mates_do_not_matter(bidirectional_backbone: str, with_corners: bool) -> None:
    model = text_model(bidirectional_backbone)
    pad, ids = model.config.pad_token_id, tiny.input_ids(1, 8)

    def features(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        with torch.no_grad():
            outputs = model(input_ids, attention_mask, output_corner_embeds=with_corners)
        parts = [outputs.pooler_output.unsqueeze(1)] + ([outputs.corner_embeds] if with_corners else [])
        return torch.cat(parts, dim=1)

    expected = features(ids)
    beyond_the_positions = model.config.max_position_embeddings + 20
    for side in ("left", "right"):
        for length in (9, 20, beyond_the_positions):
            longer = padded(ids, length, side, pad)
            torch.testing.assert_close(features(longer), expected, **TOLERANCE)
            mask = (longer != pad).long()
            garbage = torch.where(mask.bool(), longer, torch.randint(7, 99, longer.shape))
            torch.testing.assert_close(features(garbage, mask), expected, **TOLERANCE)
        mates = torch.cat([padded(tiny.input_ids(1, n), 20, side, pad) for n in (3, 20, 11)])
        batch = torch.cat([mates, padded(ids, 20, side, pad)])
        torch.testing.assert_close(features(batch)[-1:], expected, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mean_leaves_padding_out(side: str) -> None:
    model, ids = text_model(pooling="mean"), tiny.input_ids(1, 8)
    with torch.no_grad():
        outputs = model(ids)
        longer = model(padded(ids, 12, side, 0))
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean(1), **TOLERANCE)
    torch.testing.assert_close(longer.pooler_output, outputs.pooler_output, **TOLERANCE)


def test_many_texts_are_each_as_alone() -> None:
    model, ids = dual_model(), tiny.input_ids(3, 4, 8)
    ids[1, 2, 5:] = 0
    with torch.no_grad():
        together = model.get_text_features(ids, output_corner_embeds=True, output_hidden_states=True)
        alone = [model.get_text_features(ids[:, t], output_corner_embeds=True) for t in range(4)]
    assert together.last_hidden_state.shape == (3, 4, 8, 32)
    assert {h.shape for h in together.hidden_states} == {(3, 4, 8, 32)}
    for t in range(4):
        torch.testing.assert_close(together.pooler_output[:, t], alone[t].pooler_output, **TOLERANCE)
        torch.testing.assert_close(together.corner_embeds[:, t], alone[t].corner_embeds, **TOLERANCE)


@pytest.mark.parametrize("shape", [(3, 8), (3, 2, 8)])
def test_inputs_embeds_positions_and_token_types(text_backbone: str, shape: tuple[int, ...]) -> None:
    model, ids = text_model(text_backbone), tiny.input_ids(*shape)
    words = model.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = model(ids, output_corner_embeds=True)
        for answer in (
            model(inputs_embeds=words, output_corner_embeds=True),
            model(ids, position_ids=torch.arange(8), output_corner_embeds=True),
            model(ids, position_ids=torch.arange(8).expand(shape), output_corner_embeds=True),
            model(ids, token_type_ids=torch.zeros_like(ids), output_corner_embeds=True),
        ):
            torch.testing.assert_close(answer.pooler_output, expected.pooler_output, **TOLERANCE)
            torch.testing.assert_close(answer.corner_embeds, expected.corner_embeds, **TOLERANCE)
        moved = model(ids, position_ids=torch.arange(8) * 2)
    assert (moved.pooler_output - expected.pooler_output).abs().max() > 1e-3


# Image towers


@pytest.mark.parametrize(
    ("vision_backbone", "pooling"),
    [(name, pooling) for name in tiny.VISION_BACKBONES for pooling in ("pooler", "mean")]
    + [("vit", "cls"), ("dinov2", "cls")],
)
def test_vision_is_the_stock_backbone(vision_backbone: str, pooling: str) -> None:
    model = _spread(LoTLIPVisionModel(tiny.vision_config(vision_backbone, pooling=pooling)))
    images = tiny.pixel_values()
    with torch.no_grad():
        stock, ours = model.backbone(images), model(images)
    expected = {
        "pooler": stock.pooler_output,
        "cls": stock.last_hidden_state[:, 0],
        "mean": stock.last_hidden_state[:, -16:].mean(1),
    }[pooling]
    torch.testing.assert_close(ours.pooler_output, expected, **TOLERANCE)
    torch.testing.assert_close(ours.last_hidden_state, stock.last_hidden_state, **TOLERANCE)


def test_other_image_sizes(vision_backbone: str) -> None:
    model = dual_model(vision_backbone=vision_backbone)
    images, larger = tiny.pixel_values(), torch.randn(3, 3, 48, 64)
    with torch.no_grad():
        same = model.get_image_features(images, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(same, model.get_image_features(images).pooler_output, **TOLERANCE)
        assert model.get_image_features(larger, interpolate_pos_encoding=True).pooler_output.shape == (3, 24)
        if vision_backbone != "dinov2":  # always interpolates
            with pytest.raises(ValueError, match=r"\[48, 64\]"):
                model.get_image_features(larger)


# The interface of CLIP


@pytest.mark.parametrize("method", ["forward", "get_text_features", "get_image_features"])
def test_arguments_are_clips(method: str) -> None:
    clip = [n for n in inspect.signature(getattr(CLIPModel, method)).parameters if n != "kwargs"]
    ours = list(inspect.signature(getattr(LoTLIPModel, method)).parameters)
    assert ours[: len(clip)] == clip


def test_outputs_are_clips() -> None:
    model, ids, images = dual_model(), tiny.input_ids(4, 8), tiny.pixel_values(3)
    with torch.no_grad():
        outputs = model(ids, images)
        as_tuple = model(ids, images, return_dict=False)
    clip = ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds", "text_model_output"]
    assert list(outputs) == [*clip, "vision_model_output"]
    torch.testing.assert_close(as_tuple[0], outputs.logits_per_image, **TOLERANCE)
    assert outputs.logits_per_image.shape == (3, 4)
    torch.testing.assert_close(outputs.logits_per_text, outputs.logits_per_image.t())
    torch.testing.assert_close(outputs.text_embeds.norm(dim=-1), torch.ones(4))
    cosine = outputs.image_embeds @ outputs.text_embeds.t()
    torch.testing.assert_close(outputs.logits_per_image, cosine * model.logit_scale.exp())
    text = model.text_model(ids).pooler_output @ model.text_projection.weight.t()
    torch.testing.assert_close(outputs.text_embeds, nn.functional.normalize(text, dim=-1), **TOLERANCE)
    assert model.visual_projection.weight.shape == (24, 32)
    assert model.logit_scale.shape == ()
    assert (model.projection_dim, model.text_embed_dim, model.vision_embed_dim) == (24, 32, 32)


def test_logits_of_many_texts() -> None:
    model, ids, images = dual_model(), tiny.input_ids(4, 2, 8), tiny.pixel_values(3)
    with torch.no_grad():
        outputs = model(ids, images)
        flat = model(ids.flatten(0, 1), images)
    torch.testing.assert_close(outputs.logits_per_text, flat.logits_per_text.unflatten(0, (4, 2)), **TOLERANCE)
    torch.testing.assert_close(outputs.logits_per_image, flat.logits_per_image.unflatten(1, (4, 2)), **TOLERANCE)


# The loss


def test_loss_of_one_text_is_clips() -> None:
    outputs = dual_model()(tiny.input_ids(3, 8), tiny.pixel_values(), return_loss=True)
    torch.testing.assert_close(outputs.loss, image_text_contrastive_loss(outputs.logits_per_text), **TOLERANCE)


@pytest.mark.parametrize("training", [True, False])
def test_loss_of_many_texts_is_the_mean_over_features(training: bool) -> None:
    model = dual_model().train(training)
    model.config.short_loss_weight, model.config.long_loss_weight = 0.5, 2.0
    outputs = model(tiny.input_ids(3, 4, 8), tiny.pixel_values(), return_loss=True)

    def clip_loss(features: torch.Tensor) -> torch.Tensor:
        return image_text_contrastive_loss(model.logit_scale.exp() * features @ outputs.image_embeds.t())

    long_texts = range(1, 4)
    losses = [clip_loss(outputs.text_embeds[:, t]) for t in long_texts]
    losses += [clip_loss(outputs.corner_embeds[:, t, m]) for t in long_texts for m in range(2)]
    short, num_features = clip_loss(outputs.text_embeds[:, 0]), 1 + 3 * 3
    torch.testing.assert_close(outputs.loss_short, 0.5 * short / num_features, **TOLERANCE)
    torch.testing.assert_close(outputs.loss_long, 2.0 * torch.stack(losses).sum() / num_features, **TOLERANCE)
    torch.testing.assert_close(outputs.loss, outputs.loss_short + outputs.loss_long)


def test_loss_wants_as_many_images_as_texts() -> None:
    with pytest.raises(ValueError, match="3 rows"):
        lotlip_loss(torch.eye(2, 4), torch.zeros(3, 1, 4), None, torch.tensor(1.0))


def test_new_corner_tokens_and_scale_start_as_configured() -> None:
    model = LoTLIPModel(tiny.config(num_corner_tokens=30))
    assert abs(model.text_model.corner_embeds.std().item() - model.config.text_config.initializer_range) < 2e-3
    torch.testing.assert_close(model.logit_scale.exp().item(), 1 / 0.07)


def test_every_parameter_learns() -> None:
    model = dual_model().train()
    model(tiny.input_ids(3, 2, 8), tiny.pixel_values(), return_loss=True).loss.backward()
    # an attention's key bias shifts all scores of a query alike
    idle = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-10]
    assert [n for n in idle if not n.endswith(("key.bias", "k_proj.bias"))] == []


# Saving, loading, starting from backbones


def _settings(config: dict) -> dict:
    return {
        k: v for k, v in config.items() if k not in ("dtype", "_name_or_path", "architectures", "transformers_version")
    }


@pytest.mark.slow
def test_every_combination_is_saved_and_loaded(text_backbone: str, vision_backbone: str, tmp_path: Path) -> None:
    model = dual_model(text_backbone, vision_backbone)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ours, theirs = (
        json.loads(c.to_json_string(use_diff=False), object_hook=_settings) for c in (model.config, loaded.config)
    )
    assert ours == theirs
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for model_class, prefix in (
        (LoTLIPTextModel, "text_model."),
        (LoTLIPVisionModel, "vision_model."),
        (LoTLIPTextModelWithProjection, ""),
        (LoTLIPVisionModelWithProjection, ""),
    ):
        tower, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), (model_class, info)
        for name, tensor in tower.state_dict().items():
            assert torch.equal(model.state_dict()[prefix + name], tensor), name


@pytest.mark.parametrize(
    ("model_class", "key"),
    [
        (LoTLIPModel, "text_model.backbone.encoder.layer.7.weight"),
        (LoTLIPModel, "vision_model.backbone.other"),
        (LoTLIPModel, "visual_projection.bias"),
        (LoTLIPTextModel, "text_model.other"),
        (LoTLIPTextModelWithProjection, "text_projection.bias"),
        (LoTLIPVisionModel, "vision_model.other"),
        (LoTLIPVisionModelWithProjection, "visual_projection.bias"),
    ],
)
def test_tensors_without_a_place_are_reported(model_class: type, key: str, tmp_path: Path) -> None:
    dual_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, key: torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {key}


def test_device_map_and_offload(tmp_path: Path) -> None:
    model, ids, images = dual_model(), tiny.input_ids(3, 2, 8), tiny.pixel_values()
    model.save_pretrained(tmp_path / "checkpoint")
    offloaded = LoTLIPModel.from_pretrained(
        tmp_path / "checkpoint",
        device_map="auto",
        max_memory={"cpu": 60 * 1024},
        offload_folder=tmp_path / "offload",
    )
    places = offloaded.hf_device_map
    assert places["text_model.backbone.embeddings"] == "cpu"
    assert places["text_model.backbone.encoder"] == places["vision_model"] == "disk"
    with torch.no_grad():
        expected = model(ids, images, return_loss=True)
        answer = offloaded(ids, images, return_loss=True)
    torch.testing.assert_close(answer.loss, expected.loss, **TOLERANCE)


def test_resize_token_embeddings(tmp_path: Path) -> None:
    model, ids = dual_model(), tiny.input_ids(2, 8)
    with torch.no_grad():
        expected = model.get_text_features(ids).pooler_output
    model.resize_token_embeddings(120)
    assert model.config.text_config.vocab_size == model.config.text_config.backbone_config.vocab_size == 120
    with torch.no_grad():
        torch.testing.assert_close(model.get_text_features(ids).pooler_output, expected, **TOLERANCE)
        model.get_text_features(torch.full_like(ids, 119))
    model.save_pretrained(tmp_path)
    assert LoTLIPModel.from_pretrained(tmp_path).get_input_embeddings().num_embeddings == 120


def stock_backbone(config) -> nn.Module:
    return _spread(AutoModel.from_config(config.backbone_config))


@pytest.mark.slow
@pytest.mark.parametrize("from_folder", [True, False])
def test_from_backbones(text_backbone: str, vision_backbone: str, from_folder: bool, tmp_path: Path) -> None:
    text = stock_backbone(tiny.text_config(text_backbone))
    vision = stock_backbone(tiny.vision_config(vision_backbone))
    if from_folder:
        text.save_pretrained(tmp_path / "text")
        vision.save_pretrained(tmp_path / "vision")
        model = from_backbones(tmp_path / "text", tmp_path / "vision", num_corner_tokens=3).eval()
    else:
        model = from_backbones(text, vision, num_corner_tokens=3).eval()
    assert model.text_model.corner_embeds.shape == (3, 32)
    assert model.config.projection_dim == 32
    assert isinstance(model.visual_projection, nn.Identity)
    ids, images = tiny.input_ids(3, 8), tiny.pixel_values()
    with torch.no_grad():
        image = vision(images)
        pooled = image.last_hidden_state[:, 0] if vision_backbone in ("vit", "dinov2") else image.pooler_output
        torch.testing.assert_close(model.get_image_features(images).pooler_output, pooled, **TOLERANCE)
        torch.testing.assert_close(model.text_model(ids).pooler_output, text(ids).pooler_output, **TOLERANCE)
    model.save_pretrained(tmp_path / "lotlip")
    assert not any(LoTLIPModel.from_pretrained(tmp_path / "lotlip", output_loading_info=True)[1].values())
    assert str(tmp_path) not in (tmp_path / "lotlip" / "config.json").read_text()


def test_from_backbones_takes_a_clips_image_tower(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    text_size = {**tiny.SIZE, "vocab_size": 99, "max_position_embeddings": 20}
    clip = _spread(CLIPModel(CLIPConfig(text_config=text_size, vision_config=tiny.IMAGE_SIZE, projection_dim=24)))
    clip.save_pretrained(tmp_path)
    images = tiny.pixel_values()
    for source in (clip, tmp_path):
        model = from_backbones(stock_backbone(tiny.text_config()), source, projection_dim=24).eval()
        with torch.no_grad():
            expected = clip.vision_model(images).pooler_output
            torch.testing.assert_close(model.vision_model(images).pooler_output, expected, **TOLERANCE)
        assert model.visual_projection.weight.shape == (24, 32)


def test_from_backbones_refuses_other_encoders(tmp_path: Path) -> None:
    text, vision = stock_backbone(tiny.text_config()), stock_backbone(tiny.vision_config())
    with pytest.raises(ValueError, match="bert"):
        from_backbones(text, text)
    for folder in (tmp_path / "nothere", "nothere/either"):
        with pytest.raises(OSError, match="no .*folder"):
            from_backbones(folder, vision)
    with_head = AutoModelForSequenceClassification.from_config(text.config)
    with pytest.raises(ValueError, match="BertForSequenceClassification"):
        from_backbones(with_head, vision)


def test_from_backbones_makes_a_pooler_only_if_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vision = stock_backbone(tiny.vision_config())
    text = _spread(AutoModel.from_config(tiny.text_config().backbone_config, add_pooling_layer=False))
    text.save_pretrained(tmp_path)
    for source in (text, tmp_path):
        caplog.clear()
        model = from_backbones(source, vision, num_corner_tokens=0)
        assert model.config.text_config.pooling == "cls"
        assert model.text_model.backbone.pooler is None
        assert "text_pooling" in caplog.text
        backbone = from_backbones(source, vision, num_corner_tokens=0, text_pooling="pooler").text_model.backbone
        new = set(backbone.state_dict()) - set(text.state_dict())
        assert new == {"pooler.dense.weight", "pooler.dense.bias"}
        for name, tensor in text.state_dict().items():
            assert torch.equal(backbone.state_dict()[name], tensor), name


# Wrong input


def ids_of(*shape: int, value: int = 1, dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({}, "input_ids"),
        ({"input_ids": ids_of(8)}, "input_ids"),
        ({"input_ids": ids_of(1, 1, 1, 8)}, "input_ids"),
        ({"input_ids": ids_of(1, 8, value=99)}, "99"),
        ({"input_ids": ids_of(1, 8, value=-1)}, "99"),
        ({"input_ids": ids_of(1, 39)}, "truncation=True"),
        ({"input_ids": ids_of(1, 8), "attention_mask": torch.ones(1, 7)}, "attention_mask"),
        ({"input_ids": ids_of(1, 8), "token_type_ids": ids_of(8)}, "token_type_ids"),
        ({"input_ids": ids_of(1, 8), "position_ids": torch.arange(8) + 31}, "38"),
        ({"inputs_embeds": torch.ones(8, 32)}, "inputs_embeds"),
    ],
)
def test_wrong_texts_are_named(arguments: dict[str, torch.Tensor], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        text_model()(**arguments)


@pytest.mark.parametrize(
    ("images", "word"),
    [
        (None, "pixel_values"),
        (torch.zeros(3, 32, 32), "pixel_values"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, 16, 32), "16"),
        (torch.zeros(1, 1, 32, 32), "channel"),
    ],
)
def test_wrong_images_are_named(images: torch.Tensor | None, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        LoTLIPVisionModel(tiny.vision_config())(images)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: LoTLIPTextConfig(backbone_config={"model_type": "fnet"}), "fnet"),
        (lambda: LoTLIPVisionConfig(backbone_config={"model_type": "bert"}), "bert"),
        (lambda: LoTLIPTextConfig(num_corner_tokens=-1), "num_corner_tokens"),
        (lambda: LoTLIPTextConfig(num_corner_tokens=511), "room"),
        (lambda: LoTLIPTextConfig(pooling="max"), "pooling"),
        (lambda: tiny.vision_config("siglip", pooling="cls"), "pooler"),
        (lambda: tiny.vision_config("clip", pooling="cls"), "pooler"),
        (lambda: dual_model()(pixel_values=tiny.pixel_values(), return_loss=True), "inputs_embeds"),
        (lambda: dual_model()(tiny.input_ids(3, 8), return_loss=True), "pixel_values"),
        (lambda: dual_model()(), "inputs_embeds"),
    ],
)
def test_wrong_configurations_and_calls_are_named(make: Callable[[], Any], word: str) -> None:
    with pytest.raises(Exception, match=word):
        make()


@torch.no_grad()
def test_texts_or_images_alone_give_their_embeddings() -> None:
    model, input_ids, pixel_values = dual_model().eval(), tiny.input_ids(3, 8), tiny.pixel_values()
    expected = model(input_ids, pixel_values)
    texts, images = model(input_ids), model(pixel_values=pixel_values)
    torch.testing.assert_close(texts[0], expected.text_embeds, **TOLERANCE)
    torch.testing.assert_close(images[0], expected.image_embeds, **TOLERANCE)
    assert list(texts) == ["text_embeds", "text_model_output"]
    assert list(images) == ["image_embeds", "vision_model_output"]


def test_configuration_hands_the_backbones_arguments_on() -> None:
    config = LoTLIPConfig(
        text_config={"hidden_act": "relu", "vocab_size": 100}, vision_config={"num_hidden_layers": 3}
    )
    assert config.text_config.backbone_config.hidden_act == "relu"
    assert config.text_config.vocab_size == config.text_config.backbone_config.vocab_size == 100
    assert config.vision_config.num_hidden_layers == config.vision_config.backbone_config.num_hidden_layers == 3
    backbone_config = tiny.text_config().backbone_config
    LoTLIPTextConfig(backbone_config=backbone_config, vocab_size=5)
    assert backbone_config.vocab_size == tiny.TEXT_SIZE["vocab_size"]


def test_configuration_leaves_the_callers_alone() -> None:
    vision = tiny.vision_config()
    config = LoTLIPConfig(text_config=tiny.text_config(), vision_config=vision, projection_dim=16)
    assert vision.projection_dim is None
    assert config.vision_config.projection_dim == config.text_config.projection_dim == 16


@pytest.mark.parametrize("vision_backbone", tiny.VISION_BACKBONES)
def test_a_saved_file_is_a_state_dict(vision_backbone: str, tmp_path: Path) -> None:
    """As `Trainer` resumes."""
    saved, other = dual_model(vision_backbone=vision_backbone), dual_model(vision_backbone=vision_backbone)
    saved.save_pretrained(tmp_path)
    for state_dict in (load_file(tmp_path / "model.safetensors"), saved.state_dict()):
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        assert other.load_state_dict(state_dict).missing_keys == []
        for name, tensor in saved.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0)


def test_from_backbones_refuses_folders_that_lack_weights(tmp_path: Path) -> None:
    model = dual_model()
    for name, backbone in (("text", model.text_model.backbone), ("vision", model.vision_model.backbone)):
        backbone.save_pretrained(tmp_path / name)
    path = tmp_path / "text" / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="encoder.layer.1.output.dense.weight"):
        from_backbones(str(tmp_path / "text"), str(tmp_path / "vision"))
