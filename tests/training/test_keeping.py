"""The choice of patches by attention, and two views of an image (A-CLIP): functions, batches and whole runs."""

import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from test_training import config, log_of
from torch import nn
from torch.nn import functional as F

import tiny
from lotlip_hf import LoTLIPConfig, LoTLIPModel, LoTLIPProcessor, LoTLIPVisionConfig, LoTLIPVisionModel
from lotlip_hf.attribution import eager
from lotlip_hf.data.augment import Augment
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.sampling import WholeCaptions
from lotlip_hf.evaluation.retrieval import recalls
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.scenes.small import small_model
from lotlip_hf.training.checkpoint import list_checkpoints
from lotlip_hf.training.data import load_data
from lotlip_hf.training.keeping import attention_scores, check_attention, kept_by_score, scores_of_view
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model
from lotlip_hf.training.objective import Objective, embed
from lotlip_hf.training.teachers import make_teacher
from lotlip_hf.training.terms.byol import BYOL
from lotlip_hf.training.terms.simclr import SimCLR
from lotlip_hf.training.terms.two_views import TwoViews
from lotlip_hf.training.terms.views import Views
from seams import assert_same_in_chunks, train_alone_and_together

pytestmark = pytest.mark.usefixtures("alone")
EXACT = {"rtol": 0.0, "atol": 1e-10}
ATTENTION = {"patch_dropout": 0.5, "patch_choice": "attention", "teacher": "ema", "teacher_momentum": 0.9}
SMALL = [f"{name}.{option}=8" for name in ("simclr", "byol") for option in ("width", "output")]
VIEWS = {"image_views": 2, "augment": ["crop:0.5", "flip:0.5"], "term_options": SMALL}
A_CLIP = {**ATTENTION, **VIEWS, "terms": ["two_views", "simclr", "byol:2"]}


# The authors' functions (tests/golden/terms/README.md)


def test_the_kept_patches_are_those_of_a_clip(golden: Path) -> None:
    """100 of 196 patches. A view's scores differ a little: A-CLIP resizes to whole pixels in between."""
    file = load_file(golden / "terms" / "a_clip.safetensors")
    for name in ("scores", "scores_1", "scores_2"):
        kept = kept_by_score(file[name], (14, 14), 0.5)
        assert kept.shape == (3, 100)
        if name == "scores":
            dropped = file["dropped"].bool()
            assert torch.equal(torch.ones_like(dropped).scatter(1, kept, False), dropped)
    positions = file["positions"].double()
    start, end = positions[..., :2], positions[..., :2] + positions[..., 2:]
    for view in (0, 1):
        edges = [(each[:, view] - start[:, 2]) / (end - start)[:, 2] for each in (start, end)]  # [3, top and left]
        boxes = torch.cat([edge.flip(1) for edge in edges], dim=1)
        scores = scores_of_view(file["scores"], (14, 14), boxes)
        torch.testing.assert_close(scores, file[f"scores_{view + 1}"], rtol=0, atol=0.05)
        assert (scores - file[f"scores_{view + 1}"]).abs().mean() < 0.01


def filled(head: nn.Module, name: str, file: dict[str, torch.Tensor]) -> None:
    for number, weight in enumerate(head.parameters()):
        weight.data = file[f"{name}.{number}"]


def test_the_terms_are_those_of_a_clip(golden: Path) -> None:
    file = load_file(golden / "terms" / "a_clip.safetensors")
    images = file["images"].requires_grad_()
    sizes: dict[str, Any] = {"width": 8, "output": 7, "projection_dim": 6}
    simclr, byol = SimCLR(**sizes), BYOL(**sizes)
    filled(simclr.head, "head", file)
    for name in ("projection", "predictor", "target"):
        filled(byol.get_submodule(name), name, file)
    first, second = images.chunk(2)
    plain = {"image_embeds": first, "image_embeds_2": second, "teacher_image_embeds": file["around"]}
    texts = F.normalize(file["texts"], dim=-1).unsqueeze(1)
    contrast = {**{name: F.normalize(value, dim=-1) for name, value in plain.items()}, "text_embeds": texts}
    scale = torch.tensor(20.0, dtype=torch.float64)
    for name, loss in {
        "simclr": simclr(Views(plain, scale)),
        "byol": byol(Views(plain, scale)),
        "contra": TwoViews()(Views(contrast, scale))["short"],
    }.items():
        torch.testing.assert_close(loss.detach(), file[name], **EXACT)
        (gradient,) = torch.autograd.grad(loss, images)
        torch.testing.assert_close(gradient, file[f"{name}_grad"], **EXACT)
    twice = F.normalize(file["ssl"][:5], dim=-1)  # A-CLIP's code passes the first view twice
    torch.testing.assert_close(simclr.loss(twice, twice), file["first_twice"], **EXACT)


