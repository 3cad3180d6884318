"""Dual encoders of every kind through loading, encoding and fingerprints: as each class encodes by itself."""

import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertTokenizer,
    CLIPVisionConfig,
    PreTrainedModel,
    RobertaConfig,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
    ViTImageProcessorPil,
)

import tiny_clip
from hub_server import Hub, hub_server, use_in_process
from lotlip_hf import Encoder, LoTLIPModel
from lotlip_hf.conversion.clip import convert as convert_clip
from lotlip_hf.conversion.onnx import convert as export_onnx
from lotlip_hf.engines.onnx import LoTLIPOnnxModel
from lotlip_hf.evaluation.models import model_revision, model_versions
from lotlip_hf.loading import load_model, max_text_length

TOWER = tiny_clip.SIZE
POSITIONS = 24
VISION = {**TOWER, **tiny_clip.IMAGE_SIZE}
SIZE = {"height": 32, "width": 32}
TEXTS = [
    "a dog",
    "",
    "A tram, painted cream above, waits at a stop. Two passengers are getting on.",
    "word " * 90,
    "猫 é",
]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    ",",
    ".",
    "dog",
    "word",
    *LETTERS,
    *(f"##{x}" for x in LETTERS),
]

# Writes a checkpoint into a folder and returns how many tokens its texts may have.
Make = Callable[[Path, Path], int]


