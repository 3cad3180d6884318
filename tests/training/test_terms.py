"""The terms of the objective against naive formulations, and the options that choose them."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from test_new_term import Guess
from torch import nn
from torch.nn import functional as F

from lotlip_hf import LoTLIPConfig
from lotlip_hf.cli import main as lotlip
from lotlip_hf.data.collator import group_key
from lotlip_hf.data.record import texts_digest
from lotlip_hf.encoder import load_encoder
from lotlip_hf.regions import overlaps
from lotlip_hf.scenes.dataset import scene, short_caption
from lotlip_hf.scenes.small import small_model
from lotlip_hf.training.checkpoint import list_checkpoints
from lotlip_hf.training.config import parse_arguments
from lotlip_hf.training.objective import Objective, make_objective
from lotlip_hf.training.terms import TERMS
from lotlip_hf.training.terms import tags as tags_of
from lotlip_hf.training.terms.caption_margin import CaptionMargin
from lotlip_hf.training.terms.cosine import Cosine
from lotlip_hf.training.terms.distribution import Distribution
from lotlip_hf.training.terms.groups import Groups
from lotlip_hf.training.terms.hard_negatives import HardNegatives
from lotlip_hf.training.terms.infonce import InfoNCE
from lotlip_hf.training.terms.instance import Instance
from lotlip_hf.training.terms.margin import Margin, with_margin
from lotlip_hf.training.terms.masked_words import MaskedWords
from lotlip_hf.training.terms.negatives import Negatives
from lotlip_hf.training.terms.primary_components import PrimaryComponents, primary_components
from lotlip_hf.training.terms.regions import Regions
from lotlip_hf.training.terms.similarities import Similarities
from lotlip_hf.training.terms.soft_labels import SoftLabels
from lotlip_hf.training.terms.structure import Structure
from lotlip_hf.training.terms.tags import Tags
from lotlip_hf.training.terms.views import Views

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
EXACT = {"rtol": 0.0, "atol": 1e-12}
VOCABULARY = Path(__file__).with_name("vocabulary.txt")
CLASSES = Path(__file__).with_name("classes.txt")


def embeddings(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(shape), dim=-1)


def tensors(batch_size: int = 6, num_texts: int = 3) -> dict[str, torch.Tensor]:
    """Random tensors of each name that a term needs, in float64, with 5 dimensions."""
    torch.manual_seed(0)
    shapes = {
        "image_embeds": (),
        "image_embeds_2": (),
        "text_embeds": (num_texts,),
        "corner_embeds": (num_texts - 1, 2),
        "negative_embeds": (2,),
        "patch_embeds": (4,),
        "masked_token_embeds": (7,),
        "teacher_image_embeds": (),
        "teacher_text_embeds": (num_texts,),
        "region_embeds": (3,),
    }
    made = {name: embeddings(batch_size, *shape, 5).double() for name, shape in shapes.items()}
    tags = [[texts_digest(["blue"]), texts_digest(["small"])], [texts_digest(["red"]), 0], [0, 0]]
    return {
        **made,
        "tags": torch.tensor(tags).repeat(batch_size, 1)[:batch_size],
        "groups": torch.tensor([group_key({"group": str(row % 4)}) for row in range(batch_size)]),
        "masked_token_mask": torch.arange(7) < torch.arange(2, 2 + batch_size).unsqueeze(1),
        "masked_labels": torch.tensor([3, -100, -100, -100, 8, 1, -100]).repeat(batch_size, 1, 1),
        "negative_mask": (torch.arange(2 * batch_size) % 3 > 0).view(batch_size, 2),
        "boxes": torch.rand(batch_size, 3, 2, 2).double().sort(dim=2).values.flatten(2),
        "region_keys": torch.arange(3 * batch_size).view(batch_size, 3) % 11,
        "box_mask": (torch.arange(3 * batch_size) % 4 > 0).view(batch_size, 3),
    }


def loss_of(term: nn.Module, embeds: dict[str, torch.Tensor], logit_scale: float = 7.0) -> torch.Tensor:
    loss = term(Views(embeds, torch.tensor(logit_scale, dtype=torch.float64)))
    return sum(loss.values()) if isinstance(loss, dict) else loss


# Gradients. Those of primary components and of soft labels are not of the loss alone: both hold something constant.
TAGGED = {"vocabulary": VOCABULARY, "projection_dim": 5}
DIFFERENTIABLE: list[tuple[str, dict[str, Any]]] = [
    ("infonce", {"label_smoothing": 0.1}),
    ("sigmoid", {}),
    ("soft_labels", {"share": 0.0}),
    ("hard_negatives", {"number": 3, "temperature": 0.2}),
    ("negatives", {}),
    ("tags", TAGGED),
    ("distribution", {}),
    ("margin", {"classes": CLASSES, "margin": 0.4, "scale": 5.0, "projection_dim": 5}),
    ("caption_margin", {"margin": 0.4, "scale": 5.0}),
    ("groups", {"hard_negatives": 2, "temperature": 0.3}),
    ("groups", {"image_weight": 0.6}),
    ("masked_words", {"num_layers": 1, "projection_dim": 5, "vocab_size": 9}),
    ("region_text", {"grounding": 0.5, "width": 8, "projection_dim": 5}),
    ("regions", {"queries": 4, "layers": 2, "width": 8, "projection_dim": 5}),
    ("instance", {"of": "both"}),
    ("structure", {"of": "both"}),
    ("structure", {"of": "image", "distance": "squared"}),
    ("similarities", {"of": "both", "temperature": 0.5}),
    ("cosine", {"of": "both"}),
    ("two_views", {"label_smoothing": 0.1}),
    ("simclr", {"width": 8, "output": 4, "projection_dim": 5}),
    ("byol", {"width": 8, "output": 4, "projection_dim": 5}),
]


@pytest.mark.parametrize(("name", "options"), DIFFERENTIABLE, ids=str)
def test_the_gradient_is_that_of_finite_differences(name: str, options: dict[str, Any]) -> None:
    term, given = TERMS[name](**options).double(), tensors()
    own = [each for each in given if "_embeds" in each and each in term.needs and "teacher" not in each]

    def function(*values: torch.Tensor) -> torch.Tensor:
        return loss_of(term, {**given, **dict(zip(own, values, strict=True))})

    assert torch.autograd.gradcheck(function, [given[each].requires_grad_() for each in own], fast_mode=True)


# The authors' functions (tests/golden/terms/README.md)


def test_hard_negatives_are_unimes(golden: Path) -> None:
    file = load_file(golden / "terms" / "unime.safetensors")
    queries, keys = file["queries"].requires_grad_(), file["keys"].requires_grad_()
    for direction, images, texts in (("image", queries, keys), ("text", keys, queries)):
        embeds = {"image_embeds": images, "text_embeds": texts.unsqueeze(1)}
        loss = loss_of(HardNegatives(directions=direction), embeds)
        torch.testing.assert_close(loss.detach(), file["loss"], **EXACT)
        for grad, name in zip(torch.autograd.grad(loss, [queries, keys]), ("queries", "keys"), strict=True):
            torch.testing.assert_close(grad, file[f"{name}_grad"], **EXACT)


def test_primary_components_with_smoothed_labels_are_long_clip(golden: Path) -> None:
    """Its weights are ours times the number of features. Its gradient of the images differs by design."""
    file = load_file(golden / "terms" / "long_clip.safetensors")
    images, long, short = (file[name].float().requires_grad_() for name in ("images", "long", "short"))
    embeds = {"image_embeds": F.normalize(images, dim=-1)}
    embeds["text_embeds"] = F.normalize(torch.stack([short, long], dim=1), dim=-1)
    term = PrimaryComponents(short_loss_weight=2.0, long_loss_weight=2.0, label_smoothing=0.1)
    losses = term(Views(embeds, torch.tensor(20.0)))
    sum(losses.values()).backward()
    for name, texts in {"long": long, "short": short}.items():
        torch.testing.assert_close(losses[name].detach(), file[f"loss_{name}"], rtol=1e-6, atol=0)
        torch.testing.assert_close(texts.grad, file[f"{name}_grad"], rtol=0, atol=1e-6)


def test_the_distribution_is_that_of_ga_dms(golden: Path) -> None:
    """Whose logarithms are of float32."""
    file = load_file(golden / "terms" / "ga_dms.safetensors")
    images, texts = file["images"].requires_grad_(), file["texts"].requires_grad_()
    embeds = {"image_embeds": F.normalize(images, dim=-1), "text_embeds": F.normalize(texts, dim=-1).unsqueeze(1)}
    loss = loss_of(Distribution(), {**embeds, "groups": file["groups"]}, 50.0)
    loss.backward()
    for tensor, name in ((loss.detach(), "loss"), (images.grad, "images_grad"), (texts.grad, "texts_grad")):
        torch.testing.assert_close(tensor, file[name], rtol=1e-6, atol=1e-6)


def test_infonce_of_short_texts_is_laclips(golden: Path) -> None:
    file = load_file(golden / "terms" / "laclip.safetensors")
    images, texts = file["images"].requires_grad_(), file["texts"].requires_grad_()
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    embeds = {"image_embeds": F.normalize(images, dim=-1), "text_embeds": F.normalize(texts, dim=-1).unsqueeze(1)}
    loss = InfoNCE()(Views(embeds, scale))["short"]
    loss.backward()
    torch.testing.assert_close(loss.detach(), file["loss"], **EXACT)
    for tensor, name in ((images, "images"), (texts, "texts"), (scale, "scale")):
        torch.testing.assert_close(tensor.grad, file[f"{name}_grad"], **EXACT)


def test_regions_are_grains(golden: Path) -> None:
    """Its code adds 1e-4 to the union of boxes, and weights both losses of boxes with 1.5."""
    file = load_file(golden / "terms" / "grain.safetensors")
    mask, known = file["mask"] > 0, file["boxes"]
    boxes, embeds, texts = (file[name].requires_grad_() for name in ("pred_boxes", "embeds", "texts"))
    views = {"region_embeds": F.normalize(texts, dim=-1), "boxes": known, "box_mask": mask}
    views["region_keys"] = torch.arange(mask.numel()).view(mask.shape)
    term = Regions(l1=1.5, giou=1.5, layers=1, width=8, projection_dim=6)
    losses = term.losses(boxes, F.normalize(embeds, dim=-1), Views(views, torch.tensor(20.0)))
    torch.testing.assert_close(losses["l1"] / 1.5, file["loss_l1"], **EXACT)
    torch.testing.assert_close(losses["giou"] / 1.5, file["loss_giou"], rtol=1e-3, atol=0)
    torch.testing.assert_close(losses["description"], file["loss_description"], **EXACT)
    for grad, name in zip(
        torch.autograd.grad(losses["description"], [embeds, texts]), ("embeds", "texts"), strict=True
    ):
        torch.testing.assert_close(grad, file[f"{name}_grad"], **EXACT)
    box_loss = losses["l1"] + losses["giou"]
    torch.testing.assert_close(box_loss, file["box_loss"], rtol=1e-3, atol=0)
    torch.testing.assert_close(*torch.autograd.grad(box_loss, boxes), file["box_grad"], rtol=0, atol=5e-3)
    torch.testing.assert_close(
        overlaps(known[mask].unsqueeze(1), known[mask].flip(0))[1], file["giou"], rtol=0, atol=1e-7
    )


# Negatives, tags, regions and labels


@pytest.mark.parametrize(("margin", "is_left_out"), [(0.1, True), (3.0, False)])
def test_a_duplicate_is_no_hard_negative(margin: float, is_left_out: bool) -> None:
    """A text that is nearer to an image than the image's own by more than the margin has no gradient from it."""
    given = tensors(num_texts=1)
    given["text_embeds"][4, 0] = given["image_embeds"][1]
    cosines = (given["image_embeds"] @ given["text_embeds"][:, 0].t()).requires_grad_()
    HardNegatives(margin=margin).loss(cosines, torch.eye(6, dtype=torch.bool)).backward()
    assert cosines.grad.isfinite().all()
    assert (cosines.grad[1, 4] == 0) == is_left_out