def test_the_projection_for_the_teacher_follows() -> None:
    byol = BYOL(width=4, output=3, projection_dim=5)
    before = [each.clone() for each in byol.target.parameters()]
    with torch.no_grad():
        for weight in byol.projection.parameters():
            weight.add_(1)
    Objective({"byol": byol}).follow(0.75)
    for weight, own, first in zip(byol.target.parameters(), byol.projection.parameters(), before, strict=True):
        torch.testing.assert_close(weight, 0.75 * first + 0.25 * own)
        assert not weight.requires_grad


# Scores


def model_of(backbone: str, **options: Any) -> LoTLIPModel:
    vision = tiny.vision_config(backbone, **options)
    return LoTLIPModel(LoTLIPConfig(text_config=tiny.text_config(), vision_config=vision, projection_dim=24)).eval()


REGISTERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_register_tokens": 3}


@pytest.mark.parametrize("backbone", ["vit", "dinov2", "clip", "dinov2_with_registers", "dinov3_vit"])
def test_scores_are_the_attention_of_the_class_token(backbone: str) -> None:
    """Of DINOv3 after the rotation by positions; registers are no patches."""
    if "v3" in backbone or "registers" in backbone:
        config = {"model_type": backbone, **REGISTERS, "image_size": 32, "patch_size": 8}
        vision = LoTLIPVisionConfig(backbone_config=config)
        model = LoTLIPModel(LoTLIPConfig(text_config=tiny.text_config(), vision_config=vision)).eval()
    else:
        model = model_of(backbone)
    size = model.config.vision_config.backbone_config.image_size
    images = torch.randn(3, 3, size, size)
    first = model.config.vision_config.family.num_prefix_tokens(model.vision_model.backbone)
    with torch.no_grad():
        scores, embeds = attention_scores(model, pixel_values=images)
        assert model.vision_model.backbone.config._attn_implementation == "sdpa"
        with eager(model):
            outputs = model.get_image_features(images, output_attentions=True)
    expected = torch.stack(outputs.attentions)[..., 0, first:].mean((0, 2))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(embeds, F.normalize(outputs.pooler_output, dim=-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backbone", ["convnext", "siglip2_vision_model"])
def test_a_tower_without_such_attention_is_named(backbone: str) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": backbone, **({} if backbone == "convnext" else small)}
    tower = LoTLIPVisionModel._from_config(LoTLIPVisionConfig(backbone_config=config))
    with pytest.raises(ValueError, match=backbone):
        check_attention(tower)


def test_scores_of_siglip_are_those_of_its_pooling() -> None:
    """Without a class token; with the pooling `mean` there is nothing to go by."""
    model = model_of("siglip")
    size = model.config.vision_config.backbone_config.image_size
    images = torch.randn(3, 3, size, size)
    head = model.vision_model.backbone.head
    with torch.no_grad():
        scores, _ = attention_scores(model, pixel_values=images)
        states = model.vision_model(images).last_hidden_state
        _, expected = head.attention(head.probe.repeat(3, 1, 1), states, states)
    torch.testing.assert_close(scores, expected[:, 0], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="patch_choice"):
        attention_scores(model_of("siglip", pooling="mean"), pixel_values=images)


def test_all_patches_are_as_without_a_choice() -> None:
    model, _ = small_model(hidden_size=32, num_hidden_layers=1)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        scores, embeds = attention_scores(model, pixel_values=images)
        kept = kept_by_score(scores, (3, 3), 1.0)
        answer = model.get_image_features(images, kept_patches=kept).pooler_output
        assert torch.equal(answer, model.get_image_features(images).pooler_output)
    assert torch.equal(kept, torch.arange(9).expand(4, 9))
    torch.testing.assert_close(embeds, F.normalize(answer, dim=-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("share", "number"), [(0.5, 5), (0.01, 1), (2 / 3, 6), (0.3, 3)])
def test_single_patches_of_an_odd_grid(share: float, number: int) -> None:
    scores = torch.rand(5, 9)
    kept = kept_by_score(scores, (3, 3), share)
    assert torch.equal(kept, scores.argsort(1, descending=True)[:, :number].sort(1).values)


def test_scores_of_a_view_are_cropped_and_mirrored() -> None:
    """A quarter of a grid of 4 x 6 in its own resolution is itself; all of it turned round is its mirror image."""
    scores = torch.rand(2, 24)
    whole, turned, quarter = ([0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0], [0.5, 0.0, 1.0, 0.5])

    def seen(box: list[float]) -> torch.Tensor:
        return scores_of_view(scores, (4, 6), torch.tensor([box, box])).unflatten(1, (4, 6))

    maps = scores.unflatten(1, (4, 6))
    torch.testing.assert_close(seen(whole), maps)
    torch.testing.assert_close(seen(turned), maps.flip(2))
    # The centres of each second patch of the view lie a quarter of a patch beside those of the image.
    rows = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 2]])
    weights = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.75, 0.25], [0.75, 0.25]])
    columns = torch.tensor([[3, 2], [3, 4], [4, 3], [4, 5], [5, 4], [5, 5]])
    down = (maps[:, rows, 3:] * weights[:, :, None]).sum(2)
    across = 0.75 * maps[:, :, columns[:, 0]] + 0.25 * maps[:, :, columns[:, 1]]
    expected = sum(weights[:, i, None] * across[:, rows[:, i]] for i in (0, 1))
    assert down.shape[1] == 4
    torch.testing.assert_close(seen(quarter), expected)