def save(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    tiny_clip.random_weights(model)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def bert_tokenizer() -> BertTokenizer:
    """From a bare vocabulary: without a `model_max_length`."""
    return BertTokenizer(vocab={token: place for place, token in enumerate(VOCABULARY)})


def make_clip(folder: Path, golden: Path) -> int:
    tiny_clip.save_clip(folder)
    return 77


def make_siglip(folder: Path, golden: Path) -> int:
    text = {**TOWER, "vocab_size": len(VOCABULARY), "max_position_embeddings": POSITIONS, "pad_token_id": 0}
    tokenizer = bert_tokenizer()
    tokenizer.model_input_names = ["input_ids"]
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    save(model, SiglipProcessor(SiglipImageProcessorPil(size=SIZE), tokenizer), folder)
    return POSITIONS


def make_siglip2(folder: Path, golden: Path) -> int:
    """NaFlex: images of any aspect ratio, as patches."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: place for place, token in enumerate([*special, "▁", *LETTERS, "do", "dog"])}
    tokenizer = Siglip2Tokenizer(vocab=vocabulary, merges=[("d", "o"), ("do", "g")], padding_side="right")
    text = {**TOWER, "vocab_size": len(vocabulary), "max_position_embeddings": POSITIONS, "pad_token_id": 0}
    vision = {**TOWER, "patch_size": 16, "num_patches": 256}
    model = Siglip2Model(Siglip2Config(text_config={**text, "projection_size": 32}, vision_config=vision))
    save(model, Siglip2Processor(Siglip2ImageProcessorPil(), tokenizer), folder)
    return POSITIONS


def make_dual_encoder(vision: Any, image_processor: Any, text: Any = None) -> Make:
    def make(folder: Path, golden: Path) -> int:
        config = text or BertConfig(**TOWER, vocab_size=len(VOCABULARY), max_position_embeddings=POSITIONS)
        both = VisionTextDualEncoderConfig.from_vision_text_configs(vision, config, projection_dim=16)
        processor = VisionTextDualEncoderProcessor(image_processor, bert_tokenizer())
        save(VisionTextDualEncoderModel(both), processor, folder)
        return POSITIONS

    return make


def make_lotlip(folder: Path, golden: Path) -> int:
    from lotlip_hf.conversion.official import convert

    official = golden / "official-corners2"
    convert(
        checkpoint=official / "model.pt",
        open_clip_config=official / "open_clip_config.json",
        tokenizer=golden / "tokenizer",
        output=folder,
    )
    return 126


def make_lotlip_clip(folder: Path, golden: Path) -> int:
    tiny_clip.save_clip(folder.with_name(f"{folder.name}-source"))
    convert_clip(folder.with_name(f"{folder.name}-source"), folder, num_corner_tokens=2)
    return 77


VIT = ViTConfig(**VISION)
# positions from 2 on: pad_token_id + 1
ROBERTA = RobertaConfig(
    **TOWER, vocab_size=len(VOCABULARY), max_position_embeddings=POSITIONS + 1, pad_token_id=0, type_vocab_size=2
)
KINDS: dict[str, Make] = {
    "clip": make_clip,
    "siglip": make_siglip,
    "siglip2": make_siglip2,
    "bert-vit": make_dual_encoder(VIT, ViTImageProcessorPil(size=SIZE)),
    "bert-clip": make_dual_encoder(CLIPVisionConfig(**VISION), tiny_clip.image_processor()),
    "roberta-vit": make_dual_encoder(VIT, ViTImageProcessorPil(size=SIZE), ROBERTA),
    "lotlip": make_lotlip,
    "lotlip-clip": make_lotlip_clip,
}


@pytest.fixture(scope="module", params=list(KINDS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Path:
    """A tiny checkpoint of each kind, its limit on texts in `limit`. Nobody writes to it."""
    folder = tmp_path_factory.mktemp("kinds") / request.param
    limit = KINDS[request.param](folder, golden)
    (folder / "limit").write_text(str(limit))
    return folder


@pytest.fixture(scope="module")
def pictures(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of several sizes and modes."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 70, 3), dtype=np.uint8)
    wide = tmp_path_factory.mktemp("pictures") / "wide.png"
    Image.fromarray(pixels).save(wide)
    return [*sorted((golden / "images").glob("*.png")), wide]


@torch.no_grad()
def naive(folder: Path, pictures: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image features as a user of transformers gets them, one at a time."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    options = {"truncation": True, "max_length": int((folder / "limit").read_text()), "return_tensors": "pt"}
    if model.config.model_type in ("siglip", "siglip2"):  # as their model cards say
        options["padding"] = "max_length"
    texts = [model.get_text_features(**processor(text=[text], **options)).pooler_output for text in TEXTS]
    images = []
    for path in pictures:
        with Image.open(path) as image:
            on_white = Image.new("RGBA", image.size, "white")
            on_white.alpha_composite(image.convert("RGBA"))
        inputs = processor(images=[on_white.convert("RGB")], return_tensors="pt")
        images.append(model.get_image_features(**inputs).pooler_output)
    return tuple(torch.nn.functional.normalize(torch.cat(rows), dim=-1) for rows in (texts, images))


@pytest.mark.slow
def test_features_are_those_of_the_class(checkpoint: Path, pictures: list[Path]) -> None:
    model, processor = load_model(checkpoint, device="cpu")
    assert max_text_length(model, processor.tokenizer) == int((checkpoint / "limit").read_text())
    expected_texts, expected_images = naive(checkpoint, pictures)
    for batch_size in (1, 2, 50):
        options = {"batch_size": batch_size, "progress": False}
        torch.testing.assert_close(
            Encoder(model, processor).encode_texts(TEXTS, **options), expected_texts, atol=1e-5, rtol=0
        )
        images = Encoder(model, processor).encode_images(pictures, **options)
        torch.testing.assert_close(images, expected_images, atol=1e-5, rtol=0)
    # texts and images differ by far more than the tolerance
    assert (expected_texts[0] - expected_texts[2]).abs().max() > 1e-3
    assert (expected_images[0] - expected_images[1]).abs().max() > 1e-3


def test_texts_that_are_cut_are_told_of(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = load_model(checkpoint, device="cpu")
    limit = int((checkpoint / "limit").read_text())
    lengths = [len(ids) for ids in processor.tokenizer(TEXTS, verbose=False)["input_ids"]]
    Encoder(model, processor).encode_texts(TEXTS, progress=False)
    count = sum(length > limit for length in lengths)
    assert (f"{count} of {len(TEXTS)} texts were cut at {limit} tokens." in caplog.text) == (count > 0)
    assert max(lengths) > min(limit, 80)


@pytest.mark.slow
def test_fingerprints(checkpoint: Path, tmp_path: Path) -> None:
    def fingerprints(pair: Any) -> tuple[str, str]:
        return Encoder(*pair).fingerprint("image"), Encoder(*pair).fingerprint("text")

    pair = load_model(checkpoint, device="cpu")
    before = fingerprints(pair)
    assert before[0] != before[1]
    elsewhere = load_model(shutil.copytree(checkpoint, tmp_path / "elsewhere"), device="cpu")
    assert fingerprints(elsewhere) == before
    Encoder(*elsewhere).encode_texts(TEXTS, progress=False)
    assert fingerprints(elsewhere) == before
    model, processor = elsewhere

    def differ() -> tuple[bool, bool]:
        now = fingerprints(elsewhere)
        return now[0] != before[0], now[1] != before[1]

    weights = model.state_dict()
    of_images = [name for name in weights if name.startswith(("vision_model.", "visual_projection."))]
    of_texts = [name for name in weights if name not in (*of_images, "logit_scale", "logit_bias")]
    expected = {of_images[0]: (True, False), of_images[-1]: (True, False), "logit_scale": (False, False)}
    expected |= {of_texts[0]: (False, True), of_texts[-1]: (False, True)}
    for name, changes in expected.items():
        own = weights[name].clone()
        weights[name].view(-1)[-1] += 1
        assert differ() == changes, name
        weights[name].copy_(own)
    assert all(name.startswith(("text_model.", "text_projection.")) for name in of_texts)

    image_mean = processor.image_processor.image_mean
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert differ() == (True, False)
    processor.image_processor.image_mean = image_mean
    processor.tokenizer.model_max_length = 5
    assert differ() == (False, True)
    processor.tokenizer.model_max_length = pair[1].tokenizer.model_max_length
    assert differ() == (False, False)
    processor.tokenizer.add_tokens(["lotlip"])
    assert differ() == (False, True)


def test_a_longer_limit_of_the_tokenizer_is_not_the_models(tmp_path: Path, golden: Path) -> None:
    KINDS["bert-vit"](tmp_path / "model", golden)
    model, processor = load_model(tmp_path / "model", device="cpu")
    assert AutoProcessor.from_pretrained(tmp_path / "model").tokenizer.model_max_length > 10**6
    assert processor.tokenizer.model_max_length == max_text_length(model, processor.tokenizer) == POSITIONS
    processor.tokenizer.model_max_length = 10**9
    assert max_text_length(model, processor.tokenizer) == POSITIONS
    processor.tokenizer.model_max_length = 10
    assert max_text_length(model, processor.tokenizer) == 10


@pytest.mark.slow  # the export
def test_onnx_through_load_model(
    tmp_path_factory: pytest.TempPathFactory, official_checkpoint: Path, pictures: list[Path], tmp_path: Path
) -> None:
    base = tmp_path_factory.getbasetemp()
    # the folder that tests/engines/test_onnx.py makes, as well
    exported = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "onnx-official"
    with FileLock(f"{exported}.lock"):
        if not exported.exists():
            export_onnx(official_checkpoint, exported)
    pair, own = load_model(exported), load_model(official_checkpoint, device="cpu")
    assert isinstance(pair[0], LoTLIPOnnxModel)
    options = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(
        Encoder(*pair).encode_texts(TEXTS, progress=False),
        Encoder(*own).encode_texts(TEXTS, progress=False),
        **options,
    )
    torch.testing.assert_close(
        Encoder(*pair).encode_images(pictures, progress=False),
        Encoder(*own).encode_images(pictures, progress=False),
        **options,
    )
    elsewhere = load_model(shutil.copytree(exported, tmp_path / "elsewhere"))
    for modality in ("image", "text"):
        assert (
            Encoder(*elsewhere).fingerprint(modality)
            == Encoder(*pair).fingerprint(modality)
            != Encoder(*own).fingerprint(modality)
        )
    assert model_revision(pair[0]) is None
    assert model_versions(pair[0]) == {"onnxruntime": version("onnxruntime")}
    assert model_versions(own[0]) == {}
    with pytest.raises(ValueError, match="`revision` 'main' is of models on the Hub; .*onnx-official is a folder"):
        load_model(exported, revision="main")


# From the Hub.

REPO = "lotlip/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with nothing on it."""
    with hub_server(tmp_path / "hub") as server:
        use_in_process(monkeypatch, server, tmp_path / "cache")
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
def test_revisions(hub: Hub, official_checkpoint: Path, tmp_path: Path) -> None:
    """Two commits that differ in configuration, weights, tokenizer and image processor."""
    older = hub.add(REPO, contents(official_checkpoint))
    model, processor = load_model(official_checkpoint, device="cpu")
    with torch.no_grad():
        model.text_projection.weight.add_(1)
        model.logit_scale.fill_(2.0)
    model.config.logit_scale_init_value = 2.0
    processor.tokenizer.model_max_length = 9
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    model.save_pretrained(tmp_path / "newer")
    processor.save_pretrained(tmp_path / "newer")
    newer = hub.add(REPO, contents(tmp_path / "newer"))
    assert older != newer

    for revision, commit, scale, length, mean in (
        (None, newer, 2.0, 9, 0.1),
        ("main", newer, 2.0, 9, 0.1),
        (older, older, 2.659, 126, 0.5),
        (newer, newer, 2.0, 9, 0.1),
    ):
        model, processor = load_model(REPO, device="cpu", revision=revision)
        assert model.logit_scale.item() == pytest.approx(scale, abs=0.02)
        assert model.config.logit_scale_init_value == pytest.approx(scale, abs=0.02)
        assert processor.tokenizer.model_max_length == length
        assert processor.image_processor.image_mean[0] == mean
        assert model_revision(model) == commit
    with pytest.raises(OSError, match=r"nothing is not a valid git identifier .*lotlip/tiny"):
        load_model(REPO, revision="nothing")
    # saved and loaded again it comes from no commit
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert model_revision(load_model(tmp_path / "saved", device="cpu")[0]) is None
    with pytest.raises(ValueError, match="`revision` 'main' is of models on the Hub; .*saved is a folder"):
        load_model(tmp_path / "saved", revision="main")


@pytest.mark.slow
def test_a_push_while_loading_changes_nothing(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_clip.save_clip(tmp_path / "clip")
    first = hub.add(REPO, contents(tmp_path / "clip"))
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
    tokenizer = tiny_clip.clip_tokenizer(9)
    tiny_clip.save_clip(tmp_path / "other", model, tokenizer)
    from_pretrained = AutoConfig.from_pretrained
    commits = []

    def push_after(*arguments: Any, **keywords: Any) -> Any:
        config = from_pretrained(*arguments, **keywords)
        if not commits:
            commits.append(hub.add(REPO, contents(tmp_path / "other")))
        return config

    monkeypatch.setattr(AutoConfig, "from_pretrained", push_after)
    loaded, processor = load_model(REPO, device="cpu")
    assert loaded.logit_scale.item() == 3.0
    assert processor.tokenizer.model_max_length == 77
    assert model_revision(loaded) == first
    loaded, processor = load_model(REPO, device="cpu")
    assert loaded.logit_scale.item() == 1.0
    assert processor.tokenizer.model_max_length == 9
    assert [model_revision(loaded)] == commits


def test_the_revision_without_a_network(hub: Hub, official_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = hub.add(REPO, contents(official_checkpoint))
    load_model(REPO, device="cpu")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_revision(load_model(REPO, device="cpu")[0]) == commit
    assert model_revision(load_model(REPO, device="cpu", revision=commit)[0]) == commit
    assert not hub.requests


def test_a_model_that_was_made_here_has_no_revision(official_checkpoint: Path) -> None:
    model = LoTLIPModel.from_pretrained(official_checkpoint)
    assert model_revision(model) is None
    assert model_revision(tiny_clip.clip_model()) is None
