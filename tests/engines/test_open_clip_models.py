"""open_clip's models through `load_encoder`: names, tokens, errors, fingerprints on a stand-in; features on itself."""

import io
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertTokenizer, CLIPImageProcessorPil

import tiny_clip
from hub_server import hub_server, use_in_process
from lotlip_hf import Encoder, load_encoder
from lotlip_hf.engines.open_clip import OpenClipImageProcessor
from lotlip_hf.images import load_image, load_pixels
from lotlip_hf.metrics.clip_score import clip_score

CONTEXT_LENGTH = 8
TEXTS = ["a dog", "", "one two three four five six", "one two three four five six seven", "word " * 50, "!!! 猫 &amp;"]
NORMALISATION = {"mean": [0.5] * 3, "std": [0.5] * 3}
PREPROCESSING = {**NORMALISATION, "size": 32, "interpolation": "bicubic", "resize_mode": "shortest"}


def load(name: str = "Tiny-32/laion", **options: Any) -> Encoder:
    return load_encoder(f"open_clip:{name}", **{"device": "cpu", **options})


def fingerprints(encoder: Encoder) -> tuple[str, str]:
    return encoder.fingerprint("image"), encoder.fingerprint("text")


# A stand-in with the functions of open_clip that the engine calls.


class WordTokenizer:
    """Words as their lengths between 98 and 99, cut and padded with 0 as open_clip's `SimpleTokenizer` does."""

    def __init__(self, context_length: int = CONTEXT_LENGTH) -> None:
        self.context_length = context_length
        self.encoder = {"<start>": 98, "<end>": 99}

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> torch.Tensor:
        length = context_length or self.context_length
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [98, *(min(len(word), 90) for word in text.split()), 99]
            if len(ids) > length:
                ids = [*ids[: length - 1], 99]
            row[: len(ids)] = torch.tensor(ids)
        return rows


class ClassTokenTokenizer(WordTokenizer):
    """As open_clip's `HFTokenizer` in the mode "clips": a class token at the last position, behind the padding."""

    def __init__(self, context_length: int = CONTEXT_LENGTH) -> None:
        super().__init__(context_length)
        self.tokenizer_mode = "clips"

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> torch.Tensor:
        length = context_length or self.context_length
        return torch.cat([super().__call__(texts, length - 1), torch.full((len(texts), 1), 97)], 1)