# Batches


def test_views_are_parts_of_what_holds_both() -> None:
    """Their boxes are found again in it. The first view is that of a run with one view."""
    _, processor = small_model(hidden_size=32, num_hidden_layers=1)
    ramp = np.zeros((90, 120, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(120) * 2, np.arange(90)[:, None] * 2
    records = [{**record, "image": Image.fromarray(ramp)} for record in scenes_dataset(6)]
    options: dict[str, Any] = {"augment": Augment(crop=0.2, flip=0.5), "seed": 3}
    collator = LoTLIPCollator(processor, image_views=2, view_for_teacher=True, **options)
    batch = collator(records)
    views, inputs = batch["pixel_values"], batch["teacher_inputs"]
    assert views.shape == (6, 2, 3, 64, 64)
    assert torch.equal(views[:, 0], LoTLIPCollator(processor, **options)(records)["pixel_values"])
    assert torch.equal(views, LoTLIPCollator(processor, image_views=2, **options)(records)["pixel_values"])
    assert "teacher_inputs" not in LoTLIPCollator(processor, image_views=2, **options)(records)
    boxes = inputs["view_boxes"]
    low = torch.minimum(boxes[..., :2], boxes[..., 2:]).amin(1)
    assert torch.equal(low, torch.zeros(6, 2))
    assert torch.equal(torch.maximum(boxes[..., :2], boxes[..., 2:]).amax(1), torch.ones(6, 2))
    assert (boxes[..., 0] > boxes[..., 2]).any()
    for number in (0, 1):
        for channel in (0, 1):
            around = inputs["pixel_values"][:, channel].flatten(1)
            seen = scores_of_view(around, (64, 64), boxes[:, number]).unflatten(1, (64, 64))
            inner = slice(4, -4)
            torch.testing.assert_close(
                seen[:, inner, inner], views[:, number, channel][:, inner, inner], rtol=0, atol=0.1
            )
    collator.set_epoch(1)
    assert not torch.equal(collator(records)["pixel_values"], views)


def test_a_view_is_a_call() -> None:
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    augment = Augment(crop=0.3, flip=0.5, jitter=0.5, grey=0.5)
    for seed in range(8):
        view, _ = augment.view(image, Random(seed), (16, 16))
        assert view.tobytes() == augment(image, Random(seed), (16, 16)).tobytes()


@pytest.mark.parametrize("views", [1, 2])
def test_a_teacher_keeps_what_it_attends_to(views: int, tmp_path: Path) -> None:
    """In chunks as in one, without dropout of its own."""
    options = {**ATTENTION, **(VIEWS if views == 2 else {}), "patch_dropout": 0.6}
    options["terms"] = ["two_views", "byol"] if views == 2 else ["infonce"]
    options["term_options"] = [each for each in SMALL if each.startswith("byol") and views == 2]
    answers = []
    for chunk in (None, 2):
        made = config(tmp_path, model="scenes", data="scenes", num_scenes=8, grad_cache_chunk=chunk, **options)
        model, processor = load_or_start_model(made)
        names = {"teacher_image_embeds", "teacher_text_embeds"}
        teacher = make_teacher(made, model, names, Accelerator(cpu=True))
        assert teacher is not None
        records = teacher.start(model, load_data(made)[0])
        drawn = {"augment": made.augmentation(), "image_views": views, "view_for_teacher": True}
        batch = LoTLIPCollator(processor, made.draw(), **drawn)([records[index] for index in range(5)])
        answers.append(teacher.targets(batch))
        seen = batch.get("teacher_inputs", batch)["pixel_values"]
        with torch.no_grad():
            scores, _ = attention_scores(model.eval(), pixel_values=seen)
            expected = embed(model, {**batch, "pixel_values": seen}, {"image_embeds", "text_embeds"})
        for name, value in expected.items():
            torch.testing.assert_close(answers[-1][f"teacher_{name}"], value, rtol=0, atol=1e-5)
        boxes = [None] if views == 1 else batch["teacher_inputs"]["view_boxes"].unbind(1)
        kept = [kept_by_score(scores if b is None else scores_of_view(scores, (3, 3), b), (3, 3), 0.4) for b in boxes]
        assert torch.equal(answers[-1]["kept_patches"], kept[0] if views == 1 else torch.stack(kept, 1))
    assert torch.equal(answers[0]["kept_patches"], answers[1]["kept_patches"])


def test_embeddings_of_two_views_are_those_of_each(tmp_path: Path) -> None:
    model, processor = small_model(hidden_size=32, num_hidden_layers=1)
    collator = LoTLIPCollator(processor, augment=Augment(crop=0.5), image_views=2, patch_dropout=0.5, patch_size=21)
    batch = collator([*scenes_dataset(5)])
    assert batch["kept_patches"].shape == (5, 2, 4)
    names = {"image_embeds", "image_embeds_2", "patch_embeds", "text_embeds"}
    with torch.no_grad():
        embeds = embed(model, batch, names)
        assert embeds.keys() == names
        for number, name in enumerate(("image_embeds", "image_embeds_2")):
            one = {each: batch[each][:, number] for each in ("pixel_values", "kept_patches")}
            expected = embed(model, {**batch, **one}, {"image_embeds", "patch_embeds"})
            torch.testing.assert_close(embeds[name], expected["image_embeds"], rtol=0, atol=1e-6)
            if number == 0:
                torch.testing.assert_close(embeds["patch_embeds"], expected["patch_embeds"], rtol=0, atol=1e-6)
    objective = Objective({"two_views": TwoViews(), "simclr": SimCLR(width=8, output=8, projection_dim=32)})
    exact = {**batch, "pixel_values": batch["pixel_values"].double()}
    assert_same_in_chunks(model.double(), exact, objective.double(), "loss_simclr")


# Runs


def run(output: Path, **options: Any) -> list[dict[str, Any]]:
    made = config(output, **{"model": "scenes", "data": "scenes", "num_scenes": 10, "max_steps": 4, **options})
    train(*load_or_start_model(made), load_data(made)[0], made)
    return log_of(output)


RUNS: dict[str, dict[str, Any]] = {
    "one view": ATTENTION,
    "self, chunks": {**ATTENTION, "teacher": "self", "teacher_momentum": 0.999, "grad_cache_chunk": 2},
    "a term of the teacher": {**ATTENTION, "terms": ["infonce", "instance"], "num_workers": 1},
    "a-clip": {**A_CLIP, "grad_cache_chunk": 3, "mixed_precision": "bf16"},
    "two views": {**VIEWS, "terms": ["two_views"], "term_options": [], "patch_dropout": 0.5},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_chooses_the_same(kind: str, tmp_path: Path) -> None:
    """In the middle of an epoch, with the average of the projection."""
    whole = run(tmp_path / "run", save_steps=2, **RUNS[kind])
    last = list_checkpoints(tmp_path / "run")[-1]
    kept = torch.load(last / "state" / "objective.pt")
    assert ("terms.byol.target.0.weight" in kept) == (kind == "a-clip")
    shutil.rmtree(last)
    assert run(tmp_path / "run", save_steps=2, resume=True, **RUNS[kind])[-1] == whole[-1]
    again = torch.load(last / "state" / "objective.pt")
    assert all(torch.equal(again[name], value) for name, value in kept.items())
    if kind == "a-clip":
        assert not torch.equal(kept["terms.byol.target.0.weight"], kept["terms.byol.projection.0.weight"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"patch_choice": "attention", "teacher": "ema"}, "patch_dropout"),
        ({"patch_choice": "attention", "patch_dropout": 0.5}, "teacher"),
        ({"patch_choice": "attention", "patch_dropout": 0.5, "teacher": "columns"}, "teacher"),
        ({"terms": ["two_views"]}, "image_views"),
        ({"terms": ["infonce"], "image_views": 2, "augment": ["crop:0.5"]}, "two_views"),
        ({"terms": ["two_views"], "image_views": 2, "augment": ["flip:0.5"]}, "crop"),
        ({"terms": ["two_views"], "image_views": 3, "augment": ["crop:0.5"]}, "image_views"),
        ({"terms": ["byol"], "image_views": 2, "augment": ["crop:0.5"], "teacher": "self"}, "byol"),
        ({"terms": ["byol"], "image_views": 2, "augment": ["crop:0.5"]}, "teacher"),
        ({"terms": ["simclr"], "term_options": ["simclr.width=0"], "image_views": 2}, "width"),
        ({"terms": ["simclr"], "term_options": ["simclr.temperature=0"], "image_views": 2}, "temperature"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config(Path("run"), model="model", **options)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", ["", "--grad-cache-chunk 2"])
def test_two_processes_choose_as_one(chunks: str, tmp_path: Path) -> None:
    flags = "--model scenes --patch-dropout 0.5 --patch-choice attention --teacher ema --image-views 2"
    words = f"{flags} --augment crop:0.5 flip:0.5 --terms two_views simclr byol:2 --term-options {' '.join(SMALL)}"
    train_alone_and_together("lotlip_hf.cli", tmp_path, *words.split(), *chunks.split())


@pytest.mark.slow
def test_half_of_the_patches_by_attention_loses_less_than_a_random_half(trained_on_scenes: Path) -> None:
    """R@1 by long captions of 500 new scenes, of which the tower sees four of nine patches."""
    model = LoTLIPModel.from_pretrained(trained_on_scenes).eval()
    processor = LoTLIPProcessor.from_pretrained(trained_on_scenes)
    batch = LoTLIPCollator(processor, WholeCaptions())([*scenes_dataset(500, split="validation")])
    generator = torch.Generator().manual_seed(0)

    def recall(kept: torch.Tensor | None) -> float:
        inputs = {"pixel_values": batch["pixel_values"], **({} if kept is None else {"kept_patches": kept})}
        images = embed(model, inputs, {"image_embeds"})["image_embeds"]
        return sum(recalls(images, texts)[f"{name}_r1"] for name in ("image_to_text", "text_to_image")) / 2

    with torch.no_grad():
        texts = embed(model, batch, {"text_embeds"})["text_embeds"][:, 1]
        scores, _ = attention_scores(model, pixel_values=batch["pixel_values"])
        whole, chosen = recall(None), recall(kept_by_score(scores, (3, 3), 4 / 9))
        drawn = [recall(torch.rand(500, 9, generator=generator).topk(4).indices.sort().values) for _ in range(3)]
    assert whole > chosen > 2 * max(drawn)
