"""The tools around transformers that people use already, each with the real library, on tiny checkpoints."""

import copy
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.state import AcceleratorState
from datasets.fingerprint import Hasher
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    BitsAndBytesConfig,
    QuantoConfig,
    TorchAoConfig,
    ZeroShotImageClassificationPipeline,
    pipeline,
)

import tiny
import tiny_clip
import tiny_families
import tiny_vision
from lotlip_hf import (
    Encoder,
    LoTLIPConfig,
    LoTLIPModel,
    LoTLIPProcessor,
    LoTLIPTextConfig,
    LoTLIPTextModelWithProjection,
    LoTLIPTokenizer,
    LoTLIPVisionConfig,
    LoTLIPVisionModelWithProjection,
    lora_targets,
)
from lotlip_hf.conversion.clip import convert as convert_clip
from lotlip_hf.hub.push import write_repository
from lotlip_hf.loading import load_model
from lotlip_hf.scenes.dataset import long_captions, render, scene, short_caption
from processes import finish
from scripts import load_script
from tiny_tokenizers import GOLDEN

KINDS = ("bert", "clip")
MODERN = ("modernbert", "t5", "qwen3")  # with DINOv3
NUM_PICTURES = 8
TEXTS = ["a cat", "A dog lies on the lawn. It is wet &amp; cold. It looks at a ball."]
LONG_TEXT = "The red car and the house. " * 60
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own for `datasets`, none of accelerate's state for the next test, and a working folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def clip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP turned into LoTLIP."""
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip.save_clip(folder / "stock")
    convert_clip(folder / "stock", folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, official_checkpoint: Path, clip_checkpoint: Path) -> Path:
    """Both kinds: BERT and ViT, and CLIP's towers."""
    return official_checkpoint if request.param == "bert" else clip_checkpoint


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with metadata."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number, one in enumerate(map(scene, range(NUM_PICTURES))):
        render(one, image_size=32).save(folder / f"{number}.png")
        captions = {"short_caption": short_caption(one), "long_captions": long_captions(one)}
        rows.append({"file_name": f"{number}.png", "id": one.id, **captions})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture
def images(golden: Path) -> list[Path]:
    """Files of three sizes and modes."""
    return sorted((golden / "images").glob("*.png"))


def random_checkpoint(folder: Path, kind: str, width: int = 32, num_layers: int = 2, **kwargs: Any) -> LoTLIPModel:
    """Saves a model whose weights all differ; `kwargs` are those of `save_pretrained`."""
    if kind in MODERN:
        return modern_checkpoint(folder, kind, width)
    size = {
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
    }
    text_backbone, vision_backbone = ("bert", "vit") if kind == "bert" else ("clip_text_model", "clip_vision_model")
    ids = {"bos_token_id": 5, "eos_token_id": 6} if kind == "clip" else {}
    text = {"model_type": text_backbone, **size, **ids, "vocab_size": 99, "max_position_embeddings": 40}
    vision = {"model_type": vision_backbone, **size, "image_size": 32, "patch_size": 8}
    config = LoTLIPConfig(
        text_config={"backbone_config": text, "projection_dim": width},
        vision_config={
            "backbone_config": vision,
            "pooling": "cls" if kind == "bert" else "pooler",
            "projection_dim": width,
        },
        projection_dim=width,
    )
    model = LoTLIPModel(config).eval()
    tiny_clip.random_weights(model)
    model.save_pretrained(folder, **kwargs)
    return model


