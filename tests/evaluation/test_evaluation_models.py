"""Dual encoders of every kind through `load_encoder`: features, fingerprints and revisions are those of each class."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
from lotlip_hf import Encoder, LoTLIPModel, load_encoder
from lotlip_hf.conversion.clip import convert as convert_clip

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
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = [*SPECIAL, *",.", "dog", "word", *LETTERS, *(f"##{letter}" for letter in LETTERS)]

# Writes a checkpoint into a folder and returns how many tokens its texts may have.
Make = Callable[[Path, Path], int]


def save(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    tiny_clip.random_weights(model)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def bert_tokenizer() -> BertTokenizer:
    """From a bare vocabulary: without a `model_max_length`."""
    return BertTokenizer(vocab={token: index for index, token in enumerate(VOCABULARY)})


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
    vocabulary = {token: index for index, token in enumerate([*special, "▁", *LETTERS, "do", "dog"])}
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
def test_features_are_those_of_the_class(checkpoint: Path, pictures: list[Path], caplog: Any) -> None:
    encoder = load_encoder(checkpoint, device="cpu")
    limit = int((checkpoint / "limit").read_text())
    assert encoder.max_text_length == limit
    texts, images = naive(checkpoint, pictures)
    for batch_size in (1, 2, 50):
        options = {"batch_size": batch_size, "progress": False}
        torch.testing.assert_close(encoder.encode_texts(TEXTS, **options), texts, atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.encode_images(pictures, **options), images, atol=1e-5, rtol=0)
    # texts and images differ by far more than the tolerance
    assert (texts[0] - texts[2]).abs().max() > 1e-3
    assert (images[0] - images[1]).abs().max() > 1e-3
    lengths = [len(ids) for ids in encoder.engine.tokenizer(TEXTS, verbose=False)["input_ids"]]
    count = sum(length > limit for length in lengths)
    assert (f"{count} of {len(TEXTS)} texts were cut at {limit} tokens." in caplog.text) == (count > 0)
    assert max(lengths) > min(limit, 80)


def fingerprints(encoder: Encoder) -> tuple[str, str]:
    return encoder.fingerprint("image"), encoder.fingerprint("text")


@pytest.mark.slow
def test_fingerprints(checkpoint: Path, tmp_path: Path) -> None:
    before = fingerprints(load_encoder(checkpoint, device="cpu"))
    assert before[0] != before[1]
    encoder = load_encoder(shutil.copytree(checkpoint, tmp_path / "elsewhere"), device="cpu")
    assert fingerprints(encoder) == before
    encoder.encode_texts(TEXTS, progress=False)
    assert fingerprints(encoder) == before

    def differ() -> tuple[bool, bool]:
        now = fingerprints(encoder)
        return now[0] != before[0], now[1] != before[1]

    weights = encoder.engine.model.state_dict()
    of_images = [name for name in weights if name.startswith(("vision_model.", "visual_projection."))]
    of_texts = [name for name in weights if name not in (*of_images, "logit_scale", "logit_bias")]
    assert all(name.startswith(("text_model.", "text_projection.")) for name in of_texts)
    expected = {of_images[0]: (True, False), of_images[-1]: (True, False), "logit_scale": (False, False)}
    expected |= {of_texts[0]: (False, True), of_texts[-1]: (False, True)}
    for name, changes in expected.items():
        own = weights[name].clone()
        weights[name].view(-1)[-1] += 1
        assert differ() == changes, name
        weights[name].copy_(own)

    tokenizer, image_processor = encoder.engine.tokenizer, encoder.engine.image_processor
    for part, name, value, changes in (
        (image_processor, "image_mean", [0.1, 0.2, 0.3], (True, False)),
        (encoder.engine, "background", (0, 0, 0), (True, False)),
        (tokenizer, "model_max_length", 5, (False, True)),
    ):
        own = getattr(part, name)
        setattr(part, name, value)
        assert differ() == changes, name
        setattr(part, name, own)
    assert differ() == (False, False)
    tokenizer.add_tokens(["lotlip"])
    assert differ() == (False, True)


def test_a_longer_limit_of_the_tokenizer_is_not_the_models(tmp_path: Path, golden: Path) -> None:
    KINDS["bert-vit"](tmp_path / "model", golden)
    encoder = load_encoder(tmp_path / "model", device="cpu")
    tokenizer = encoder.engine.tokenizer
    assert AutoProcessor.from_pretrained(tmp_path / "model").tokenizer.model_max_length > 10**6
    assert tokenizer.model_max_length == encoder.max_text_length == POSITIONS
    for limit, expected in ((10**9, POSITIONS), (10, 10)):
        tokenizer.model_max_length = limit
        assert encoder.max_text_length == expected


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
    engine = load_encoder(official_checkpoint, device="cpu").engine
    with torch.no_grad():
        engine.model.logit_scale.fill_(2.0)
    engine.model.config.logit_scale_init_value = 2.0
    engine.tokenizer.model_max_length = 9
    engine.image_processor.image_mean = [0.1, 0.2, 0.3]
    engine.model.save_pretrained(tmp_path / "newer")
    engine.processor.save_pretrained(tmp_path / "newer")
    newer = hub.add(REPO, contents(tmp_path / "newer"))
    assert older != newer

    for revision, commit, scale, length, mean in (
        (None, newer, 2.0, 9, 0.1),
        ("main", newer, 2.0, 9, 0.1),
        (older, older, 2.659, 126, 0.5),
        (newer, newer, 2.0, 9, 0.1),
    ):
        encoder = load_encoder(REPO, device="cpu", revision=revision)
        model = encoder.engine.model
        assert model.logit_scale.item() == pytest.approx(scale, abs=0.02)
        assert model.config.logit_scale_init_value == pytest.approx(scale, abs=0.02)
        assert encoder.max_text_length == length
        assert encoder.engine.image_processor.image_mean[0] == mean
        assert encoder.revision == commit
    with pytest.raises(OSError, match="nothing"):
        load_encoder(REPO, revision="nothing")
    # saved and loaded again it comes from no commit
    model.save_pretrained(tmp_path / "saved")
    encoder.engine.processor.save_pretrained(tmp_path / "saved")
    assert load_encoder(tmp_path / "saved", device="cpu").revision is None
    with pytest.raises(ValueError, match="`revision`"):
        load_encoder(tmp_path / "saved", revision="main")


@pytest.mark.slow
def test_a_push_while_loading_changes_nothing(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_clip.save_clip(tmp_path / "clip")
    first = hub.add(REPO, contents(tmp_path / "clip"))
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
    tiny_clip.save_clip(tmp_path / "other", model, tiny_clip.clip_tokenizer(9))
    from_pretrained = AutoConfig.from_pretrained
    commits = []

    def push_after(*arguments: Any, **keywords: Any) -> Any:
        config = from_pretrained(*arguments, **keywords)
        if not commits:
            commits.append(hub.add(REPO, contents(tmp_path / "other")))
        return config

    monkeypatch.setattr(AutoConfig, "from_pretrained", push_after)
    loaded = [load_encoder(REPO, device="cpu") for _ in range(2)]
    assert [encoder.engine.model.logit_scale.item() for encoder in loaded] == [3.0, 1.0]
    assert [encoder.max_text_length for encoder in loaded] == [77, 9]
    assert [encoder.revision for encoder in loaded] == [first, *commits]


def test_the_revision_without_a_network(hub: Hub, official_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = hub.add(REPO, contents(official_checkpoint))
    load_encoder(REPO, device="cpu")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, commit):
        assert load_encoder(REPO, device="cpu", revision=revision).revision == commit
    assert not hub.requests


def test_a_model_that_was_made_here_has_no_revision(official_checkpoint: Path) -> None:
    processor = AutoProcessor.from_pretrained(official_checkpoint)
    for model in (LoTLIPModel.from_pretrained(official_checkpoint), tiny_clip.clip_model()):
        encoder = Encoder(model, processor)
        assert encoder.revision is None
        assert encoder.versions == {}