@pytest.mark.parametrize("name", ["hard_negatives", "soft_labels", "similarities", "caption_margin", "groups"])
def test_a_batch_of_one_sample_has_no_loss(name: str) -> None:
    given = tensors(1)
    given["text_embeds"].requires_grad_()
    loss = loss_of(TERMS[name](), given)
    loss.backward()
    assert loss == 0
    assert given["text_embeds"].grad.isfinite().all()


def test_soft_labels_without_a_share_are_infonce() -> None:
    given, options = tensors(), {"short_loss_weight": 0.5, "long_loss_weight": 2.0}
    expected = loss_of(InfoNCE(**options), given)
    torch.testing.assert_close(loss_of(SoftLabels(0.0, **options), given), expected, **EXACT)
    assert loss_of(SoftLabels(0.3, **options), given) != expected


def test_negatives_are_those_of_records_that_have_some() -> None:
    """And their matches are the long texts, or the short ones if there are no long ones."""
    given = tensors()
    has_some = given["negative_mask"].any(1)
    given["negative_mask"][2:4] = has_some[2:4] = False
    expected = loss_of(Negatives(), {name: value[has_some] for name, value in given.items()})
    torch.testing.assert_close(loss_of(Negatives(), given), expected, **EXACT)
    other_short = {**given, "text_embeds": torch.cat([-given["text_embeds"][:, :1], given["text_embeds"][:, 1:]], 1)}
    assert loss_of(Negatives(), other_short) == loss_of(Negatives(), given)
    images, texts = given["image_embeds"], given["text_embeds"][:, :1].clone().requires_grad_()
    one = {"image_embeds": images, "text_embeds": texts, "negative_embeds": given["negative_embeds"][:, :1]}
    one["negative_mask"] = torch.ones(6, 1, dtype=torch.bool)
    logits = 7 * torch.stack([(images * each[:, 0]).sum(1) for each in (texts, one["negative_embeds"])], 1)
    expected = F.cross_entropy(logits, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(loss_of(Negatives(), one), expected, **EXACT)
    nothing = loss_of(Negatives(), {**one, "negative_mask": torch.zeros(6, 1, dtype=torch.bool)})
    nothing.backward()
    assert nothing == 0
    assert texts.grad.isfinite().all()


@pytest.mark.parametrize("is_kept", [False, True])
def test_masked_words_see_no_padding(is_kept: bool) -> None:
    """Neither of texts nor of patches, and nothing is learnt where nothing is masked."""
    term, given = MaskedWords(1, 5, 9).double(), tensors()
    expected = loss_of(term, given)
    padded = {**given, "patch_embeds": torch.cat([given["patch_embeds"], embeddings(6, 2, 5)], 1)}
    padded["pixel_attention_mask"] = (torch.arange(6) < 4).repeat(6, 1).long()
    if is_kept:
        order = torch.tensor([5, 2, 0, 1, 3, 4])
        padded["patch_embeds"] = padded["patch_embeds"][:, order]
        padded["kept_patches"] = order.repeat(6, 1)
    for name, padding in (("token_embeds", embeddings(6, 3, 5)), ("token_mask", torch.zeros(6, 3, dtype=torch.bool))):
        padded[f"masked_{name}"] = torch.cat([given[f"masked_{name}"], padding], 1)
    padded["masked_labels"] = F.pad(given["masked_labels"], (0, 3), value=-100)
    torch.testing.assert_close(loss_of(term, padded), expected, **EXACT)
    nothing = loss_of(term, {**given, "masked_labels": torch.full((6, 1, 7), -100)})
    nothing.backward()
    assert nothing == 0
    assert not any(parameter.grad.any() for parameter in term.parameters())


@pytest.mark.parametrize("name", ["region_text", "regions"])
def test_regions_are_those_of_records_that_have_some(name: str) -> None:
    """Equal texts are no negatives of each other, and where no record has regions nothing is trained."""
    small = {"layers": 1, "queries": 3} if name == "regions" else {"grounding": 1.0}
    term, given = TERMS[name](width=8, projection_dim=5, **small).double(), tensors()
    given["box_mask"][2:4] = False
    some = given["box_mask"].any(1)
    expected = loss_of(term, {key: value[some] for key, value in given.items()})
    torch.testing.assert_close(loss_of(term, given), expected, **EXACT)
    equal, contrast = {**given, "region_keys": torch.zeros(6, 3, dtype=torch.long)}, {"region_text": "contrast"}
    part = contrast.get(name, "description")
    assert term(Views(equal, torch.tensor(7.0)))[part] == 0 < term(Views(given, torch.tensor(7.0)))[part]
    nothing = loss_of(term, {**given, "box_mask": torch.zeros(6, 3, dtype=torch.bool)})
    nothing.backward()
    assert nothing == 0
    assert not any(each.grad.any() for each in term.parameters() if each.grad is not None)


# Groups


def test_a_margin_turns_the_target() -> None:
    """By hand: the angle grows by the margin, and where it would pass pi, the loss still falls with the angle."""
    angles = torch.linspace(0.1, torch.pi - 0.1, 30, dtype=torch.float64)
    moved = with_margin(angles.cos(), 0.5)
    is_small = angles < torch.pi - 0.5
    torch.testing.assert_close(moved[is_small], (angles + 0.5).cos()[is_small], **EXACT)
    assert (moved.diff() < 0).all()
    ends = torch.tensor([1.0, -1.0], requires_grad=True)
    with_margin(ends, 0.5).sum().backward()
    assert ends.grad.isfinite().all()


def test_without_a_margin_it_is_a_plain_softmax() -> None:
    """Of the records with a known class alone; without any, nothing is trained."""
    term, given = Margin(CLASSES, 0.0, 3.0, 5).double(), tensors()
    given["groups"][2] = group_key({"id": "a picture without a group"})
    known = [row for row in range(6) if row != 2]
    targets = torch.tensor([term.digests.tolist().index(group) for group in given["groups"][known].tolist()])
    logits = 3 * given["image_embeds"][known] @ F.normalize(term.prototypes, dim=1).t()
    torch.testing.assert_close(loss_of(term, given), F.cross_entropy(logits, targets), **EXACT)
    assert loss_of(Margin(CLASSES, 0.3, 3.0, 5).double(), given) != loss_of(term, given)
    nothing = loss_of(term, {**given, "groups": torch.arange(6)})
    nothing.backward()
    assert nothing == 0
    assert not term.prototypes.grad.any()


def test_captions_without_a_margin_are_told_from_those_of_other_classes() -> None:
    """With a caption and a class each it is half of InfoNCE: images find texts."""
    given = tensors(num_texts=1)
    given["groups"] = torch.arange(6)
    expected = F.cross_entropy(4 * given["image_embeds"] @ given["text_embeds"][:, 0].t(), torch.arange(6))
    torch.testing.assert_close(loss_of(CaptionMargin(0.0, 4.0), given), expected, **EXACT)
    assert loss_of(CaptionMargin(0.0, 4.0), {**given, "groups": torch.arange(6) // 2}) < expected
    given["text_embeds"].requires_grad_()
    one_class = loss_of(CaptionMargin(), {**given, "groups": torch.zeros(6, dtype=torch.long)})
    one_class.backward()
    assert one_class == 0
    assert not given["text_embeds"].grad.any()


def test_groups_of_one_have_no_loss_and_those_of_two_that_of_infonce() -> None:
    given = tensors(num_texts=1)
    given["image_embeds"].requires_grad_()
    alone = loss_of(Groups(), {**given, "groups": torch.arange(6)})
    alone.backward()
    assert alone == 0
    assert not given["image_embeds"].grad.any()
    given["groups"] = torch.tensor([5, 3, 3, 8, 5, 8])
    pooled = F.normalize(0.3 * given["image_embeds"] + 0.7 * given["text_embeds"][:, 0], dim=1)
    logits = (pooled @ pooled.t() / 0.1).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits, torch.tensor([4, 2, 1, 5, 0, 3]))
    torch.testing.assert_close(loss_of(Groups(), given), expected, **EXACT)
    torch.testing.assert_close(loss_of(Groups(hard_negatives=4), given), expected, **EXACT)
    assert loss_of(Groups(hard_negatives=1), given) < expected


def test_prototypes_belong_to_their_groups(tmp_path: Path) -> None:
    """A resumed run keeps them, in whatever order the file is; lines are groups as they are written."""
    term, given = Margin(CLASSES, projection_dim=5).double(), tensors()
    (tmp_path / "classes.txt").write_text("0\n1\n2\n3\n4\n4\n\n", encoding="utf-8")
    resumed = Margin(tmp_path / "classes.txt", projection_dim=5).double()
    resumed.load_state_dict(term.state_dict())
    assert loss_of(resumed, given) == loss_of(term, given)
    (tmp_path / "classes.txt").write_text("a\nA\n A", encoding="utf-8")
    assert len(Margin(tmp_path / "classes.txt").prototypes) == 3


def test_tags_are_classes_in_the_order_of_the_file(tmp_path: Path) -> None:
    """A resumed run keeps the order that it started with."""
    term = Tags(VOCABULARY, 5).double()
    tags = [["Large  Square", "RED"], ["green"], ["green", "blue"]]
    digests = torch.tensor([[texts_digest([tag]) for tag in (row + row)[:2]] for row in tags])
    assert term.targets(digests).tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert term.head.weight.shape == (4, 5)
    (tmp_path / "tags.txt").write_text("small\nred\nblue\nlarge square", encoding="utf-8")
    resumed = Tags(tmp_path / "tags.txt", 5)
    assert not torch.equal(resumed.targets(digests), term.targets(digests))
    resumed.load_state_dict(term.state_dict())
    assert torch.equal(resumed.targets(digests), term.targets(digests))
    loss = loss_of(term, {"image_embeds": tensors(2)["image_embeds"], "tags": torch.zeros(2, 1, dtype=torch.long)})
    loss.backward()
    assert loss == 0
    assert not term.head.weight.grad.any()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "tags.txt"),
        (b"", "vocabulary"),
        (b"\n \n", "vocabulary"),
        (b"\xff\xfe", "UTF-8"),
        (b"one\ntwo\nthree\nfour\n", "vocabulary"),
        (b"x" * 65, "64"),
    ],
)
def test_a_wrong_vocabulary_is_refused(
    content: bytes | None, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tags_of, "MAX_TAGS", 3)
    monkeypatch.setattr(tags_of, "MAX_BYTES", 64)
    file = tmp_path / "tags.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=word) as caught:
        parse_arguments(["--terms", "tags", "--term-options", f"tags.vocabulary={file}"])
    assert "tags.txt" in str(caught.value)


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
OF_BOTH = {"instance": Instance, "structure": Structure, "similarities": Similarities, "cosine": Cosine}


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


