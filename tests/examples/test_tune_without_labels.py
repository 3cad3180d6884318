"""`lotlip_hf.image_tuning`, and `examples/tune_without_labels.py` as it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

import tiny_clip
from lotlip_hf import Encoder, LoTLIPModel, from_backbones, load_encoder
from lotlip_hf.image_tuning import (
    ImageTuning,
    image_tower,
    load_tuning,
    new_prompts,
    norm_parameters,
    visual_prompts,
)
from lotlip_hf.images import official_image_processor
from lotlip_hf.scenes.dataset import render, scene
from scripts import load_script

CLASSES = {"cat": ["A cat has ears. It has whiskers."], "dog": ["A dog barks.", "an animal"], "house": ["a roof"]}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_script("examples/tune_without_labels.py")


@pytest.fixture(scope="module", params=["lotlip", "clip", "siglip"])
def checkpoint(
    request: pytest.FixtureRequest, official_checkpoint: Path, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of a tiny model."""
    if request.param == "lotlip":
        return official_checkpoint
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "clip":
        tiny_clip.save_clip(folder)
    else:
        tiny_clip.save_siglip(folder, golden / "tokenizer")
    return folder


@pytest.fixture
def encoder(checkpoint: Path) -> Encoder:
    return load_encoder(checkpoint, device="cpu")


def some_tuning(encoder: Encoder) -> ImageTuning:
    norms = {name: value + 0.1 * torch.randn_like(value) for name, value in norm_parameters(encoder).items()}
    prompts = new_prompts(encoder, 5, torch.Generator().manual_seed(0))
    learnt = {name: value.detach() for name, value in norms.items()}
    return ImageTuning(list(CLASSES), torch.randn(3, encoder.dim), prompts, learnt)


def embed(encoder: Encoder, images: Any) -> torch.Tensor:
    return encoder.encode_images(images, progress=False)


def pictures(folder: Path, count: int = 6) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        render(scene(number), image_size=32).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


# Visual prompts


def test_prompts_are_tokens_between_class_token_and_patches(encoder: Encoder, tmp_path: Path) -> None:
    """The tower with prompts is the tower on longer embedded images."""
    engine, (tower, backbone) = encoder.engine, image_tower(encoder)
    assert isinstance(tower, torch.nn.Module)
    vectors = torch.randn(5, backbone.config.hidden_size)
    prefix = 0 if backbone.config.model_type == "siglip_vision_model" else 1
    seen: list[torch.Tensor] = []
    first = next(module for name, module in backbone.named_modules() if name.endswith(("layers.0", "layer.0")))
    handle = first.register_forward_pre_hook(
        lambda module, args, options: seen.append([*args, *options.values()][0]), with_kwargs=True
    )
    images = pictures(tmp_path / "photos", 2)
    before = embed(encoder, images)
    with visual_prompts(encoder, vectors):
        prompted = embed(encoder, images)
    after = embed(encoder, images)
    handle.remove()
    plain, longer, again = seen
    torch.testing.assert_close(longer[:, prefix : prefix + 5], vectors.expand(2, -1, -1), atol=0, rtol=0)
    assert torch.equal(torch.cat([longer[:, :prefix], longer[:, prefix + 5 :]], dim=1), plain)
    assert torch.equal(plain, again)
    assert torch.equal(before, after)
    assert (before - prompted).abs().max() > 1e-3
    assert engine.name


def test_gradients_reach_the_prompts_and_the_fingerprint_knows_them(encoder: Encoder, tmp_path: Path) -> None:
    before = encoder.fingerprint("image")
    vectors = new_prompts(encoder, 3, torch.Generator().manual_seed(0)).requires_grad_()
    engine: Any = encoder.engine
    (image,) = pictures(tmp_path / "photos", 1)
    with visual_prompts(encoder, vectors):
        engine.model.get_image_features(
            **engine.on_device(engine.pixels(image))
        ).pooler_output.square().sum().backward()
        with_prompts = encoder.fingerprint("image")
    assert vectors.grad is not None
    assert vectors.grad.abs().sum(1).min() > 0
    assert encoder.fingerprint("image") == before != with_prompts
    with visual_prompts(encoder, vectors + 1):
        assert encoder.fingerprint("image") not in (before, with_prompts)


