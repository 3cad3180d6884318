"""Zero-shot classification: templates are read or refused; classes are the means of their prompts."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import pipeline

from lotlip_hf import Encoder
from lotlip_hf.evaluation import zero_shot
from lotlip_hf.evaluation.zero_shot import (
    DEFAULT_TEMPLATES,
    class_embeddings,
    open_clip_metadata,
    prompt,
    read_templates,
)

CLASSES = ["cat", "red car", "house {of} 100 %", "the dog. of the house"]
TEMPLATES = ["a photo of a {}.", "{c}", "A {}. And the same {} in a photo.", "{braces} {c}"]
PROMPTS = [
    *("a photo of a cat.", "cat", "A cat. And the same cat in a photo.", "{braces} cat"),
    *("a photo of a red car.", "red car", "A red car. And the same red car in a photo.", "{braces} red car"),
]


def templates_file(folder: Path, content: bytes) -> Path:
    (folder / "templates.txt").write_bytes(content)
    return folder / "templates.txt"


def test_templates_of_a_file(tmp_path: Path) -> None:
    content = "\ufeffa photo of a {}.\r\n\r\n  ein Bild: {c} \nthe {} and the {}\n".encode()
    templates = read_templates(templates_file(tmp_path, content))
    assert templates == ("a photo of a {}.", "ein Bild: {c}", "the {} and the {}")
    assert read_templates(str(tmp_path / "templates.txt")) == templates


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"a photo of a {}.\n\na photo of a cat.\n", "'a photo of a cat.'"),
        (b"a {}.\na {} in {c}\n", "'a {} in {c}'"),
        (b"\n  \n", r"templates\.txt"),
        (b"ein B\xe4r {}\n", "utf-8"),
    ],
)
def test_files_that_are_no_templates(tmp_path: Path, content: bytes, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        read_templates(templates_file(tmp_path, content))


def test_no_list_and_no_file(tmp_path: Path) -> None:
    assert read_templates("default") == DEFAULT_TEMPLATES == ("a photo of a {}.",)
    for name in ("openia", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{name}: .*openai"):
            read_templates(name)


def test_templates_of_open_clip_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it needs torchvision')")
    (package / "zero_shot_metadata.py").write_text(
        "OPENAI_IMAGENET_TEMPLATES = (lambda c: f'a bad photo of a {c}.', lambda c: f'a {c} in a video game.')\n"
        "SIMPLE_IMAGENET_TEMPLATES = (lambda c: f'art of the {c}.',)\n"
        "IMAGENET_CLASSNAMES = ('tench', 'goldfish')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert read_templates("openai") == ("a bad photo of a {}.", "a {} in a video game.")
    assert read_templates("simple") == ("art of the {}.",)
    assert open_clip_metadata().IMAGENET_CLASSNAMES == ("tench", "goldfish")
    assert "open_clip" not in sys.modules


def test_open_clip_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="open.clip"):
        read_templates("openai")


@pytest.mark.skipif(find_spec("open_clip") is None, reason="open_clip_torch is not installed: its lists are not here")
def test_lists_of_open_clip() -> None:
    openai, simple = read_templates("openai"), read_templates("simple")
    assert (len(set(openai)), len(set(simple))) == (80, 7)
    assert set(simple) < set(openai)
    assert all(template.count("{}") == 1 for template in openai)
    assert len(open_clip_metadata().IMAGENET_CLASSNAMES) == 1000


def test_prompts() -> None:
    assert [prompt(template, name) for name in CLASSES[:2] for template in TEMPLATES] == PROMPTS
    assert prompt("a {}.", "{c} {}") == "a {c} {}."  # a class's own braces are text


@pytest.mark.parametrize("kind", ["lotlip", "clip"])
def test_classes_are_the_means_of_their_prompts(kind: str, request: pytest.FixtureRequest) -> None:
    encoder = request.getfixturevalue(kind)
    model, tokenizer = encoder.engine.model, encoder.engine.tokenizer
    result = class_embeddings(encoder, CLASSES, TEMPLATES, progress=False)
    assert result.shape == (len(CLASSES), model.config.projection_dim)
    for name, embedding in zip(CLASSES, result, strict=True):
        total = torch.zeros(result.shape[1])
        for template in TEMPLATES:
            text = template.replace("{c}", name) if "{c}" in template else template.replace("{}", name)
            inputs = tokenizer([text], truncation=True, verbose=False, return_tensors="pt")
            with torch.no_grad():
                features = model.get_text_features(**inputs).pooler_output[0]
            total += features / features.norm()
        torch.testing.assert_close(embedding, total / total.norm(), atol=1e-6, rtol=0)
    assert torch.pdist(result).min() > 1e-3
    alone = class_embeddings(encoder, ["cat"], TEMPLATES[:1], progress=False)
    assert (class_embeddings(encoder, ["cat"], TEMPLATES[:2], progress=False) - alone).abs().max() > 1e-3


def test_the_labels_of_transformers_pipeline(clip: Encoder, golden: Path) -> None:
    model, processor = clip.engine.model, clip.engine.processor
    labels = ["cat", "red car", "house", "dog and the house"]
    images = [Image.open(file).convert("RGB") for file in sorted((golden / "images").glob("*.png"))]
    classify = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        device="cpu",
    )
    answers = classify(images, candidate_labels=labels, hypothesis_template=DEFAULT_TEMPLATES[0])
    scores = clip.encode_images(images, progress=False) @ class_embeddings(clip, labels, progress=False).T
    probabilities = (model.logit_scale.detach().exp() * scores).softmax(1)
    for answer, row in zip(answers, probabilities, strict=True):
        assert answer[0]["label"] == labels[int(row.argmax())]
        by_label = {one["label"]: one["score"] for one in answer}
        assert by_label == pytest.approx(dict(zip(labels, row.tolist(), strict=True)), abs=1e-5)


def test_embeddings_are_kept_and_cut(lotlip: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"cache": tmp_path / "cache", "batch_size": 2, "progress": False}
    first = class_embeddings(lotlip, CLASSES, TEMPLATES, **arguments)
    cut = class_embeddings(lotlip, CLASSES, TEMPLATES, max_length=5, **arguments)
    assert (cut - first).abs().max() > 1e-3
    assert lotlip.dim == first.shape[1]
    monkeypatch.setattr(lotlip, "iterate_texts", None)
    assert torch.equal(class_embeddings(lotlip, CLASSES, TEMPLATES, **arguments), first)


@pytest.mark.parametrize(
    ("class_names", "templates", "error", "message"),
    [
        ("cat", TEMPLATES, TypeError, "`class_names`"),
        (CLASSES, TEMPLATES[0], TypeError, "`templates`"),
        (CLASSES, ["{}", "a cat"], ValueError, "'a cat'"),
    ],
)
def test_wrong_arguments_are_named(
    lotlip: Encoder, class_names: Any, templates: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        class_embeddings(lotlip, class_names, templates, progress=False)
