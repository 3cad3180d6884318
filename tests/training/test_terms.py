"""The terms of the objective against naive formulations, and the options that choose them."""

from typing import Literal

import pytest
import torch
from test_new_term import Guess
from torch import nn
from torch.nn import functional as F

from lotlip_hf import LoTLIPConfig
from lotlip_hf.training.config import parse_arguments
from lotlip_hf.training.objective import Objective, make_objective
from lotlip_hf.training.terms import TERMS
from lotlip_hf.training.terms.infonce import InfoNCE
from lotlip_hf.training.terms.instance import Instance
from lotlip_hf.training.terms.primary_components import PrimaryComponents, primary_components
from lotlip_hf.training.terms.structure import Structure
from lotlip_hf.training.terms.views import Views

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def embeddings(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(shape), dim=-1)


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


# Terms with a teacher

TAUGHT = {"instance": Instance(), "structure": Structure(), "squared": Structure("squared")}


def with_teacher(term: nn.Module, texts: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return term(Views({"text_embeds": texts, "teacher_text_embeds": teacher}, torch.tensor(1.0)))


@pytest.mark.parametrize("name", TAUGHT)
def test_a_term_with_a_teacher(name: str) -> None:
    """By hand; ProCLIP's functions are these sums over the batch. It is 0 for a student that equals its teacher."""
    torch.manual_seed(0)
    texts, teacher = embeddings(6, 2, 5).double().requires_grad_(), embeddings(6, 2, 5).double()
    if name == "instance":
        expected = ((texts - teacher) ** 2).sum()
    else:
        differences = [
            (texts[i, 0] - texts[j, 0]).norm() - (teacher[i, 0] - teacher[j, 0]).norm()
            for i in range(6)
            for j in range(i)
        ]
        halves = [each.square() / 2 if each.abs() < 1 else each.abs() - 0.5 for each in differences]
        expected = torch.stack(halves if name == "structure" else differences)
        expected = expected.sum() if name == "structure" else expected.square().sum()
    torch.testing.assert_close(with_teacher(TAUGHT[name], texts, teacher), expected / 6, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda student: with_teacher(TAUGHT[name], student, teacher), texts)
    assert with_teacher(TAUGHT[name], teacher, teacher) == 0


@pytest.mark.parametrize("distance", ["smooth_l1", "squared"])
def test_the_structure_is_unchanged_by_a_rotation(distance: Literal["smooth_l1", "squared"]) -> None:
    torch.manual_seed(0)
    texts, teacher = embeddings(6, 2, 5), embeddings(6, 2, 5)
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q
    term = Structure(distance)
    expected = with_teacher(term, texts, teacher)
    torch.testing.assert_close(with_teacher(term, texts @ rotation, teacher), expected, **TOLERANCE)
    assert with_teacher(term, teacher @ rotation, teacher) < 1e-6
    assert with_teacher(Instance(), teacher @ rotation, teacher) > 0.1


def test_equal_texts_have_a_gradient() -> None:
    texts = embeddings(1, 2, 5).expand(4, 2, 5).clone().requires_grad_()
    with_teacher(Structure(), texts, embeddings(4, 2, 5)).backward()
    assert texts.grad.isfinite().all()


# Options


def chosen(*argv: str) -> Objective:
    model_config = LoTLIPConfig(short_loss_weight=3.0, projection_dim=24)
    return make_objective(parse_arguments(["--seed", "4", *argv]), model_config)


def test_terms_have_weights_options_and_the_models_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TERMS, "guess", Guess)
    (infonce,) = chosen().terms.values()
    assert type(infonce) is InfoNCE
    assert (infonce.short_loss_weight, infonce.long_loss_weight, infonce.label_smoothing) == (3.0, 1.0, 0.0)
    words = "--terms guess:0.5 sigmoid:0 primary_components --term-options guess.power=4 sigmoid.long_loss_weight=3"
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
        (["--terms", "infonce:0"], ["`terms`", "infonce:0"]),
        (["--term-options", "infonce.smoothing=1"], ["`term_options`", "smoothing", "infonce.label_smoothing"]),
        (["--term-options", "infonce.label_smoothing=1"], ["`term_options`", "infonce", "`label_smoothing`"]),
        (["--term-options", "infonce.short_loss_weight=-1"], ["`term_options`", "`short_loss_weight`"]),
        (["--term-options", "sigmoid.long_loss_weight=3"], ["`term_options`", "sigmoid.long_loss_weight", "infonce"]),
        (["--term-options", "label_smoothing"], ["`term_options`", "name.option=value"]),
        (
            ["--terms", "primary_components", "--term-options", "primary_components.num_components=0"],
            ["num_components"],
        ),
        (["--terms", "instance"], ["`terms`", "instance", "`teacher`"]),
        (["--terms", "infonce", "instance:0", "--teacher", "clip"], ["`teacher`", "term"]),
        (
            ["--terms", "structure", "--teacher", "clip", "--term-options", "structure.distance=cubed"],
            ["`term_options", "structure.distance", "smooth_l1"],
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