@pytest.mark.parametrize("name", ["kept_patches", "output_patch_embeds"])
def test_what_counts_patches_is_refused(name: str, pair: tuple[LoTLIPModel, Any]) -> None:
    encoder = Encoder(*pair)
    value = {"kept_patches": torch.zeros(1, 1, dtype=torch.int64), "output_patch_embeds": True}[name]
    pixels = encoder.engine.on_device(encoder.engine.pixels(Image.new("RGB", (32, 32))))
    prompts = new_prompts(encoder, 2, torch.Generator())
    with visual_prompts(encoder, prompts), pytest.raises(ValueError, match=name):
        pair[0].get_image_features(**pixels, **{name: value})


def test_a_second_tuning_is_refused(encoder: Encoder) -> None:
    tuning, images = some_tuning(encoder), [Image.new("RGB", (32, 32))]
    before = embed(encoder, images)
    with tuning.applied(encoder):
        tuned = embed(encoder, images)
        with pytest.raises(ValueError, match="context"), tuning.applied(encoder):
            pass
        assert torch.equal(embed(encoder, images), tuned)
    assert torch.equal(embed(encoder, images), before)


def test_towers_without_tokens_are_refused(lotlip_convnext: Encoder) -> None:
    with pytest.raises(ValueError, match="prompts"), visual_prompts(lotlip_convnext, torch.zeros(1, 8)):
        pass


@pytest.fixture
def lotlip_convnext() -> Encoder:
    from transformers import BertConfig, BertModel, ConvNextConfig, ConvNextModel

    text = BertModel(BertConfig(**tiny_clip.SIZE, vocab_size=30))
    vision = ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, image_size=32))
    return Encoder(from_backbones(text, vision), official_image_processor(32))


# The file


def test_a_tuning_is_read_as_it_was_written(encoder: Encoder, checkpoint: Path, tmp_path: Path) -> None:
    tuning, images = some_tuning(encoder), pictures(tmp_path / "photos", 3)
    tuning.save(tmp_path / "tuning.safetensors", encoder)
    before = embed(encoder, images)
    with tuning.applied(encoder):
        expected = embed(encoder, images)
        with pytest.raises(ValueError, match="another model"):
            load_tuning(tmp_path / "tuning.safetensors", encoder)
    assert torch.equal(embed(encoder, images), before)
    assert (expected - before).abs().max() > 1e-3
    other = load_encoder(checkpoint, device="cpu")
    read = load_tuning(tmp_path / "tuning.safetensors", other)
    assert read.class_names == list(CLASSES)
    assert torch.equal(read.classes, tuning.classes)
    with read.applied(other):
        assert torch.equal(embed(other, images), expected)
    with torch.no_grad():
        norm_parameters(other).popitem()[1].add_(1)
    with pytest.raises(ValueError, match="another model"):
        load_tuning(tmp_path / "tuning.safetensors", other)


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor], dict[str, str]], Any]] = {
    "no prompts": lambda tensors, metadata: tensors.pop("prompts"),
    "another width": lambda tensors, metadata: tensors.update(prompts=torch.zeros(5, 3)),
    "a scalar": lambda tensors, metadata: tensors.update(classes=torch.tensor(1.0)),
    "not a number": lambda tensors, metadata: tensors.update(classes=torch.full_like(tensors["classes"], torch.nan)),
    "an unknown norm": lambda tensors, metadata: tensors.update({"norm x.weight": torch.zeros(2)}),
    "too few names": lambda tensors, metadata: metadata.update(class_names='["cat"]'),
    "no names": lambda tensors, metadata: metadata.pop("class_names"),
    "names that are no texts": lambda tensors, metadata: metadata.update(class_names="[1, 2, 3]"),
    "deep names": lambda tensors, metadata: metadata.update(class_names="[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(damage: str, pair: tuple[LoTLIPModel, Any], tmp_path: Path) -> None:
    encoder, file = Encoder(*pair), tmp_path / "tuning.safetensors"
    some_tuning(encoder).save(file, encoder)
    tensors = load_file(file)
    metadata = {"class_names": json.dumps(list(CLASSES)), "model": encoder.fingerprint("image")}
    DAMAGES[damage](tensors, metadata)
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=r"tuning\.safetensors"):
        load_tuning(file, encoder)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64, (10**15).to_bytes(8, "little") + b"{}"])
