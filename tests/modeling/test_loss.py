"""The loss against naive formulations, pair by pair."""

import math

import pytest
import torch
from torch.nn import functional as F

import tiny
from lotlip_hf import LoTLIPModel
from lotlip_hf.modeling.loss_lotlip import contrastive_losses, lotlip_loss, stack_features, weighted_loss

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def embeddings(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(shape), dim=-1)


def test_contrastive_losses_pair_by_pair() -> None:
    images, texts, scale = embeddings(5, 8), embeddings(5, 3, 8), torch.tensor(7.0)
    losses = contrastive_losses(images, texts, scale)
    for k in range(3):
        similarity = [[(7 * images[i] @ texts[j, k]).item() for j in range(5)] for i in range(5)]
        total = 0.0
        for i in range(5):
            total -= similarity[i][i] - math.log(sum(math.exp(similarity[i][j]) for j in range(5)))
            total -= similarity[i][i] - math.log(sum(math.exp(similarity[j][i]) for j in range(5)))
        assert losses[k].item() == pytest.approx(total / 10, abs=1e-5)


def test_only_the_long_texts_corners_are_features() -> None:
    texts, corners = embeddings(2, 3, 8), embeddings(2, 2, 4, 8)
    features = stack_features(texts, corners)
    assert features.shape == (2, 1 + 2 * (4 + 1), 8)
    assert torch.equal(features[:, :3], texts)
    assert torch.equal(features[:, 3:7], corners[:, 0])
    assert torch.equal(features[:, 7:], corners[:, 1])
    assert stack_features(texts, None) is texts


def test_weights_are_of_shares_of_the_mean() -> None:
    loss = weighted_loss(torch.tensor([1.0, 2.0, 4.0, 8.0]), 0.5, 3.0)
    torch.testing.assert_close(loss.loss_short, torch.tensor(0.5 * 1 / 4))
    torch.testing.assert_close(loss.loss_long, torch.tensor(3.0 * 14 / 4))
    torch.testing.assert_close(loss.loss, loss.loss_short + loss.loss_long)


def test_loss_without_long_texts_is_clips() -> None:
    images, texts, scale = embeddings(5, 8), embeddings(5, 1, 8), torch.tensor(7.0)
    loss = lotlip_loss(images, texts, None, scale)
    logits, targets = 7 * images @ texts[:, 0].t(), torch.arange(5)
    clip = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2
    torch.testing.assert_close(loss.loss, clip, **TOLERANCE)
    assert loss.loss_long == 0


# Short and long texts each at their own length, through the model

SHORT, LONG = 5, 11  # tokens


def model_and_texts(num_corner_tokens: int) -> tuple[LoTLIPModel, torch.Tensor, torch.Tensor]:
    """A model, the short texts [B, L] and the long ones [B, T - 1, L'], some padded."""
    model = LoTLIPModel(tiny.config(num_corner_tokens=num_corner_tokens))
    for parameter in model.parameters():
        if parameter.dim() > 1:  # large enough that every part matters
            torch.nn.init.normal_(parameter, std=0.3)
    short, long = tiny.input_ids(3, SHORT), tiny.input_ids(3, 2, LONG)
    short[1, 3:], long[2, 0, 6:] = 0, 0
    return model, short, long


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_corner_tokens", [2, 0])
def test_long_texts_apart_are_the_same_texts(num_corner_tokens: int, training: bool) -> None:
    model, short, long = model_and_texts(num_corner_tokens)
    model.train(training)
    images = tiny.pixel_values()
    together = torch.cat([F.pad(short, (0, LONG - SHORT)).unsqueeze(1), long], dim=1)  # [B, T, L]
    names = ("loss", "loss_short", "loss_long", "text_embeds", "image_embeds", "logits_per_image", "logits_per_text")
    answers = []
    for texts in ({"input_ids": together}, {"input_ids": short, "long_input_ids": long}):
        model.zero_grad()
        outputs = model(**texts, pixel_values=images, return_loss=True)
        outputs.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        answers.append(({name: outputs[name] for name in names}, gradients, outputs.corner_embeds))
    for name in names:
        torch.testing.assert_close(answers[1][0][name], answers[0][0][name], **TOLERANCE, msg=name)
    for name, gradient in answers[0][1].items():
        torch.testing.assert_close(answers[1][1][name], gradient, **TOLERANCE, msg=name)
    if num_corner_tokens:
        assert answers[0][1]["text_model.corner_embeds"].norm() > 1e-4
        assert answers[1][2].shape == (3, 2, 2, 24)
        torch.testing.assert_close(answers[1][2], answers[0][2][:, 1:], **TOLERANCE)
    else:
        assert answers[0][2] is None
        assert answers[1][2] is None


def test_the_masks_of_long_and_short_texts_are_used() -> None:
    model, short, long = model_and_texts(2)
    images = tiny.pixel_values()
    expected = model.eval()(short, images, long_input_ids=long, return_loss=True)
    masks = {"attention_mask": (short != 0).long(), "long_attention_mask": (long != 0).long()}
    other_short, other_long = short.clone(), long.clone()
    other_short[short == 0], other_long[long == 0] = 9, 9  # what stands in padded places does not matter
    answer = model(other_short, images, long_input_ids=other_long, return_loss=True, **masks)
    torch.testing.assert_close(answer.loss, expected.loss, **TOLERANCE)
    torch.testing.assert_close(answer.text_embeds, expected.text_embeds, **TOLERANCE)


def test_no_corner_of_a_short_text_is_computed() -> None:
    model, short, long = model_and_texts(2)
    outputs = model.train()(short, tiny.pixel_values(), long_input_ids=long)
    assert outputs.text_model_output.corner_embeds is None
    assert outputs.corner_embeds.shape == (3, 2, 2, 24)
    assert model.eval()(short, tiny.pixel_values(), long_input_ids=long).corner_embeds is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": (3, 2, 5), "long_input_ids": (3, 2, 5)},
        {"input_ids": (3, 5), "long_input_ids": (3, 5)},
        {"input_ids": (3, 5), "long_input_ids": (2, 2, 5)},
        {"long_input_ids": (3, 2, 5)},
        {"input_ids": (3, 5), "long_attention_mask": (3, 2, 5)},
    ],
)
def test_long_texts_that_do_not_fit(arguments: dict[str, tuple[int, ...]]) -> None:
    model, _, _ = model_and_texts(2)
    with pytest.raises(ValueError, match="long_input_ids"):
        model(pixel_values=tiny.pixel_values(), **{name: tiny.input_ids(*shape) for name, shape in arguments.items()})