class EndIsPaddingTokenizer(WordTokenizer):
    """As with SigLIP's: the end of a text is the token that pads it, 1."""

    def __init__(self, context_length: int = CONTEXT_LENGTH) -> None:
        super().__init__(context_length)
        self.tokenizer = SimpleNamespace(pad_token_id=1, padding_side="right", init_kwargs={"lower": True})

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> torch.Tensor:
        length = context_length or self.context_length
        rows = torch.ones(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [10 + min(len(word), 80) for word in text.split()][: length - 1]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return rows


TOKENIZERS = [WordTokenizer, ClassTokenTokenizer, EndIsPaddingTokenizer]


class DualEncoder(nn.Module):
    """Any two towers; every position of a text counts, so that wrong padding shows."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(3, 4)
        self.visual.preprocess_cfg = dict(PREPROCESSING)
        self.token_embedding = nn.Embedding(100, 4)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT_LENGTH, 4))
        self.logit_scale = nn.Parameter(torch.ones([]))

    def encode_text(self, text: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        features = (self.token_embedding(text) * self.positional_embedding).sum(1)
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_image(self, image: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        features = self.visual(image.mean((2, 3)))
        return nn.functional.normalize(features, dim=-1) if normalize else features


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What `import open_clip` gives, with two architectures; what was loaded is in `loaded`."""
    module: Any = ModuleType("open_clip")
    openai, laion = {"hf_hub": "timm/tiny.openai/", "quick_gelu": True}, {"hf_hub": ""}
    both = {"openai": openai, "laion": laion}
    tags = {"Tiny-32": both, "Tiny-32-quickgelu": both, "Tiny-16-quickgelu": {"openai": openai}}
    module.__version__ = "3.3.0"
    module.loaded = []
    module.tokenizer_class = WordTokenizer
    module.list_models = lambda: list(tags)
    module.list_pretrained_tags_by_model = lambda name: list(tags.get(name, {}))
    module.get_model_config = lambda name: {
        "embed_dim": 4,
        "quick_gelu": name.endswith("quickgelu"),
        "vision_cfg": {"image_size": 32},
        "text_cfg": {"context_length": CONTEXT_LENGTH},
    }

    def get_pretrained_cfg(name: str, tag: str) -> dict[str, Any]:
        return tags[name].get(tag, {})

    def create_model_from_pretrained(
        name: str, pretrained: str | None = None, pretrained_text: bool = True
    ) -> tuple[nn.Module, Callable]:
        module.loaded.append((name, pretrained))
        torch.manual_seed(0)
        return DualEncoder(), lambda image: torch.from_numpy(np.array(image.resize((32, 32)))).movedim(2, 0) / 255

    module.get_pretrained_cfg = get_pretrained_cfg
    module.create_model_from_pretrained = create_model_from_pretrained
    module.get_tokenizer = lambda name: module.tokenizer_class()
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return module


def test_names(stand_in: Any, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    weights.touch()
    (tmp_path / "open_clip_config.json").touch()
    expected = {
        "Tiny-32/laion": ("Tiny-32", "laion"),
        "Tiny/32/laion": ("Tiny-32", "laion"),
        "Tiny-16-quickgelu": ("Tiny-16-quickgelu", "openai"),  # the only one there is
        f"Tiny-32/{weights}": ("Tiny-32", str(weights)),
        "hf-hub:org/name": ("hf-hub:org/name", None),
        f"local-dir:{tmp_path}": (f"local-dir:{tmp_path}", None),
    }
    for name, loaded in expected.items():
        encoder = load(name)
        assert stand_in.loaded.pop() == loaded
        assert encoder.name == f"open_clip:{name}"
        assert not encoder.engine.model.training


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Tiny-64/openai", "'Tiny-64'.*Tiny-32"),
        ("", "list_models"),
        ("Tiny-32", "Tiny-32/WEIGHTS.*openai, laion"),
        ("Tiny-32/", "Tiny-32/WEIGHTS"),
        ("Tiny-32/none.pt", "'none.pt'.*openai, laion"),
        # trained with another activation
        ("Tiny-32/openai", "open_clip:Tiny-32-quickgelu/openai"),
        ("Tiny-32-quickgelu/laion", "open_clip:Tiny-32/laion"),
    ],
)
def test_names_of_nothing(stand_in: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name)
    assert not stand_in.loaded