def test_other_files_are_refused(content: bytes, pair: tuple[LoTLIPModel, Any], tmp_path: Path) -> None:
    (tmp_path / "tuning.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"tuning\.safetensors"):
        load_tuning(tmp_path / "tuning.safetensors", Encoder(*pair))


# The example


def test_the_most_confident_of_each_class_against_a_loop(example: ModuleType) -> None:
    probabilities = torch.randn(40, 5).softmax(1)
    probabilities[:, 4] = 0.0  # never the first choice, always the last
    indices, labels = example.confident(probabilities, 3)
    expected: dict[int, int] = {}
    for label in range(5):
        for rank in range(5):
            own = [row for row in range(40) if probabilities[row].argsort(descending=True)[rank] == label]
            if own:
                break
        for row in sorted(own, key=lambda row: -probabilities[row, label])[:3]:
            expected.setdefault(row, label)
    found = dict(zip(indices.tolist(), labels.tolist(), strict=True))
    assert {row: label for row, label in found.items() if label < 4} == {
        row: label for row, label in expected.items() if label < 4
    }
    assert sum(label == 4 for label in found.values()) <= 3


def save_teacher(folder: Path, model: Any, size: int) -> None:
    model.save_pretrained(folder)
    official_image_processor(size).save_pretrained(folder)


def test_the_example(
    example: ModuleType, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "photos", 12)
    for number, name in enumerate(CLASSES):
        (tmp_path / "test" / name).mkdir(parents=True)
        shutil.copy(tmp_path / "photos" / f"{number}.png", tmp_path / "test" / name)
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    torch.manual_seed(0)
    teacher = ViTModel(ViTConfig(**tiny_clip.SIZE, image_size=16, patch_size=8), add_pooling_layer=False)
    save_teacher(tmp_path / "teacher", teacher, 16)
    file = tmp_path / "tuning.safetensors"
    paths = {"model": checkpoint, "images": tmp_path / "photos", "class-descriptions": tmp_path / "classes.json"}
    paths |= {"teacher": tmp_path / "teacher", "test": tmp_path / "test", "output": file}
    argv = [str(word) for name, path in paths.items() for word in (f"--{name}", path)]
    argv += "--num-prompts 5 --num-epochs 2 --batch-size 5 --device cpu".split()
    accuracies = example.main(argv)
    printed = capsys.readouterr().out
    assert "epoch 2: loss" in printed
    assert accuracies.keys() == {"descriptions", "MLP", "tuned"}

    encoder = load_encoder(checkpoint, device="cpu")
    tuning = load_tuning(file, encoder)
    assert tuning.class_names == list(CLASSES)
    assert tuning.prompts.shape[0] == 5
    changed = [not torch.equal(tuning.norms[name], value) for name, value in norm_parameters(encoder).items()]
    assert sum(changed) > len(changed) / 2
    images = [tmp_path / "test" / name / f"{number}.png" for number, name in enumerate(CLASSES)]
    with tuning.applied(encoder):
        right = (embed(encoder, images) @ tuning.classes.T).argmax(1) == torch.arange(3)
    assert right.double().mean().item() == accuracies["tuned"]

    first = load_file(file)
    with pytest.raises(SystemExit):
        example.main(argv)
    assert "--overwrite" in capsys.readouterr().err
    example.main([*argv, "--overwrite"])
    assert all(torch.equal(value, first[name]) for name, value in load_file(file).items())
    (tmp_path / "classes.json").write_text(json.dumps({**CLASSES, "horse": ["a mane"]}))
    with pytest.raises(SystemExit):
        example.main([*argv, "--overwrite"])
    assert "'horse'" in capsys.readouterr().err