def modern_checkpoint(folder: Path, kind: str, width: int = 32) -> LoTLIPModel:
    """Saves a model with DINOv3 and a modern text tower, and its processor."""
    (image_family,) = (family for family in tiny_vision.FAMILIES if family.name == "dinov3_vit")
    size = {"d_model": width, "d_ff": 2 * width, "d_kv": width // 4} if kind == "t5" else {}
    size = size or {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // 4}
    text = tiny_families.FAMILIES[kind].stock_config(vocab_size=30522, pad_token_id=0, **size)
    vision = image_family.backbone_config()
    vision.hidden_size, vision.intermediate_size = width, 2 * width
    model = LoTLIPModel(
        LoTLIPConfig(
            text_config=LoTLIPTextConfig(backbone_config=text, projection_dim=width),
            vision_config=LoTLIPVisionConfig(backbone_config=vision, projection_dim=width),
        )
    )
    tiny_clip.random_weights(model.eval())
    model.save_pretrained(folder)
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN, model_max_length=30)
    LoTLIPProcessor(image_family.image_processor(), tokenizer).save_pretrained(folder)
    return model


def outputs(model: Any) -> dict[str, torch.Tensor]:
    """All that a model answers, corner tokens and loss included, to the same texts and images each time."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(7, 99, (4, 3, 12), generator=generator)
    input_ids[..., 0], input_ids[..., -1] = 5, 6
    pixel_values = torch.randn(4, 3, 32, 32, generator=generator)
    with torch.no_grad():
        answer = model(input_ids=input_ids, pixel_values=pixel_values.to(model.dtype), return_loss=True)
    return {name: answer[name].float() for name in ("image_embeds", "text_embeds", "corner_embeds", "loss")}


def assert_equal_outputs(model: Any, expected: dict[str, torch.Tensor]) -> None:
    for name, value in outputs(model).items():
        torch.testing.assert_close(value, expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


# pipelines


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_zero_shot_pipeline(checkpoint: Path, images: list[Path], batch_size: int) -> None:
    classify = pipeline("zero-shot-image-classification", model=str(checkpoint), batch_size=batch_size, device="cpu")
    answers = classify([str(image) for image in images], candidate_labels=TEXTS, hypothesis_template="{}")
    model, processor = load_model(checkpoint, device="cpu")
    processor.background = None  # transparency is dropped there
    texts = Encoder(model, processor).encode_texts(TEXTS, progress=False)
    similarities = Encoder(model, processor).encode_images(images, progress=False) @ texts.T
    expected = (similarities * model.logit_scale.detach().exp()).softmax(1)
    assert len(answers) == len(images)
    for answer, row in zip(answers, expected.tolist(), strict=True):
        assert {one["label"]: one["score"] for one in answer} == pytest.approx(
            dict(zip(TEXTS, row, strict=True)), abs=1e-5
        )


@pytest.mark.slow
def test_zero_shot_pipeline_of_labels_that_are_too_long(checkpoint: Path, images: list[Path]) -> None:
    # The pipeline pads and never truncates, and hands no argument for it on: a class of one's own does.
    class Truncating(ZeroShotImageClassificationPipeline):
        def preprocess(self, *args: Any, **kwargs: Any) -> Any:
            return super().preprocess(*args, **kwargs, tokenizer_kwargs={"truncation": True})

    labels = [*TEXTS, LONG_TEXT]
    arguments = {"task": "zero-shot-image-classification", "model": str(checkpoint), "device": "cpu"}
    with pytest.raises(ValueError, match="truncation=True"):
        pipeline(**arguments)(str(images[0]), candidate_labels=labels)
    answer = pipeline(**arguments, pipeline_class=Truncating)(
        str(images[0]), candidate_labels=labels, hypothesis_template="{}"
    )
    model, processor = load_model(checkpoint, device="cpu")
    similarities = (
        Encoder(model, processor).encode_images(images[:1], progress=False)
        @ Encoder(model, processor).encode_texts(labels, progress=False).T
    )
    expected = (similarities * model.logit_scale.detach().exp()).softmax(1)[0].tolist()
    assert {one["label"]: one["score"] for one in answer} == pytest.approx(
        dict(zip(labels, expected, strict=True)), abs=1e-5
    )


def test_feature_pipelines_of_a_tower(checkpoint: Path, images: list[Path]) -> None:
    model, processor = load_model(checkpoint, device="cpu")
    processor.background = None  # transparency is dropped there
    extract = pipeline(
        "image-feature-extraction",
        model=LoTLIPVisionModelWithProjection.from_pretrained(checkpoint),
        image_processor=str(checkpoint),
        device="cpu",
    )
    found = torch.cat(extract([str(image) for image in images], return_tensors=True, batch_size=2))
    expected = Encoder(model, processor).encode_images(images, progress=False)
    torch.testing.assert_close(torch.nn.functional.normalize(found), expected, **TOLERANCE)

    extract = pipeline(
        "feature-extraction",
        model=LoTLIPTextModelWithProjection.from_pretrained(checkpoint),
        tokenizer=str(checkpoint),
        device="cpu",
    )
    texts = [*TEXTS, LONG_TEXT]
    found = torch.cat(extract(texts, return_tensors=True, truncation=True, batch_size=3))
    expected = Encoder(model, processor).encode_texts(texts, progress=False)
    torch.testing.assert_close(torch.nn.functional.normalize(found), expected, **TOLERANCE)


def test_feature_pipelines_of_a_whole_checkpoint(checkpoint: Path, images: list[Path]) -> None:
    model, processor = load_model(checkpoint, device="cpu")
    processor.background = None  # transparency is dropped there
    extract = pipeline("image-feature-extraction", model=str(checkpoint), device="cpu")
    found = torch.cat(extract([str(image) for image in images], return_tensors=True, batch_size=2))
    torch.testing.assert_close(found, Encoder(model, processor).encode_images(images, progress=False), **TOLERANCE)
    extract = pipeline("feature-extraction", model=str(checkpoint), device="cpu")
    texts = [*TEXTS, LONG_TEXT]
    found = torch.cat(extract(texts, return_tensors=True, truncation=True, batch_size=3))
    torch.testing.assert_close(found, Encoder(model, processor).encode_texts(texts, progress=False), **TOLERANCE)


def test_feature_pipelines_of_a_folder_with_one_tower(checkpoint: Path, images: list[Path], tmp_path: Path) -> None:
    # The folder's `AutoModel` is the tower without its projection.
    model, processor = load_model(checkpoint, device="cpu")
    for name, part in (("vision", processor.image_processor), ("text", processor.tokenizer)):
        getattr(model, f"{name}_model").save_pretrained(tmp_path / name)
        part.save_pretrained(tmp_path / name)
    extract = pipeline("image-feature-extraction", model=str(tmp_path / "vision"), device="cpu", pool=True)
    found = torch.cat(extract([str(image) for image in images], return_tensors=True))
    with torch.no_grad():
        expected = model.vision_model(**processor(images=list(map(str, images)), return_tensors="pt")).pooler_output
    torch.testing.assert_close(found, expected, **TOLERANCE)

    extract = pipeline("feature-extraction", model=str(tmp_path / "text"), device="cpu")
    for text, found in zip(TEXTS, extract(TEXTS, return_tensors=True), strict=True):
        with torch.no_grad():
            expected = model.text_model(**processor(text=[text], return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(found, expected, **TOLERANCE)


# sentence-transformers


def sentence_transformer(folder: Path) -> Any:
    library = pytest.importorskip("sentence_transformers", reason="needs `pip install sentence-transformers`")
    return library.SentenceTransformer(str(folder), device="cpu")


@pytest.fixture
def with_modules(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint as it is published, with the files that make sentence-transformers normalise its embeddings."""
    return write_repository(checkpoint, tmp_path / "with-modules", "me/mine")


@pytest.mark.slow
def test_sentence_transformers_encodes_texts_and_images(with_modules: Path, images: list[Path]) -> None:
    model, processor = load_model(with_modules, device="cpu")
    processor.background = None  # transparency is dropped there
    sentences = sentence_transformer(with_modules)
    assert sentences.get_embedding_dimension() == model.config.projection_dim
    assert sentences.max_seq_length == processor.tokenizer.model_max_length
    texts = [*TEXTS, LONG_TEXT]
    expected = Encoder(model, processor).encode_texts(texts, progress=False)
    for embeddings in (
        sentences.encode(texts, batch_size=2),
        sentences.encode([{"text": text} for text in texts]),
        sentences.encode_query(texts),  # a LoTLIP has no prompts
        sentences.encode_document(texts),
    ):
        np.testing.assert_allclose(embeddings, expected, **TOLERANCE)

    rotated = Image.open(images[-1]).convert("RGB").resize((40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    rotated.save(with_modules / "rotated.jpg", exif=exif)
    files = [*images, with_modules / "rotated.jpg"]
    expected_images = Encoder(model, processor).encode_images(files, progress=False)
    np.testing.assert_allclose(sentences.encode([str(file) for file in files]), expected_images, **TOLERANCE)
    pictures = [Image.open(file) for file in images]
    for inputs in (pictures, [{"image": picture} for picture in pictures]):
        np.testing.assert_allclose(sentences.encode(inputs, batch_size=2), expected_images[:-1], **TOLERANCE)
    similarities = sentences.similarity(expected, expected_images)
    torch.testing.assert_close(similarities, expected @ expected_images.T, **TOLERANCE)
    with pytest.raises(ValueError, match="modalities"):
        sentences.encode(["a cat", pictures[0]])


def test_sentence_transformers_loads_a_bare_checkpoint(checkpoint: Path) -> None:
    model, processor = load_model(checkpoint, device="cpu")
    sentences = sentence_transformer(checkpoint)
    expected = Encoder(model, processor).encode_texts(TEXTS, progress=False)
    np.testing.assert_allclose(sentences.encode(TEXTS, normalize_embeddings=True), expected, **TOLERANCE)
    lengths = np.linalg.norm(sentences.encode(TEXTS), axis=1)
    assert np.abs(lengths - 1).min() > 0.1  # the features as the model gives them


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODERN)
def test_sentence_transformers_loads_modern_towers(kind: str, images: list[Path], tmp_path: Path) -> None:
    modern_checkpoint(tmp_path / "checkpoint", kind)
    folder = write_repository(tmp_path / "checkpoint", tmp_path / "with-modules", "me/mine")
    model, processor = load_model(folder, device="cpu")
    processor.background = None  # transparency is dropped there
    sentences, encoder = sentence_transformer(folder), Encoder(model, processor)
    texts = [*TEXTS, LONG_TEXT]
    assert sentences.max_seq_length == 30
    np.testing.assert_allclose(sentences.encode(texts), encoder.encode_texts(texts, progress=False), **TOLERANCE)
    expected = encoder.encode_images(images, progress=False)
    np.testing.assert_allclose(sentences.encode([str(image) for image in images]), expected, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["images", "texts"])
def test_sentence_transformers_trains(checkpoint: Path, tmp_path: Path, pairs: str) -> None:
    sentences = sentence_transformer(checkpoint)
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    scenes = [scene(number) for number in range(NUM_PICTURES)]
    short, long = map(short_caption, scenes), [long_captions(one)[0] for one in scenes]
    pictures = [render(one, image_size=32) for one in scenes]
    table = {"anchor": pictures if pairs == "images" else list(short), "positive": long}
    lotlip = sentences[0].model
    before = {name: tensor.clone() for name, tensor in lotlip.state_dict().items()}
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"),
        max_steps=8,
        per_device_train_batch_size=NUM_PICTURES,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    dataset = datasets.Dataset.from_dict(table)
    loss = MultipleNegativesRankingLoss(sentences)
    trainer = SentenceTransformerTrainer(sentences, arguments, train_dataset=dataset, loss=loss)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.3

    # Of what is trained nothing but the corner tokens and the scale is left out.
    kept = {name for name, tensor in lotlip.state_dict().items() if torch.equal(tensor, before[name])}
    assert {name for name in kept if not (pairs == "texts" and name.startswith(("vision_", "visual_")))} == {
        "text_model.corner_embeds",
        "logit_scale",
    }
    assert ("vision_model.backbone.embeddings" in " ".join(kept)) == (pairs == "texts")
    sentences.save_pretrained(str(tmp_path / "saved"))
    model, info = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(model) is LoTLIPModel
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    expected = Encoder(model, processor).encode_texts(TEXTS, progress=False)
    for one in (sentences, sentence_transformer(tmp_path / "saved")):
        np.testing.assert_allclose(one.encode(TEXTS, normalize_embeddings=True), expected, **TOLERANCE)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("sentence_transformers", reason="needs `pip install sentence-transformers`")
    return load_script("examples/finetune_sentence_transformers.py")


def run_example(example: ModuleType, model: Path, data: Path, output: Path, options: str) -> Path:
    words = [*("--model", str(model)), *("--data", str(data)), *("--output_dir", str(output))]
    options = f"--report_to none --logging_steps 1 --save_strategy no {options}"
    return example.main([*words, *options.split()])


def logged(text: str, name: str) -> list[float]:
    """What a trainer printed."""
    return [float(value) for value in re.findall(rf"'{name}': '?([\d.e-]+)", text)]


@pytest.mark.slow
def test_example_trains_on_the_loss_of_the_model(
    example: ModuleType, clip_checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A batch is the whole of the data, and CLIP's towers have no dropout: the loss is known.
    options = f"--num_long_texts 0 --max_steps 1 --per_device_train_batch_size {NUM_PICTURES} --disable_tqdm true"
    run_example(example, clip_checkpoint, pictures, tmp_path / "tuned", options)
    model, processor = load_model(clip_checkpoint, device="cpu")
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    batch = processor(
        text=[row["short_caption"] for row in rows],
        images=[Image.open(pictures / row["file_name"]) for row in rows],
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = float(model(**batch, return_loss=True).loss)
    assert logged(capsys.readouterr().out, "loss")[0] == pytest.approx(expected, abs=1e-3)  # as printed


@pytest.mark.slow
def test_example_has_a_loss_to_choose_by(
    example: ModuleType, official_checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--eval_data {pictures} --max_steps 2 --eval_strategy steps --eval_steps 1 --disable_tqdm true"
    options += " --lr_scheduler_type reduce_lr_on_plateau"
    run_example(example, official_checkpoint, pictures, tmp_path / "tuned", options)
    assert len(logged(capsys.readouterr().out, "eval_loss")) == 2


@pytest.mark.slow
def test_example_leaves_a_checkpoint_for_both_libraries(
    example: ModuleType, official_checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--num_long_texts 1 --text_pairs --eval_data {pictures} --num_train_epochs 4 --learning_rate 3e-3"
    options += f" --per_device_train_batch_size {NUM_PICTURES} --disable_tqdm true"
    saved = run_example(example, official_checkpoint, pictures, tmp_path / "tuned", options)
    printed = capsys.readouterr().out
    losses = logged(printed, "loss")
    assert len(losses) == 4 * 3  # with short captions, with long texts, and those with one another
    before, (model, processor) = AutoModel.from_pretrained(official_checkpoint), load_model(saved, device="cpu")
    for name, tensor in before.state_dict().items():
        is_left_out = name in ("logit_scale", "text_model.corner_embeds")
        assert torch.equal(model.state_dict()[name], tensor) == is_left_out, name

    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    found = Encoder(model, processor).encode_images([pictures / row["file_name"] for row in rows], progress=False)
    texts = Encoder(model, processor).encode_texts([row["short_caption"] for row in rows], progress=False)
    first = (texts @ found.T).argmax(1) == torch.arange(NUM_PICTURES)
    assert f"short_cosine_accuracy@1: {0.125:.3f} before, {float(first.float().mean()):.3f} after" in printed
    np.testing.assert_allclose(
        sentence_transformer(saved).encode(TEXTS), Encoder(model, processor).encode_texts(TEXTS), **TOLERANCE
    )


def test_example_says_what_it_cannot_do(
    example: ModuleType, clip_checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--num_long_texts"):
        run_example(example, clip_checkpoint, pictures, tmp_path, "--text_pairs --num_long_texts 0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match="--resume_from_checkpoint"):
        run_example(example, clip_checkpoint, pictures, tmp_path / "full", "")
    tiny_clip.save_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="--model"):
        run_example(example, tmp_path / "clip", pictures, tmp_path / "new", "--max_steps 1")
    monkeypatch.setattr(example.SentenceTransformerTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="--text_pairs"):
        run_example(example, clip_checkpoint, pictures, tmp_path, "--text_pairs")


@pytest.mark.slow
def test_example_goes_on_where_it_was(
    example: ModuleType, clip_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    options = f"--num_long_texts 0 --max_steps 4 --per_device_train_batch_size {NUM_PICTURES} --disable_tqdm true"
    whole = run_example(example, clip_checkpoint, pictures, tmp_path / "whole", f"{options} --save_strategy no")
    options += " --save_strategy steps --save_steps 2"
    run_example(example, clip_checkpoint, pictures, tmp_path / "half", options)
    shutil.rmtree(tmp_path / "half" / "checkpoint-4")
    options += f" --resume_from_checkpoint {tmp_path / 'half' / 'checkpoint-2'}"
    resumed = run_example(example, clip_checkpoint, pictures, tmp_path / "half", options)
    state = json.loads((tmp_path / "half" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    expected = AutoModel.from_pretrained(whole).state_dict()
    for name, tensor in AutoModel.from_pretrained(resumed).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], **TOLERANCE)


@pytest.mark.slow  # starts two processes
def test_example_in_two_processes_is_that_in_one(
    example: ModuleType, clip_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    # A batch is the whole of the data, whatever the order; plain gradient descent, which does not blow rounding up.
    options = "--num_long_texts 0 --max_steps 3 --learning_rate 0.01 --optim sgd --per_device_train_batch_size"
    one = run_example(example, clip_checkpoint, pictures, tmp_path / "one", f"{options} {NUM_PICTURES}")
    argv = ["--model", str(clip_checkpoint), "--data", str(pictures), "--output_dir", str(tmp_path / "two")]
    argv += [*options.split(), str(NUM_PICTURES // 2), "--save_strategy", "no", "--report_to", "none"]
    finish("examples/finetune_sentence_transformers.py", argv, tmp_path, num_processes=2)
    start, ours, theirs = (AutoModel.from_pretrained(folder) for folder in (clip_checkpoint, one, tmp_path / "two"))
    moved = [(ours.state_dict()[name] - tensor).abs().max() for name, tensor in start.state_dict().items()]
    assert max(moved) > 1e-3
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], tensor, **TOLERANCE)


# PEFT (tests/examples/test_finetune.py has the example's own)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "towers"),
    [(kind, towers) for kind in KINDS for towers in ("text", "vision", "both")] + [(kind, "both") for kind in MODERN],
)
def test_lora_on_either_tower(kind: str, towers: str, tmp_path: Path) -> None:
    start = random_checkpoint(tmp_path / "start", kind)
    prefixes = {"text": "text_model", "vision": "vision_model", "both": ("text_model", "vision_model")}
    targets = [name for name in lora_targets(start) if name.startswith(prefixes[towers])]
    config = LoraConfig(r=4, target_modules=targets)
    lora = get_peft_model(AutoModel.from_pretrained(tmp_path / "start"), config).train()
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # at first half of LoRA's matrices are zero, and so are the others' gradients
        loss = lora(input_ids=tiny.input_ids(4, 3, 12), pixel_values=tiny.pixel_values(4), return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected, before = outputs(lora.eval()), outputs(start)
    changed = {name for name in ("text_embeds", "image_embeds") if (expected[name] - before[name]).abs().max() > 1e-3}
    both = {"text_embeds", "image_embeds"}
    assert changed == {"text": {"text_embeds"}, "vision": {"image_embeds"}, "both": both}[towers]

    lora.save_pretrained(tmp_path / "adapter")
    fresh = AutoModel.from_pretrained(tmp_path / "start")
    assert_equal_outputs(PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval(), expected)
    plain = AutoModel.from_pretrained(tmp_path / "start")
    plain.load_adapter(str(tmp_path / "adapter"))  # transformers' own way
    assert_equal_outputs(plain.eval(), expected)
    merged = lora.merge_and_unload()
    assert_equal_outputs(merged, expected)
    merged.save_pretrained(tmp_path / "merged")
    loaded, info = AutoModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert_equal_outputs(loaded, expected)


# quantised loading


def torchao(**kwargs: Any) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization", reason="needs `pip install torchao`")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), **kwargs)


def quanto(**kwargs: Any) -> QuantoConfig:
    pytest.importorskip("optimum.quanto", reason="needs `pip install optimum-quanto`")
    return QuantoConfig(weights="int8", **kwargs)


def bitsandbytes(bits: int, modules_to_not_convert: list[str] | None = None) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="needs `pip install bitsandbytes`")
    settings = {"bnb_4bit_quant_type": "nf4"} if bits == 4 else {}
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, llm_int8_skip_modules=modules_to_not_convert, **settings
    )


# Four bits of random weights lose more than four bits of trained ones: a check that nothing is broken.
QUANTIZATIONS: dict[str, tuple[Callable[..., Any], float]] = {
    "torchao": (torchao, 0.99),
    "quanto": (quanto, 0.99),
    "bitsandbytes-8": (lambda **kwargs: bitsandbytes(8, **kwargs), 0.99),
    "bitsandbytes-4": (lambda **kwargs: bitsandbytes(4, **kwargs), 0.75),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS + MODERN)
@pytest.mark.parametrize("library", QUANTIZATIONS)
def test_quantized_loading(kind: str, library: str, tmp_path: Path) -> None:
    start = random_checkpoint(tmp_path, kind, width=64)
    make, least = QUANTIZATIONS[library]
    projections = ["text_projection", "visual_projection"]
    config = make(modules_to_not_convert=projections)
    model = AutoModel.from_pretrained(tmp_path, quantization_config=config).eval()
    expected, found = outputs(start), outputs(model)
    for name in ("image_embeds", "text_embeds", "corner_embeds"):
        cosines = (expected[name] * found[name]).sum(-1)
        assert (cosines.mean() if kind in MODERN else cosines.min()) > least, name
        assert cosines.max() < 1 - 1e-6, name  # it is not the model that it was

    # What is no linear layer, and what is told to, stays as it was.
    state, kept = dict(start.named_parameters()), dict(model.named_parameters())
    for name in ("text_model.corner_embeds", "logit_scale", *(f"{name}.weight" for name in projections)):
        assert type(kept[name]) is torch.nn.Parameter, name
        assert torch.equal(kept[name], state[name]), name
    is_quantized = {name for name, parameter in kept.items() if type(parameter) is not torch.nn.Parameter}
    linear = {f"{name}.weight" for name, module in start.named_modules() if type(module) is torch.nn.Linear}
    linear = {name for name in linear if not name.endswith(".wo.weight")}  # T5 keeps them in float32
    assert is_quantized == linear - {f"{name}.weight" for name in projections}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_by_bitsandbytes_saves_and_loads(bits: int, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "start", "bert", width=64)
    config = bitsandbytes(bits, ["text_projection", "visual_projection"])
    model = AutoModel.from_pretrained(tmp_path / "start", quantization_config=config).eval()
    model.save_pretrained(tmp_path / "quantized")
    assert_equal_outputs(AutoModel.from_pretrained(tmp_path / "quantized").eval(), outputs(model))


@pytest.mark.xfail(
    strict=True,
    raises=RuntimeError,
    reason="torchao 0.18 loads no file with a parameter of no module, as `logit_scale` is (nor that of a CLIPModel)",
)
def test_quantized_by_torchao_saves_and_loads(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "start", "bert", width=64)
    model = AutoModel.from_pretrained(tmp_path / "start", quantization_config=torchao()).eval()
    model.save_pretrained(tmp_path / "quantized")
    AutoModel.from_pretrained(tmp_path / "quantized")


# accelerate's loading of models that do not fit


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_loads_in_parts(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    model = random_checkpoint(folder, kind, max_shard_size="40KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    expected, size = outputs(model), sum(tensor.nbytes for tensor in model.state_dict().values())
    assert_equal_outputs(AutoModel.from_pretrained(folder), expected)
    assert_equal_outputs(AutoModel.from_pretrained(folder, device_map="auto"), expected)

    offloaded = AutoModel.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "offload"
    )
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert_equal_outputs(offloaded, expected)
    by_tower = {"text_model": "cpu", "vision_model": "disk", "text_projection": "cpu", "visual_projection": "disk"}
    offloaded = AutoModel.from_pretrained(
        folder, device_map={**by_tower, "logit_scale": "cpu"}, offload_folder=tmp_path / "towers"
    )
    assert all(parameter.is_meta for parameter in offloaded.vision_model.parameters())
    assert_equal_outputs(offloaded, expected)

    assert_equal_outputs(cpu_offload(copy.deepcopy(model), torch.device("cpu")), expected)
    offloaded = disk_offload(copy.deepcopy(model), str(tmp_path / "all"), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert_equal_outputs(offloaded, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_dispatches_a_checkpoint(kind: str, tmp_path: Path) -> None:
    # accelerate reads the names in the file, and transformers writes a ViT's older ones unless it is told.
    folder = tmp_path / "own-names"
    model = random_checkpoint(folder, kind, max_shard_size="150KB", save_original_format=False)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) == 2
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    with init_empty_weights():
        empty = LoTLIPModel(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    dispatched = load_checkpoint_and_dispatch(
        empty,
        folder,
        device_map="auto",
        max_memory={"cpu": size // 2},
        no_split_module_classes=list(model._no_split_modules),
        offload_folder=str(tmp_path / "offload"),
    )
    assert set(dispatched.hf_device_map.values()) == {"cpu", "disk"}
    assert_equal_outputs(dispatched.eval(), outputs(model))
    loaded, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert_equal_outputs(loaded, outputs(model))


# datasets


@pytest.mark.slow
def test_datasets_maps_embeds_and_searches(checkpoint: Path, pictures: Path) -> None:
    faiss = pytest.importorskip("faiss", reason="needs `pip install faiss-cpu`")
    dataset = datasets.load_dataset("imagefolder", data_dir=str(pictures), split="train")

    def embedder() -> Callable[[dict[str, Any]], dict[str, Any]]:
        model, processor = load_model(checkpoint, device="cpu")

        def embed(batch: dict[str, Any]) -> dict[str, Any]:
            found = Encoder(model, processor).encode_images(batch["image"], progress=False)
            return {"embedding": found.numpy(), "process": [os.getpid()] * len(found)}

        return embed

    embed = embedder()
    embedded = dataset.map(embed, batched=True, batch_size=3)
    model, processor = load_model(checkpoint, device="cpu")
    expected = Encoder(model, processor).encode_images(list(dataset["image"]), progress=False).numpy()
    np.testing.assert_allclose(embedded["embedding"], expected, **TOLERANCE)
    # Another process would find it in the cache: the function is known by what it holds, used or not.
    assert Hasher.hash(embed) == Hasher.hash(embedder())
    again = dataset.map(embedder(), batched=True, batch_size=3)
    assert again.cache_files == embedded.cache_files
    in_two = dataset.map(embed, batched=True, batch_size=3, num_proc=2, load_from_cache_file=False)
    assert os.getpid() not in in_two["process"]
    np.testing.assert_allclose(in_two["embedding"], expected, **TOLERANCE)

    embedded.add_faiss_index("embedding", metric_type=faiss.METRIC_INNER_PRODUCT)
    for query in Encoder(model, processor).encode_texts(TEXTS, progress=False).numpy():
        scores, nearest = embedded.get_nearest_examples("embedding", query, k=3)
        best = np.argsort(-(expected @ query))[:3]
        np.testing.assert_allclose(scores, (expected @ query)[best], **TOLERANCE)
        assert nearest["id"] == [dataset[int(place)]["id"] for place in best]


# torch


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_feature_functions_compile(kind: str, tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path, kind, num_layers=1)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    options = {"backend": backend, "dynamic": True, "fullgraph": True}
    texts, images = (
        torch.compile(getattr(model, name), **options) for name in ("get_text_features", "get_image_features")
    )
    with torch.no_grad():
        for number, (batch_size, length) in enumerate([(2, 7), (3, 12), (5, 38)]):
            inputs = {"input_ids": tiny.input_ids(batch_size, length)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["attention_mask"][0, 5:] = 0
            pixel_values = tiny.pixel_values(batch_size)
            for found, expected in (
                (texts(**inputs), model.get_text_features(**inputs)),
                (images(pixel_values=pixel_values), model.get_image_features(pixel_values)),
            ):
                torch.testing.assert_close(found.pooler_output, expected.pooler_output, **TOLERANCE)
            assert len(graphs) == 2, f"compiled anew for batch {number}"
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_copied_pickled_and_cast(kind: str, tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path, kind)
    expected = outputs(model)
    assert_equal_outputs(copy.deepcopy(model), expected)
    assert_equal_outputs(pickle.loads(pickle.dumps(model)), expected)
    torch.save(model, tmp_path / "model.pt")
    assert_equal_outputs(torch.load(tmp_path / "model.pt", weights_only=False), expected)
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(model).to(dtype)
        assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
        found = outputs(cast)
        for name in ("image_embeds", "text_embeds", "corner_embeds"):
            assert (found[name] * expected[name]).sum(-1).min() > 0.995, (dtype, name)
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), abs=0.1)
