"""Zero-shot classification: templates are read or refused; classes are the means of their prompts."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig, pipeline

import tiny_clip
from lotlip_hf import Encoder, load_encoder
from lotlip_hf.cli import main
from lotlip_hf.evaluation import zero_shot
from lotlip_hf.evaluation.evaluate import evaluate
from lotlip_hf.evaluation.tasks import ClassificationData
from lotlip_hf.evaluation.zero_shot import (
    DEFAULT_TEMPLATES,
    class_embeddings,
    class_texts,
    open_clip_metadata,
    prompt,
    read_class_descriptions,
    read_templates,
)
from lotlip_hf.files import FileError, read_regular
from lotlip_hf.scenes.dataset import CELL_NAMES, COLOURS, SHAPES, WORDS, render, scene, write_segmentation

CLASSES = ["cat", "red car", "house {of} 100 %", "the dog. of the house"]
TEMPLATES = ["a photo of a {}.", "{c}", "A {}. And the same {} in a photo.", "{braces} {c}"]
PROMPTS = [
    *("a photo of a cat.", "cat", "A cat. And the same cat in a photo.", "{braces} cat"),
    *("a photo of a red car.", "red car", "A red car. And the same red car in a photo.", "{braces} red car"),
]
DESCRIPTIONS = {
    "cat": ["A cat has pointed ears. It has long whiskers.", "a small animal"],
    "dog": ["A dog has a long snout.", "an animal on a lawn", "It barks."],
    "house": ["A house has a roof, a door and windows. People live in it."],
}


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


@pytest.fixture(scope="module")
def siglip(golden: Path) -> Encoder:
    torch.manual_seed(0)
    text = SiglipTextConfig(**tiny_clip.SIZE, vocab_size=30522, max_position_embeddings=20, pad_token_id=0)
    vision = SiglipVisionConfig(**tiny_clip.SIZE, **tiny_clip.IMAGE_SIZE)
    tokenizer = BertTokenizer.from_pretrained(golden / "tokenizer", model_max_length=20)
    tokenizer.model_input_names = ["input_ids"]
    return Encoder(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), tokenizer)


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


@pytest.mark.parametrize("kind", ["lotlip", "clip", "siglip"])
@pytest.mark.parametrize("templates", [None, TEMPLATES[:2]])
def test_classes_are_the_means_of_their_descriptions(
    kind: str, templates: list[str] | None, request: pytest.FixtureRequest
) -> None:
    encoder = request.getfixturevalue(kind)
    result = class_embeddings(encoder, list(DESCRIPTIONS), templates, descriptions=DESCRIPTIONS, progress=False)
    for name, embedding in zip(DESCRIPTIONS, result, strict=True):
        texts = [*(prompt(one, name) for one in templates or ()), *DESCRIPTIONS[name]]
        total = sum(encoder.encode_texts([text], progress=False)[0] for text in texts)
        torch.testing.assert_close(embedding, total / total.norm(), atol=1e-6, rtol=0)
    turned = dict(reversed(DESCRIPTIONS.items()))  # the order of the file does not matter
    again = class_embeddings(encoder, list(DESCRIPTIONS), templates, descriptions=turned, progress=False)
    assert torch.equal(again, result)


@pytest.mark.parametrize(
    ("descriptions", "error", "words"),
    [
        ({"cat": ["a"], "dog": ["b"], "horse": ["c"]}, ValueError, "'horse'"),
        ({"cat": ["a"]}, ValueError, "'dog'"),
        ({"cat": ["a"], "dog": []}, ValueError, "'dog'"),
        ({"cat": ["a"], "dog": "barks"}, TypeError, "'dog'.*'barks'"),
        ({"cat": ["a"], "dog": None}, TypeError, "'dog'"),
        ({"cat": ["a"], "dog": ["b", 3]}, ValueError, "'dog'.*3"),
        ({"cat": ["a"], "dog": [" "]}, ValueError, "'dog'.*' '"),
        ([["cat", "a"]], TypeError, "list"),
    ],
)
def test_descriptions_that_do_not_fit_name_the_class(
    descriptions: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        class_texts(["cat", "dog"], descriptions=descriptions)
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(descriptions))
    if words in ("'horse'", "'dog'") and all(isinstance(texts, list) and texts for texts in descriptions.values()):
        assert read_class_descriptions(file) == descriptions  # it is the data that has other classes
    else:
        with pytest.raises(ValueError, match=rf"classes\.json.*{words}"):
            read_class_descriptions(file)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"cat": ["\xe4"]}'])
def test_files_that_are_no_descriptions(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "classes\x1b[2J.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="classes") as raised:
        read_class_descriptions(file)
    assert "\x1b" not in str(raised.value)
    with pytest.raises(FileError, match="regular"):
        read_class_descriptions("/dev/zero")
    monkeypatch.setattr(zero_shot, "read_regular", lambda file: read_regular(file, 8))
    file.write_text(json.dumps(DESCRIPTIONS))
    with pytest.raises(FileError, match="larger"):
        read_class_descriptions(file)


def test_descriptions_in_the_command(
    official_checkpoint: Path, lotlip: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "classes.json", tmp_path / "results.json"
    for name, colour in (("a_cat", (200, 120, 0)), ("dog", (90, 90, 90))):
        (tmp_path / "animals" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), colour).save(tmp_path / "animals" / name / "1.png")
    write_segmentation(tmp_path / "masks", 2)
    command = [
        "evaluate",
        "--model",
        str(official_checkpoint),
        "--device",
        "cpu",
        "--no-cache",
        "--output",
        str(output),
    ]
    command += ["--class-descriptions", str(file), "--overwrite"]
    animals = [*command, "--task", "classification", "--data", str(tmp_path / "animals")]

    descriptions = {"a cat": ["It has ears. It has whiskers.", "a small animal"], "dog": ["It barks."]}
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(descriptions).encode())  # as Windows writes it
    assert main(animals) == 0
    result = json.loads(output.read_text())
    data = ClassificationData(
        "x",
        "x",
        [str(tmp_path / "animals" / one / "1.png") for one in ("a_cat", "dog")],
        ["1"] * 2,
        [0, 1],
        list(descriptions),
    )
    expected = evaluate(lotlip, data, descriptions=descriptions, progress=False)
    assert result["metrics"] == expected["metrics"]
    assert result["protocol"]["templates"] == []
    assert result["protocol"]["descriptions"] == expected["protocol"]["descriptions"]
    other = {**descriptions, "dog": ["It meows."]}
    digests = [
        evaluate(lotlip, data, descriptions=one, templates=["{}"], progress=False)["protocol"]
        for one in (descriptions, other)
    ]
    assert digests[0]["templates"] == ["{}"]
    assert digests[0]["descriptions"] != digests[1]["descriptions"]

    shapes = {f"{colour} shape": [f"It is {colour}."] for colour in COLOURS}
    file.write_text(json.dumps(shapes))
    assert main([*command, "--task", "segmentation", "--data", str(tmp_path / "masks")]) == 0
    assert json.loads(output.read_text())["protocol"]["descriptions"].startswith("8 texts")
    capsys.readouterr()
    assert main(animals) == 2  # the file has other classes
    assert "'a cat'" in capsys.readouterr().err
    assert main([*command, "--task", "scenes"]) != 0
    assert "--class-descriptions" in capsys.readouterr().err


@pytest.mark.slow
def test_descriptions_beat_names_on_scenes(trained_on_scenes: Path) -> None:
    encoder = load_encoder(trained_on_scenes, device="cpu")
    scenes = [scene(number, split="test") for number in range(768)]
    images = encoder.encode_images([render(one) for one in scenes], progress=False)
    for kinds in (
        [(colour, "shape") for colour in COLOURS],
        [(colour, shape) for colour in COLOURS for shape in SHAPES],
    ):
        descriptions = {" ".join(kind): described(*kind) for kind in kinds}
        labels = torch.tensor(
            [
                list(descriptions).index(
                    f"{one.objects[0].colour} {one.objects[0].shape if len(kinds) > 8 else 'shape'}"
                )
                for one in scenes
            ]
        )
        names, texts = (
            (images @ class_embeddings(encoder, list(descriptions), descriptions=one, progress=False).T).argmax(1)
            for one in (None, descriptions)
        )
        accuracy, better = ((found == labels).double().mean().item() for found in (names, texts))
        print(f"{len(kinds)} classes: names {accuracy:.3f}, descriptions {better:.3f}")
        assert better > accuracy + 0.01


def described(colour: str, shape: str) -> list[str]:
    """What Scenes says of its large objects, in all cells."""
    items = [f"{colour} {one}" for one in SHAPES if shape in (one, "shape")]
    texts = [
        f"{cell} there is a large {item}. The {item} is the largest shape."
        for item in items
        for cell, *_ in CELL_NAMES
    ]
    forms = ("a picture of a {} {}", "a drawing with a {} {}", "there is a {} {}")
    return texts + [form.format(size, item) for item in items for form in forms for size in WORDS["large"]]


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