def test_folders_that_are_none(stand_in: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(f"local-dir:{tmp_path}/nowhere")
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json"):
        load(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("text_cfg", ["hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "folder"])
def test_no_code_of_a_model_that_open_clip_names_runs(
    text_cfg: str, stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip leaves it to transformers, which asks; or to the model's configuration."""
    auto_map = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]}
    for name in ("config.json", "tokenizer_config.json", "open_clip_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "own-code", "auto_map": auto_map}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    settings = {
        "hf_model_name": {"hf_model_name": str(tmp_path)},
        "hf_tokenizer_name": {"hf_tokenizer_name": str(tmp_path)},
        "tokenizer_kwargs": {"tokenizer_kwargs": {"trust_remote_code": True}},
        "folder": {"hf_tokenizer_name": "org/name"},
    }
    monkeypatch.setattr(stand_in, "get_model_config", lambda name: {"text_cfg": settings[text_cfg]})
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(f"local-dir:{tmp_path}" if text_cfg == "folder" else "Tiny-32/laion")
    assert sys.stdin.tell() == 0
    assert not stand_in.loaded
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("Missing key(s):\n  visual.a"), ValueError, r"Missing key\(s\): visual\.a"),
        (RuntimeError("word " * 1000), ValueError, "cannot load it"),
        (PermissionError(13, "not allowed"), OSError, "not allowed"),
    ],
)
def test_what_open_clip_refuses_is_said_with_the_name(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(stand_in, "create_model_from_pretrained", fail)
    with pytest.raises(kind, match=f"Tiny-32/laion: .*{message}") as caught:
        load()
    assert len(str(caught.value)) < 700


def test_revisions(stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`revision` 'v1'.*local-dir:"):
        load("hf-hub:org/name", revision="v1")
    assert not stand_in.loaded
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for repository, commit in {"org--name": "1" * 40, "timm--tiny.openai": "2" * 40}.items():
        (tmp_path / f"models--{repository}" / "refs").mkdir(parents=True)
        (tmp_path / f"models--{repository}" / "refs" / "main").write_text(commit)
    commits = {"hf-hub:org/name": "1" * 40, "Tiny-32-quickgelu/openai": "2" * 40, "Tiny-32/laion": None}
    for name, commit in commits.items():
        encoder = load(name)
        assert encoder.revision == commit
        assert encoder.versions["open_clip"] == "3.3.0"


def test_without_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install 'lotlip-hf\[open-clip\]'"):
        load("ViT-B-32/openai")


def test_its_log_is_ours(stand_in: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    create = stand_in.create_model_from_pretrained

    def warn(*arguments: Any, **keywords: Any) -> Any:
        logging.info("Parsing")  # which set the root logger up, where it had no handler
        logging.warning("Multiple checkpoints found in %s.", "here")
        return create(*arguments, **keywords)

    monkeypatch.setattr(stand_in, "create_model_from_pretrained", warn)
    monkeypatch.setattr(logging.root, "handlers", [])
    logger = logging.getLogger("lotlip_hf")
    logger.addHandler(caplog.handler)
    try:
        load()
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == ["open_clip: Multiple checkpoints found in here."]
    assert logging.root.handlers == []


def test_devices_and_dtypes(stand_in: Any) -> None:
    encoder = load(dtype="bfloat16")
    assert encoder.dtype == torch.bfloat16
    assert encoder.device == torch.device("cpu")
    assert encoder.encode_texts(TEXTS, progress=False).dtype == torch.float32
    with pytest.raises(ValueError, match="`device` 'nowhere'"):
        load(device="nowhere")


@pytest.mark.parametrize("tokenizer_class", TOKENIZERS)
@pytest.mark.parametrize("max_length", [None, 4])
def test_rows_are_open_clips(stand_in: Any, tokenizer_class: type, max_length: int | None) -> None:
    stand_in.tokenizer_class = tokenizer_class
    encoder, own = load(), tokenizer_class()
    assert encoder.max_text_length == CONTEXT_LENGTH
    length = max_length or CONTEXT_LENGTH
    expected = own(TEXTS, length)
    if max_length is not None:  # padded to the full length all the same
        padding = torch.full((len(TEXTS), CONTEXT_LENGTH - length), 1 if hasattr(own, "tokenizer") else 0)
        kept = length - hasattr(own, "tokenizer_mode")
        expected = torch.cat([expected[:, :kept], padding, expected[:, kept:]], 1)
    encoded, _ = encoder.engine.tokenize(TEXTS, length)
    assert (encoder.engine.pad(encoded)["text"] == expected.numpy()).all()
    with torch.no_grad():
        features = encoder.engine.model.encode_text(expected, normalize=True)
    for batch_size in (1, 4):
        given = encoder.encode_texts(TEXTS, batch_size=batch_size, max_length=max_length, progress=False)
        torch.testing.assert_close(given, features, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("tokenizer_class", "special"), list(zip(TOKENIZERS, (2, 3, 1), strict=True)))
def test_texts_that_are_cut_are_told_of(
    stand_in: Any, tokenizer_class: type, special: int, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.tokenizer_class = tokenizer_class
    encoder = load()
    texts = ["word " * count for count in range(12)]
    encoded, was_cut = encoder.engine.tokenize(texts, CONTEXT_LENGTH)
    assert was_cut == [count + special > CONTEXT_LENGTH for count in range(12)]
    end_is_padding = tokenizer_class is EndIsPaddingTokenizer  # and counts as such
    lengths = [min(count + special, CONTEXT_LENGTH) - end_is_padding for count in range(12)]
    assert [len(ids) for ids in encoded["input_ids"]] == lengths
    encoder.encode_texts(texts, progress=False)
    assert f"{sum(was_cut)} of 12 texts were cut at 8 tokens." in caplog.text


def test_a_tokenizer_that_pads_on_the_left_is_refused(stand_in: Any) -> None:
    class LeftTokenizer(EndIsPaddingTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer.padding_side = "left"

    stand_in.tokenizer_class = LeftTokenizer
    with pytest.raises(ValueError, match="Tiny-32/laion: .*left"):
        load()


def test_images_and_scores(stand_in: Any, golden: Path) -> None:
    encoder = load()
    pictures = sorted((golden / "images").glob("*.png"))
    transform = encoder.engine.image_processor.transform
    with torch.no_grad():
        pixels = torch.stack([transform(load_image(path)) for path in pictures])
        expected = encoder.engine.model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(encoder.encode_images(pictures, progress=False), expected, atol=1e-6, rtol=0)
    scores = clip_score(pictures, ["a dog"] * len(pictures), encoder)
    cosines = expected @ encoder.encode_texts(["a dog"], progress=False)[0]
    torch.testing.assert_close(scores.scores, 100 * cosines.clamp(min=0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(6400, 2), (3, 999)])
def test_of_thin_images_the_middle_alone_is_transformed(size: tuple[int, int]) -> None:
    like = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    seen: list[tuple[int, int]] = []

    def transform(image: Image.Image) -> torch.Tensor:
        seen.append(image.size)
        return like(images=image, return_tensors="pt")["pixel_values"][0]

    thin = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    found = load_pixels(thin, image_processor=OpenClipImageProcessor(transform, PREPROCESSING))["pixel_values"]
    torch.testing.assert_close(found[0], transform(thin), rtol=0, atol=1.01 / 255 / min(like.image_std))
    assert max(seen[0]) <= 35


def test_fingerprints(stand_in: Any, golden: Path) -> None:
    image, text = fingerprints(load())
    assert image != text
    changes: list[tuple[Callable[[Any], Any], tuple[bool, bool]]] = [
        (lambda engine: None, (False, False)),
        (lambda engine: engine.model.logit_scale.add_(1), (False, False)),
        (lambda engine: engine.model.visual.bias.add_(1), (True, False)),
        (lambda engine: engine.model.positional_embedding[0].add_(1), (False, True)),
        (lambda engine: engine.image_processor.settings.update(resize_mode="squash"), (True, False)),
        (lambda engine: engine.tokenizer.encoder.update(new=1), (False, True)),
        (lambda engine: setattr(engine.tokenizer, "strip", True), (False, True)),
    ]
    for change, expected in changes:
        encoder = load()
        with torch.no_grad():
            change(encoder.engine)
        changed = fingerprints(encoder)
        assert (changed[0] != image, changed[1] != text) == expected
    # the activation is not in the weights
    other = fingerprints(load("Tiny-32-quickgelu/openai"))
    assert other[0] != image
    assert other[1] != text
    # neither is what a tokenizer of transformers does to a text before it looks tokens up
    tokenizers: list[Any] = [ClassTokenTokenizer(), *(EndIsPaddingTokenizer() for _ in range(2))]
    for tokenizer, do_lower_case in zip(tokenizers[1:], (True, False), strict=True):
        tokenizer.tokenizer = BertTokenizer.from_pretrained(golden / "tokenizer", do_lower_case=do_lower_case)
    found = set()
    for tokenizer in tokenizers:
        stand_in.tokenizer_class = lambda tokenizer=tokenizer: tokenizer
        found.add(fingerprints(load())[1])
    assert len(found | {text}) == 4


# open_clip itself, with models that are written here.


@pytest.fixture(scope="module")
def open_clip() -> ModuleType:
    """open_clip, where it is installed and there is a torchvision that fits torch."""
    try:
        import open_clip
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"open_clip cannot be imported ({type(error).__name__}: {error})")
    return open_clip


VISION = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 16, "width": 24, "heads": 2, "layers": 2}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "clip": {"vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True},
    "siglip": {
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "text_cfg": {
            **TEXT,
            "vocab_size": 30522,
            "hf_tokenizer_name": "bert",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True,
            "pool_type": "last",
            "proj_bias": True,
        },
        "custom_text": True,
        "init_logit_bias": -10,
    },
    "bert": {
        "vision_cfg": VISION,
        "text_cfg": {
            "hf_model_name": "bert",
            "hf_tokenizer_name": "bert",
            "hf_proj_type": "linear",
            "hf_pooler_type": "cls_pooler",
            "context_length": 16,
        },
    },
    "coca": {
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        "text_cfg": {**TEXT, "context_length": 15, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "context_length": 15},
        "custom_text": True,
    },
}
LONG_TEXTS = [*TEXTS, "a photo of a dog, and of the house! " * 4, "ein Häuschen &amp; 3 Katzen <|x|>"]


def write_model(folder: Path, kind: str, golden: Path, open_clip: Any) -> Path:
    """A folder as open_clip publishes its models."""
    folder.mkdir()
    configuration = json.loads(json.dumps(CONFIGURATIONS[kind]))
    text = configuration["text_cfg"]
    if "hf_tokenizer_name" in text:
        BertTokenizer.from_pretrained(golden / "tokenizer").save_pretrained(folder)
    if "hf_model_name" in text:
        config = BertConfig(**tiny_clip.SIZE, vocab_size=30522, max_position_embeddings=16)
        config.save_pretrained(folder.with_name("bert-config"))
        text["hf_model_name"] = str(folder.with_name("bert-config"))
    size = configuration["vision_cfg"]["image_size"]
    configuration = {
        "model_cfg": {"embed_dim": 64 if kind == "siglip" else 24, **configuration},
        "preprocess_cfg": {**PREPROCESSING, "size": size, "resize_mode": "squash" if size == 160 else "shortest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(configuration))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    tiny_clip.random_weights(model)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module", params=list(CONFIGURATIONS))
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, golden: Path, open_clip: Any
) -> Path:
    """A model of each kind. Tests must not write to it."""
    return write_model(tmp_path_factory.mktemp("open_clip") / request.param, request.param, golden, open_clip)


def test_features_are_open_clips(open_clip: Any, folder: Path, golden: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = f"local-dir:{folder}"
    model, transform = open_clip.create_model_from_pretrained(name)
    tokenizer = open_clip.get_tokenizer(name)
    encoder = load(name)
    pictures = sorted((golden / "images").glob("*.png"))
    with torch.no_grad():
        texts = torch.cat([model.eval().encode_text(tokenizer([text]), normalize=True) for text in LONG_TEXTS])
        pixels = [transform(load_image(path)) for path in pictures]
        images = torch.cat([model.encode_image(one[None], normalize=True) for one in pixels])
    for batch_size in (1, 3):
        options = {"batch_size": batch_size, "progress": False}
        torch.testing.assert_close(encoder.encode_texts(LONG_TEXTS, **options), texts, atol=1e-6, rtol=0)
        torch.testing.assert_close(encoder.encode_images(pictures, **options), images, atol=1e-6, rtol=0)
    assert (texts[0] - texts[2]).abs().max() > 1e-3
    assert (images[0] - images[1]).abs().max() > 1e-3
    # so many are cut, counted by hand: as long as the context are the last of these only if they are longer
    length = tokenizer.context_length
    rows = tokenizer(LONG_TEXTS, context_length=200)
    assert f"{sum(cut_at(rows, length))} of {len(LONG_TEXTS)} texts were cut at {length} tokens." in caplog.text
    # what cannot be seen in a shorter text
    short = encoder.encode_texts(["a dog", "a photo " * 9], max_length=6, progress=False)
    torch.testing.assert_close(short[0], texts[0], atol=1e-6, rtol=0)


def cut_at(rows: torch.Tensor, length: int) -> list[bool]:
    """Which texts have more than `length` tokens, from rows in which none is cut."""
    padding = rows[1, -1]  # of the empty text
    return (rows != padding).flip(1).int().argmax(1).sub(rows.shape[1]).neg().gt(length).tolist()


def test_fingerprints_of_open_clips_own(folder: Path, tmp_path: Path) -> None:
    encoder = load(f"local-dir:{folder}")
    before = fingerprints(encoder)
    weights = dict(encoder.engine.model.named_parameters())
    of_images = [name for name in weights if name.startswith("visual.")]
    of_texts = [name for name in weights if name not in (*of_images, "logit_scale", "logit_bias")]
    expected = {"logit_scale": (False, False), of_images[0]: (True, False), of_images[-1]: (True, False)}
    expected |= {of_texts[0]: (False, True), of_texts[-1]: (False, True)}
    for name, differ in expected.items():
        weight = weights[name].data.clone()
        weights[name].data.view(-1)[-1] += 1
        now = fingerprints(encoder)
        assert (now[0] != before[0], now[1] != before[1]) == differ, name
        weights[name].data.copy_(weight)
    elsewhere = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    configuration = json.loads((elsewhere / "open_clip_config.json").read_text())
    for interpolation, is_same in (("bicubic", True), ("bilinear", False)):
        configuration["preprocess_cfg"]["interpolation"] = interpolation
        (elsewhere / "open_clip_config.json").write_text(json.dumps(configuration))
        now = fingerprints(load(f"local-dir:{elsewhere}"))
        assert (now[0] == before[0], now[1]) == (is_same, before[1])


@pytest.fixture
def architecture(open_clip: Any, tmp_path: Path) -> Iterator[str]:
    """A tiny architecture among open_clip's own, and a file of its weights in `weights.pt`."""
    from open_clip import factory

    config = tmp_path / "lotlip-test-tiny.json"
    config.write_text(json.dumps({"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(config)
    model = open_clip.create_model(config.stem)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "weights.pt")
    yield config.stem
    factory._MODEL_CONFIG_PATHS.remove(config)
    del factory._MODEL_CONFIGS[config.stem]


def test_an_architecture_with_a_file(open_clip: Any, architecture: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    model, _ = open_clip.create_model_from_pretrained(architecture, str(weights))
    encoder, half = load(f"{architecture}/{weights}"), load(f"{architecture}/{weights}", dtype="bfloat16")
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(architecture)(LONG_TEXTS), normalize=True)
    torch.testing.assert_close(encoder.encode_texts(LONG_TEXTS, progress=False), expected, atol=1e-6, rtol=0)
    assert (half.encode_texts(LONG_TEXTS, progress=False) * expected).sum(1).min() > 0.98
    image = Image.new("RGB", (50, 40), "red")
    assert (half.encode_images([image]) * encoder.encode_images([image])).sum(1).min() > 0.98

    with pytest.raises(ValueError, match=f"{architecture}/WEIGHTS"):
        load(architecture)
    torch.save({"visual.proj": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"weights\.pt: .*state_dict"):
        load(f"{architecture}/{weights}")
    weights.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"weights\.pt: "):
        load(f"{architecture}/{weights}")


def test_a_model_on_the_hub(open_clip: Any, tmp_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", "clip", golden, open_clip)
    with hub_server(tmp_path / "hub") as hub:
        use_in_process(monkeypatch, hub, tmp_path / "cache")
        commit = hub.add("org/name", {file.name: file.read_bytes() for file in folder.iterdir()})
        encoder = load("hf-hub:org/name")
        with pytest.raises(OSError, match="hf-hub:org/nothing"):
            load("hf-hub:org/nothing")
    local = load(f"local-dir:{folder}")
    torch.testing.assert_close(encoder.encode_texts(LONG_TEXTS), local.encode_texts(LONG_TEXTS), atol=1e-6, rtol=0)
    assert fingerprints(encoder) == fingerprints(local)
    assert encoder.revision == commit
    assert local.revision is None
    assert encoder.versions.keys() == {"open_clip", "timm", "torchvision"}


def test_open_clips_own_names(
    open_clip: Any, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip import pretrained

    for name, message in (
        ("ViT-B/32", "open_clip:ViT-B-32/WEIGHTS.* openai, .*laion2b"),
        ("ViT-B-33/openai", "'ViT-B-33'.*ViT-B-32"),
        ("ViT-B-16/openai", "open_clip:ViT-B-16-quickgelu/openai"),
    ):
        with pytest.raises(ValueError, match=message):
            load(name)
    tag = {"file": str(tmp_path / "weights.pt"), "quick_gelu": True}
    monkeypatch.setitem(pretrained._PRETRAINED, architecture, {"openai": tag})
    with pytest.raises(ValueError, match=f"open_clip:{architecture}-quickgelu/openai"):
        load(architecture)
    monkeypatch.setitem(tag, "quick_gelu", False)
    assert load(architecture).name == f"open_clip:{architecture}"


def test_a_folder_without_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "open_clip_config.json", tmp_path)
    with pytest.raises(ValueError, match="local-dir:"):
        load(f"local-dir:{tmp_path}")
