"""The terms of the objective against naive formulations, and the options that choose them."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lotlip_hf import LoTLIPConfig
from lotlip_hf.training.config import TrainingConfig, parse_arguments
from lotlip_hf.training.objective import Objective, make_objective
from lotlip_hf.training.terms import TERMS
from lotlip_hf.training.terms.infonce import InfoNCE
from lotlip_hf.training.terms.primary_components import PrimaryComponents, primary_components
from lotlip_hf.training.terms.sigmoid import Sigmoid
from tiny_terms import Guess

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def embeddings(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(shape), dim=-1)


def test_sigmoid_pair_by_pair() -> None:
    images, texts = embeddings(5, 8), embeddings(5, 1, 8)
    term = Sigmoid()
    nn.init.constant_(term.logit_bias, -3.0)
    loss = Objective({"sigmoid": term})({"image_embeds": images, "text_embeds": texts}, torch.tensor(7.0))["loss"]
    total = 0.0
    for i in range(5):
        for j in range(5):
            logit = (7 * images[i] @ texts[j, 0]).item() - 3
            total += math.log1p(math.exp(-logit if i == j else logit))
    assert loss.item() == pytest.approx(total / 5, abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothed_labels_are_torchs(smoothing: float) -> None:
    """With the gradient, in double precision."""
    answers = []
    for is_ours in (True, False):
        torch.manual_seed(0)
        images, texts = (F.normalize(torch.randn(7, 4).double(), dim=-1).requires_grad_() for _ in range(2))
        scale = torch.tensor(7.0).double()
        if is_ours:
            objective = Objective({"infonce": InfoNCE(label_smoothing=smoothing, tile_size=3)})
            loss = objective({"image_embeds": images, "text_embeds": texts[:, None]}, scale)["loss"]
        else:
            logits, targets = scale * images @ texts.t(), torch.arange(7)
            loss = sum(F.cross_entropy(one, targets, label_smoothing=smoothing) for one in (logits, logits.t())) / 2
        loss.backward()
        answers.append((loss, images.grad, texts.grad))
    torch.testing.assert_close(*answers, rtol=0.0, atol=1e-13)


# Primary components


def long_clips(images: torch.Tensor, num_components: int) -> torch.Tensor:
    """Long-CLIP's way: the eigenvectors of the covariance with the largest eigenvalues."""
    mean = images.mean(0)
    centred = images - mean
    vectors = torch.linalg.eigh(centred.t() @ centred).eigenvectors[:, -num_components:]
    return centred @ vectors @ vectors.t() + mean


@pytest.mark.parametrize("batch_size", [4, 20])  # fewer and more than dimensions
def test_primary_components_are_long_clips(batch_size: int) -> None:
    images = embeddings(batch_size, 8).double()
    torch.testing.assert_close(primary_components(images, 2), long_clips(images, 2), **TOLERANCE)


def test_all_components_are_the_images() -> None:
    images = embeddings(6, 8)
    torch.testing.assert_close(primary_components(images, 6), images, **TOLERANCE)
    torch.testing.assert_close(primary_components(images, 32), images, **TOLERANCE)


def test_the_gradient_through_components_is_their_projection() -> None:
    images = embeddings(4, 8).requires_grad_()
    weights = torch.randn(4, 8)
    (primary_components(images, 2) * weights).sum().backward()
    components = torch.linalg.svd((images - images.mean(0)).detach(), full_matrices=False).Vh[:2]
    mean = weights.mean(0)
    torch.testing.assert_close(images.grad, mean + (weights - mean) @ components.t() @ components, **TOLERANCE)


def test_components_of_equal_images_have_a_gradient() -> None:
    images = torch.ones(4, 8, requires_grad=True)
    primary_components(images, 2).sum().backward()
    assert images.grad.isfinite().all()


def test_components_in_half_precision() -> None:
    images = embeddings(6, 8)
    answer = primary_components(images.bfloat16(), 3)
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer.float(), primary_components(images, 3), rtol=0.0, atol=0.03)


# Options


def chosen(*argv: str) -> Objective:
    model_config = LoTLIPConfig(short_loss_weight=3.0, projection_dim=24)
    return make_objective(parse_arguments(["--seed", "4", *argv]), model_config)


def test_terms_have_weights_options_and_the_models_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TERMS, "guess", Guess)
    (infonce,) = chosen().terms.values()
    assert type(infonce) is InfoNCE
    assert (infonce.short_loss_weight, infonce.long_loss_weight, infonce.label_smoothing) == (3.0, 1.0, 0.0)
    words = "--terms guess:0.5 sigmoid:0 primary_components --term-options guess.power=4 sigmoid.tile_size=3"
    state = torch.get_rng_state()
    objective = chosen(*words.split(), "primary_components.short_loss_weight=.25")
    assert torch.equal(torch.get_rng_state(), state)
    guess, components = objective.terms.values()
    assert objective.weights == {"guess": 0.5, "primary_components": 1.0}
    assert objective.needs == {"image_embeds", "text_embeds", "corner_embeds", "tags"}
    assert type(components) is PrimaryComponents
    assert (components.num_components, components.short_loss_weight) == (32, 0.25)
    assert guess.power == 4
    assert guess.map.weight.shape == (24, 24)
    assert torch.equal(guess.map.weight, chosen(*words.split()).terms["guess"].map.weight)  # by the seed


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--terms", "triplet"], ["`terms`", "triplet", "infonce, sigmoid"]),
        (["--terms", "infonce", "infonce:2"], ["`terms`", "infonce", "twice"]),
        (["--terms", "infonce:x"], ["`terms", "infonce", "number"]),
        (["--terms", "infonce:nan"], ["`terms", "infonce", "finite"]),
        (["--terms", "infonce:-1"], ["`terms`", "infonce", "-1"]),
        (["--terms", "infonce:0"], ["`terms`", "infonce:0"]),
        (["--term-options", "infonce.smoothing=1"], ["`term_options`", "smoothing", "infonce.label_smoothing"]),
        (["--term-options", "infonce.label_smoothing=x"], ["`term_options", "infonce.label_smoothing", "number"]),
        (["--term-options", "infonce.label_smoothing=1"], ["`term_options`", "infonce", "`label_smoothing`"]),
        (["--term-options", "infonce.short_loss_weight=-1"], ["`term_options`", "`short_loss_weight`"]),
        (["--term-options", "infonce.tile_size=1.5"], ["`term_options", "tile_size", "whole number"]),
        (["--term-options", "infonce.tile_size=0"], ["`term_options`", "tile_size"]),
        (["--term-options", "sigmoid.tile_size=3"], ["`term_options`", "sigmoid.tile_size", "infonce"]),
        (["--term-options", "label_smoothing"], ["`term_options`", "name.option=value"]),
        (
            ["--terms", "primary_components", "--term-options", "primary_components.num_components=0"],
            ["num_components"],
        ),
        (["--loss", "infonce"], ["--loss", "--terms sigmoid", "infonce"]),
        (["--num-primary-components", "32"], ["--terms primary_components"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_option_is_named_with_what_there_is(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match="terms|option") as caught:
        parse_arguments(argv)
    assert all(word in str(caught.value) for word in words)


def test_python_is_checked_as_flags_are() -> None:
    options: dict[str, Any] = {"terms": "sigmoid", "term_options": ["sigmoid.long_loss_weight=2"]}
    assert TrainingConfig(**options).terms == ["sigmoid"]
    with pytest.raises(ValueError, match="terms"):
        TrainingConfig(terms=["nope"])