@pytest.mark.parametrize("name", OF_BOTH)
def test_a_term_of_both_is_that_of_images_and_of_the_texts_that_the_teacher_has(name: str) -> None:
    given = tensors()
    given["teacher_text_embeds"] = given["teacher_text_embeds"][:, :2]
    cut = {**given, "text_embeds": given["text_embeds"][:, :2]}
    image, text = (OF_BOTH[name](of=kind) for kind in ("image", "text"))
    assert image.needs == {"image_embeds", "teacher_image_embeds"}
    assert text.needs == OF_BOTH[name]().needs == {"text_embeds", "teacher_text_embeds"}
    single = {name: given[name].unsqueeze(1) for name in ("image_embeds", "teacher_image_embeds")}
    as_text = {name.replace("image", "text"): value for name, value in single.items()}
    torch.testing.assert_close(loss_of(image, given), loss_of(text, as_text), **EXACT)
    torch.testing.assert_close(loss_of(text, given), loss_of(text, cut), **EXACT)
    both = OF_BOTH[name](of="both")
    torch.testing.assert_close(loss_of(both, given), loss_of(image, given) + loss_of(text, given), **EXACT)
    equal = {**given, **{f"teacher_{kind}": given[kind] for kind in ("image_embeds", "text_embeds")}}
    assert loss_of(both, equal).abs() < 1e-12 < loss_of(both, given)


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


