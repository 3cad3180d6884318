"""Texts in a row without padding, with `unpadded` attention, against the same texts padded."""

from typing import Any

import pytest
import torch
from torch import nn

import tiny_families
from lotlip_hf import LoTLIPTextConfig, LoTLIPTextModel
from lotlip_hf.modeling.masking_lotlip import WINDOW_BLOCK
from tiny_families import FAMILIES

# A family for each kind of layer, position and window. test_families.py has all of them, without gradients.
ROWS = ["bert", "albert", "distilbert", "modernbert", "llama", "mistral", "qwen2", "gemma3_text"]
ROWS += ["gemma3_text, bidirectional", "mistral, bidirectional layers"]
# Groups of several texts of one length and of similar lengths.
LENGTHS = (38, 9, 31, 31, 14, 12, 2, 13)
# Texts that are longer than a block of sliding windows, and as long.
LONG = (2 * WINDOW_BLOCK + 70, WINDOW_BLOCK, 30, 2)


def long_text_model(name: str, **settings: Any) -> LoTLIPTextModel:
    """A text tower with random weights that takes texts of 700 tokens."""
    family, settings = FAMILIES[name], {"num_corner_tokens": 2, "projection_dim": None, **settings}
    torch.manual_seed(0)
    config = LoTLIPTextConfig(backbone_config=family.stock_config(max_position_embeddings=700), **settings)
    return tiny_families.spread(LoTLIPTextModel(config))


def with_gradients(model: LoTLIPTextModel, *texts: torch.Tensor, **options: Any) -> tuple[list, dict]:
    """Pooled states, states of the words and of the corner tokens, and the gradient of each parameter."""
    model.zero_grad()
    outputs = model(*texts, **options)
    is_text = texts[1].bool()
    answer = [outputs.pooler_output, outputs.last_hidden_state[is_text]]
    if outputs.corner_embeds is not None:
        answer.append(outputs.corner_embeds)
    sum((states * torch.linspace(-1, 1, states.shape[-1])).mean() for states in answer).backward()
    return answer, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def agree(model: LoTLIPTextModel, texts: tuple[torch.Tensor, ...], **options: Any) -> list[torch.Size]:
    """Compares padded and unpadded texts, and returns the shape of the states in the unpadded layers."""
    expected, expected_gradients = with_gradients(model, *texts, **options)
    shapes: list[torch.Size] = []
    layers = max((one for one in model.backbone.modules() if isinstance(one, nn.ModuleList)), key=len)
    handle = layers[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    model.set_attn_implementation("unpadded")
    answer, gradients = with_gradients(model, *texts, **options)
    handle.remove()
    for one, other in zip(answer, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        size = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5 * (1 + size), msg=name)
    return shapes


@pytest.mark.parametrize("with_corners", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_the_padded_texts(name: str, side: str, with_corners: bool) -> None:
    lengths = LENGTHS if FAMILIES[name].window is None else LONG
    texts = tiny_families.texts(*lengths, side=side)
    shapes = agree(long_text_model(name), texts, output_corner_embeds=with_corners)
    assert all(shape[:2] == (1, sum(lengths) + (2 * len(lengths) if with_corners else 0)) for shape in shapes)
    assert shapes or name == "albert"  # whose layers are in groups


@pytest.mark.parametrize("name", ["modernbert", "gemma3_text", "gemma3_text, bidirectional"])
def test_one_text_is_a_row_if_it_is_longer_than_a_window(name: str) -> None:
    """Its windows cost less than a mask of the whole text."""
    texts = tiny_families.texts(2 * WINDOW_BLOCK + 5)
    assert agree(long_text_model(name), texts, output_corner_embeds=False)
    model = long_text_model(name)
    model.set_attn_implementation("unpadded")
    masks: list[tuple[int, ...]] = []
    layers = model.backbone.layers
    layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(tuple(kwargs["attention_mask"].shape)), with_kwargs=True
    )
    model(*texts)
    ((_, _, queries, keys),) = masks
    assert queries == WINDOW_BLOCK
    assert keys < WINDOW_BLOCK + 8


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_text_without_tokens_has_no_effect(name: str) -> None:
    model = long_text_model(name, pooling="mean")
    ids, mask = tiny_families.texts(9, 5, 7)
    mask[1] = 0
    model.set_attn_implementation("unpadded")
    outputs = model(ids, mask, output_corner_embeds=True)
    outputs.corner_embeds[[0, 2]].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    alone = model(ids[[0, 2]], mask[[0, 2]], output_corner_embeds=True)
    torch.testing.assert_close(outputs.corner_embeds[[0, 2]], alone.corner_embeds)