def cosines(checkpoint: Path, texts: list[str]) -> torch.Tensor:
    """Between each two of some texts."""
    encoder = load_encoder(str(checkpoint))
    rows = {index: embedding for index, embedding, _ in encoder.iterate_texts(texts)}
    vectors = torch.stack([rows[index] for index in range(len(texts))])
    return (vectors @ vectors.t())[torch.ones(len(texts), len(texts)).triu(1) > 0]


@pytest.mark.slow
def test_similarities_of_new_captions_of_scenes_become_those_of_the_teacher(tmp_path: Path) -> None:
    """The correlation was 0.34 before and 0.49 after 40 steps."""
    for name, parts in {
        "teacher": small_model(hidden_size=32, num_hidden_layers=1),
        "student": small_model(0, hidden_size=32, num_hidden_layers=1, seed=1),
    }.items():
        for part in parts:
            part.save_pretrained(tmp_path / name)
    flags = "--lock-text --data scenes --num-scenes 64 --batch-size 16 --max-steps 40 --num-workers 0 --no-cache "
    flags += "--learning-rate 1e-2 --trackers none --terms similarities --term-options similarities.temperature=0.1"
    paths = {"--model": tmp_path / "student", "--teacher": tmp_path / "teacher", "--output": tmp_path / "run"}
    assert lotlip(["train", *flags.split(), *(word for pair in paths.items() for word in map(str, pair))]) == 0
    texts = list(dict.fromkeys(short_caption(scene(10_000 + number)) for number in range(64)))
    checkpoints = (tmp_path / "teacher", tmp_path / "student", list_checkpoints(tmp_path / "run")[-1])
    _, before, after = torch.corrcoef(torch.stack([cosines(each, texts) for each in checkpoints]))[0].tolist()
    assert after > before + 0.1


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
    assert objective.needs == {"image_embeds", "text_embeds", "corner_embeds", "labels"}
    assert type(components) is PrimaryComponents
    assert (components.num_components, components.short_loss_weight) == (32, 0.25)
    assert guess.power == 4
    assert guess.map.weight.shape == (24, 24)
    assert torch.equal(guess.map.weight, chosen(*words.split()).terms["guess"].map.weight)  # by the seed


@pytest.mark.parametrize("name", TERMS)
def test_a_term_with_weight_0_is_left_out(name: str) -> None:
    others = [other for other in ("infonce", "sigmoid") if other != name]
    objective, plain = chosen("--terms", *others, f"{name}:0"), chosen("--terms", *others)
    assert objective.terms.keys() == plain.terms.keys()
    assert (objective.weights, objective.needs) == (plain.weights, plain.needs)


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
        (["--terms", "tags"], ["`term_options`", "tags", "`vocabulary`"]),
        (["--terms", "similarities"], ["similarities", "`teacher`"]),
        (["--terms", "margin"], ["`term_options`", "margin", "`classes`"]),
        (["--terms", "caption_margin", "--term-options", "caption_margin.margin=4"], ["`margin`", "4"]),
        (["--terms", "groups", "--term-options", "groups.temperature=0"], ["`temperature`"]),
        (["--terms", "groups", "--term-options", "groups.image_weight=2"], ["`image_weight`"]),
        (["--terms", "hard_negatives", "--term-options", "hard_negatives.number=0"], ["`number`"]),
        (
            ["--terms", "hard_negatives", "--term-options", "hard_negatives.directions=up"],
            ["directions", "image, text"],
        ),
        (["--terms", "masked_words", "--term-options", "masked_words.num_layers=0"], ["`num_layers`"]),
        (["--terms", "soft_labels", "--term-options", "soft_labels.share=1"], ["`share`"]),
        (["--terms", "region_text", "--term-options", "region_text.grounding=-1"], ["`grounding`"]),
        (["--terms", "region_text", "--term-options", "region_text.width=102"], ["region_text", "`width`"]),
        (["--terms", "regions", "--term-options", "regions.queries=0"], ["`queries`"]),
        (["--terms", "regions", "--term-options", "regions.giou=-1"], ["`giou`"]),
        (["--loss", "infonce"], ["--loss", "--terms sigmoid", "infonce"]),
        (["--num-primary-components", "32"], ["--terms primary_components"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_option_is_named_with_what_there_is(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match="terms|option") as caught:
        parse_arguments(argv)
    assert all(word in str(caught.value) for word in words)
