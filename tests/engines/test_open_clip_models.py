"""open_clip's models through load_model: names, tokens, errors and fingerprints on a stand-in, features on itself."""

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
from lotlip_hf import Encoder
from lotlip_hf.engines.open_clip import OpenClipImageProcessor
from lotlip_hf.evaluation.models import model_revision, model_versions
from lotlip_hf.images import load_image, load_pixels
from lotlip_hf.loading import load_model, max_text_length
from lotlip_hf.metrics.clip_score import clip_score

CONTEXT_LENGTH = 8
TEXTS = ["a dog", "", "one two three four five six", "one two three four five six seven", "word " * 50, "!!! 猫 &amp;"]
PREPROCESSING = {
    "size": 32,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


# A stand-in with open_clip's functions and calls, of which the adapter uses no others.


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
    """As open_clip's `HFTokenizer` in the mode "clips": a class token in the last place, behind the padding."""

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
    """Any two towers; every place of a text counts, so that wrong padding shows."""

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
    expected = {
        "Tiny-32/laion": ("Tiny-32", "laion"),
        "Tiny/32/laion": ("Tiny-32", "laion"),
        "Tiny-16-quickgelu": ("Tiny-16-quickgelu", "openai"),  # the only one there is
        f"Tiny-32/{weights}": ("Tiny-32", str(weights)),
        "hf-hub:org/name": ("hf-hub:org/name", None),
        f"local-dir:{tmp_path}": (f"local-dir:{tmp_path}", None),
    }
    (tmp_path / "open_clip_config.json").touch()
    for name, loaded in expected.items():
        model, _ = load_model(f"open_clip:{name}", device="cpu")
        assert stand_in.loaded.pop() == loaded
        assert model.name_or_path == f"open_clip:{name}"
        assert not model.training


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Tiny-64/openai", r"open_clip 3.3.0 has no architecture 'Tiny-64'; did you mean Tiny-32\. `open"),
        ("", "has no architecture ''. `open_clip.list_models"),
        ("Tiny-32", r"Tiny-32: which weights\? Expected open_clip:Tiny-32/WEIGHTS, a file or one of: openai, laion"),
        ("Tiny-32/", r"which weights\?"),
        ("Tiny-32/none.pt", r"no weights and no file 'none.pt'. Expected .* a file or one of: openai, laion"),
    ],
)
def test_names_of_nothing(stand_in: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(f"open_clip:{name}")
    assert not stand_in.loaded


def test_folders_that_are_none(stand_in: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no .*/nowhere; expected open_clip's configuration"):
        load_model(f"open_clip:local-dir:{tmp_path}/nowhere")
    with pytest.raises(FileNotFoundError, match="no .*/open_clip_config.json"):
        load_model(f"open_clip:local-dir:{tmp_path}")


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
    name = f"local-dir:{tmp_path}" if text_cfg == "folder" else "Tiny-32/laion"
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(f"open_clip:{name}")
    assert sys.stdin.tell() == 0
    assert not stand_in.loaded
    assert not (tmp_path / "marker").exists()


def test_what_open_clip_refuses_is_said_with_the_name(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: BaseException) -> Callable[..., Any]:
        def function(*arguments: Any, **keywords: Any) -> None:
            raise error

        return function

    monkeypatch.setattr(stand_in, "create_model_from_pretrained", fail(RuntimeError("Missing key(s):\n  visual.a")))
    with pytest.raises(ValueError, match=r"Tiny-32/laion: open_clip cannot load it \(Missing key\(s\): visual.a\)"):
        load_model("open_clip:Tiny-32/laion")
    monkeypatch.setattr(stand_in, "create_model_from_pretrained", fail(RuntimeError("word " * 1000)))
    with pytest.raises(ValueError, match=r"cannot load it") as caught:
        load_model("open_clip:Tiny-32/laion")
    assert len(str(caught.value)) < 700
    monkeypatch.setattr(stand_in, "create_model_from_pretrained", fail(PermissionError(13, "not allowed")))
    with pytest.raises(OSError, match=r"Tiny-32/laion: .*not allowed"):
        load_model("open_clip:Tiny-32/laion")


def test_another_activation_is_refused(stand_in: Any) -> None:
    for name, other in (("Tiny-32/openai", "Tiny-32-quickgelu/openai"), ("Tiny-32-quickgelu/laion", "Tiny-32/laion")):
        architecture, _, _ = name.partition("/")
        with pytest.raises(ValueError, match=f"another activation than {architecture} has; take open_clip:{other}"):
            load_model(f"open_clip:{name}")
    assert not stand_in.loaded


def test_revisions(stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"open_clip takes the main branch, not `revision` 'v1'. Fetch it .*local-dir:"
    ):
        load_model("open_clip:hf-hub:org/name", revision="v1")
    assert not stand_in.loaded
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for repository, commit in {"org--name": "1" * 40, "timm--tiny.openai": "2" * 40}.items():
        (tmp_path / f"models--{repository}" / "refs").mkdir(parents=True)
        (tmp_path / f"models--{repository}" / "refs" / "main").write_text(commit)
    commits = {"hf-hub:org/name": "1" * 40, "Tiny-32-quickgelu/openai": "2" * 40, "Tiny-32/laion": None}
    for name, commit in commits.items():
        model, _ = load_model(f"open_clip:{name}", device="cpu")
        assert model_revision(model) == commit
        assert model_versions(model)["open_clip"] == "3.3.0"


def test_without_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"a torchvision that fits torch .*pip install 'lotlip-hf\[open-clip\]'"):
        load_model("open_clip:ViT-B-32/openai")


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
        load_model("open_clip:Tiny-32/laion", device="cpu")
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == ["open_clip: Multiple checkpoints found in here."]
    assert logging.root.handlers == []


def test_devices_and_dtypes(stand_in: Any) -> None:
    model, processor = load_model("open_clip:Tiny-32/laion", device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.device == torch.device("cpu")
    assert Encoder(model, processor).encode_texts(TEXTS, progress=False).dtype == torch.float32
    with pytest.raises(ValueError, match="`device` 'nowhere' cannot be used here"):
        load_model("open_clip:Tiny-32/laion", device="nowhere")


@pytest.mark.parametrize("tokenizer_class", TOKENIZERS)
@pytest.mark.parametrize("max_length", [None, 4])
def test_rows_are_open_clips(stand_in: Any, tokenizer_class: type, max_length: int | None) -> None:
    stand_in.tokenizer_class = tokenizer_class
    model, processor = load_model("open_clip:Tiny-32/laion", device="cpu")
    tokenizer, own = processor.tokenizer, tokenizer_class()
    assert max_text_length(model, tokenizer) == CONTEXT_LENGTH
    length = max_length or CONTEXT_LENGTH
    expected = own(TEXTS, length)
    if max_length is not None:  # padded to the full length all the same
        padding = torch.full((len(TEXTS), CONTEXT_LENGTH - length), 1 if hasattr(own, "tokenizer") else 0)
        kept = length - hasattr(own, "tokenizer_mode")
        expected = torch.cat([expected[:, :kept], padding, expected[:, kept:]], 1)
    padded = tokenizer.pad(tokenizer(TEXTS, max_length=max_length), padding="longest")["input_ids"]
    assert torch.equal(padded, expected)
    with torch.no_grad():
        features = model.open_clip.encode_text(expected, normalize=True)
    for batch_size in (1, 4):
        given = Encoder(model, processor).encode_texts(
            TEXTS, batch_size=batch_size, max_length=max_length, progress=False
        )
        torch.testing.assert_close(given, features, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("tokenizer_class", "special"), list(zip(TOKENIZERS, (2, 3, 1), strict=True)))
def test_texts_that_are_cut_are_told_of(
    stand_in: Any, tokenizer_class: type, special: int, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.tokenizer_class = tokenizer_class
    pair = load_model("open_clip:Tiny-32/laion", device="cpu")
    texts = ["word " * count for count in range(12)]
    encoded = pair[1].tokenizer(texts)
    was_cut = [encoding.overflowing for encoding in encoded.encodings]
    assert was_cut == [count + special > CONTEXT_LENGTH for count in range(12)]
    with caplog.at_level(logging.WARNING):
        Encoder(*pair).encode_texts(texts, progress=False)
    assert f"{sum(was_cut)} of 12 texts were cut at 8 tokens." in caplog.text
    # all of them, where nothing is to be cut
    whole = pair[1].tokenizer(texts, truncation=False)["input_ids"]
    # an end that is the padding counts as padding
    assert [len(ids) for ids in whole] == [
        count + special - (tokenizer_class is EndIsPaddingTokenizer) for count in range(12)
    ]
    assert pair[1].tokenizer([]).data == {"input_ids": []}
    assert pair[1].tokenizer("word")["input_ids"] == whole[1:2]


def test_a_tokenizer_that_pads_on_the_left_is_refused(stand_in: Any) -> None:
    class LeftTokenizer(EndIsPaddingTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer.padding_side = "left"

    stand_in.tokenizer_class = LeftTokenizer
    with pytest.raises(ValueError, match="Tiny-32/laion: .*the tokenizer pads on the left"):
        load_model("open_clip:Tiny-32/laion", device="cpu")


def test_images_and_scores(stand_in: Any, golden: Path) -> None:
    model, processor = load_model("open_clip:Tiny-32/laion", device="cpu")
    pictures = sorted((golden / "images").glob("*.png"))
    transform = processor.image_processor.transform
    with torch.no_grad():
        pixels = torch.stack([transform(load_image(path)) for path in pictures])
        expected = model.open_clip.encode_image(pixels, normalize=True)
    torch.testing.assert_close(
        Encoder(model, processor).encode_images(pictures, progress=False), expected, atol=1e-6, rtol=0
    )
    texts = ["a dog"] * len(pictures)
    scores = clip_score(pictures, texts, Encoder(model, processor), progress=False)
    cosines = expected @ Encoder(model, processor).encode_texts(["a dog"], progress=False)[0]
    torch.testing.assert_close(scores.scores, 100 * cosines.clamp(min=0), atol=1e-4, rtol=0)
    assert torch.equal(model.logit_scale, torch.tensor(1.0))


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


def test_fingerprints(stand_in: Any) -> None:
    def fingerprints(change: Callable[[Any, Any], Any], name: str = "Tiny-32/laion") -> tuple[str, str]:
        model, processor = load_model(f"open_clip:{name}", device="cpu")
        with torch.no_grad():
            change(model.open_clip, processor)
        return Encoder(model, processor).fingerprint("image"), Encoder(model, processor).fingerprint("text")

    image, text = fingerprints(lambda model, processor: None)
    assert image != text
    changes: list[tuple[Callable[[Any, Any], Any], tuple[bool, bool]]] = [
        (lambda model, processor: None, (False, False)),
        (lambda model, processor: model.logit_scale.add_(1), (False, False)),
        (lambda model, processor: model.visual.bias.add_(1), (True, False)),
        (lambda model, processor: model.positional_embedding[0].add_(1), (False, True)),
        (lambda model, processor: processor.image_processor.settings.update(resize_mode="squash"), (True, False)),
        (lambda model, processor: setattr(processor.tokenizer, "model_max_length", 7), (False, True)),
        (lambda model, processor: processor.tokenizer.tokenizer.encoder.update(new=1), (False, True)),
        (lambda model, processor: setattr(processor.tokenizer.tokenizer, "strip", True), (False, True)),
    ]
    for change, expected in changes:
        changed = fingerprints(change)
        assert (changed[0] != image, changed[1] != text) == expected
    # the activation is not in the weights
    other = fingerprints(lambda model, processor: None, "Tiny-32-quickgelu/openai")
    assert other[0] != image
    assert other[1] != text
    stand_in.tokenizer_class = ClassTokenTokenizer
    assert fingerprints(lambda model, processor: None)[1] != text


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
    """A model of each kind. Nobody writes to it."""
    return write_model(tmp_path_factory.mktemp("open_clip") / request.param, request.param, golden, open_clip)


def test_features_are_open_clips(open_clip: Any, folder: Path, golden: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = f"local-dir:{folder}"
    model, transform = open_clip.create_model_from_pretrained(name)
    tokenizer = open_clip.get_tokenizer(name)
    pair = load_model(f"open_clip:{name}", device="cpu")
    pictures = sorted((golden / "images").glob("*.png"))
    with torch.no_grad():
        texts = torch.cat([model.eval().encode_text(tokenizer([text]), normalize=True) for text in LONG_TEXTS])
        pixels = [transform(load_image(path)) for path in pictures]
        images = torch.cat([model.encode_image(one[None], normalize=True) for one in pixels])
    for batch_size in (1, 3):
        options = {"batch_size": batch_size, "progress": False}
        torch.testing.assert_close(Encoder(*pair).encode_texts(LONG_TEXTS, **options), texts, atol=1e-6, rtol=0)
        torch.testing.assert_close(Encoder(*pair).encode_images(pictures, **options), images, atol=1e-6, rtol=0)
    assert (texts[0] - texts[2]).abs().max() > 1e-3
    assert (images[0] - images[1]).abs().max() > 1e-3
    # so many are cut, counted by hand: as long as the context are the last of these only if they are longer
    length = tokenizer.context_length
    rows = tokenizer(LONG_TEXTS, context_length=200)
    assert f"{sum(cut_at(rows, length))} of {len(LONG_TEXTS)} texts were cut at {length} tokens." in caplog.text
    # what cannot be seen in a shorter text
    short = Encoder(*pair).encode_texts(["a dog", "a photo " * 9], max_length=6, progress=False)
    torch.testing.assert_close(short[0], texts[0], atol=1e-6, rtol=0)
    scores = clip_score(pictures[:1], LONG_TEXTS[:1], Encoder(pair[0], pair[1]), on_truncation="raise", progress=False)
    assert scores.scores.item() == pytest.approx(100 * max(0.0, (texts[0] @ images[0]).item()), abs=1e-4)


def cut_at(rows: torch.Tensor, length: int) -> list[bool]:
    """Which texts have more than `length` tokens, from rows in which none is cut."""
    padding = rows[1, -1]  # of the empty text
    return (rows != padding).flip(1).int().argmax(1).sub(rows.shape[1]).neg().gt(length).tolist()


def test_fingerprints_of_open_clips_own(folder: Path, tmp_path: Path) -> None:
    pair = load_model(f"open_clip:local-dir:{folder}", device="cpu")

    def fingerprints(pair: Any) -> tuple[str, str]:
        return Encoder(*pair).fingerprint("image"), Encoder(*pair).fingerprint("text")

    before = fingerprints(pair)
    weights = dict(pair[0].open_clip.named_parameters())
    of_images = [name for name in weights if name.startswith("visual.")]
    of_texts = [name for name in weights if name not in (*of_images, "logit_scale", "logit_bias")]
    expected = {"logit_scale": (False, False), of_images[0]: (True, False), of_images[-1]: (True, False)}
    expected |= {of_texts[0]: (False, True), of_texts[-1]: (False, True)}
    for name, differ in expected.items():
        weight = weights[name].data.clone()
        weights[name].data.view(-1)[-1] += 1
        now = fingerprints(pair)
        assert (now[0] != before[0], now[1] != before[1]) == differ, name
        weights[name].data.copy_(weight)
    elsewhere = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    configuration = json.loads((elsewhere / "open_clip_config.json").read_text())
    for interpolation, is_same in (("bicubic", True), ("bilinear", False)):
        configuration["preprocess_cfg"]["interpolation"] = interpolation
        (elsewhere / "open_clip_config.json").write_text(json.dumps(configuration))
        now = fingerprints(load_model(f"open_clip:local-dir:{elsewhere}", device="cpu"))
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
    model, transform = open_clip.create_model_from_pretrained(architecture, str(weights))
    pair = load_model(f"open_clip:{architecture}/{weights}", device="cpu")
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(architecture)(LONG_TEXTS), normalize=True)
    torch.testing.assert_close(Encoder(*pair).encode_texts(LONG_TEXTS, progress=False), expected, atol=1e-6, rtol=0)
    half = load_model(f"open_clip:{architecture}/{weights}", device="cpu", dtype="bfloat16")
    assert (Encoder(*half).encode_texts(LONG_TEXTS, progress=False) * expected).sum(1).min() > 0.98
    image = Image.new("RGB", (50, 40), "red")
    assert (Encoder(*half).encode_images([image]) * Encoder(*pair).encode_images([image])).sum(1).min() > 0.98

    with pytest.raises(ValueError, match=rf"{architecture}: which weights\? .*open_clip has none for it"):
        load_model(f"open_clip:{architecture}")
    torch.save({"visual.proj": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"weights.pt: open_clip cannot load it \(Error\(s\) in loading state_dict"):
        load_model(f"open_clip:{architecture}/{weights}")
    weights.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"weights.pt: open_clip cannot load it"):
        load_model(f"open_clip:{architecture}/{weights}")


def test_open_clips_own_names(open_clip: Any) -> None:
    with pytest.raises(ValueError, match=r"which weights\? Expected open_clip:ViT-B-32/WEIGHTS.* openai, .*laion2b"):
        load_model("open_clip:ViT-B/32")
    with pytest.raises(ValueError, match=r"has no architecture 'ViT-B-33'; did you mean ViT-B-32"):
        load_model("open_clip:ViT-B-33/openai")


def test_a_model_on_the_hub(open_clip: Any, tmp_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", "clip", golden, open_clip)
    with hub_server(tmp_path / "hub") as hub:
        use_in_process(monkeypatch, hub, tmp_path / "cache")
        commit = hub.add("org/name", {file.name: file.read_bytes() for file in folder.iterdir()})
        pair = load_model("open_clip:hf-hub:org/name", device="cpu")
        with pytest.raises(ValueError, match="hf-hub:org/nothing: open_clip cannot load it .*org/nothing"):
            load_model("open_clip:hf-hub:org/nothing")
    local = load_model(f"open_clip:local-dir:{folder}", device="cpu")
    torch.testing.assert_close(
        Encoder(*pair).encode_texts(LONG_TEXTS), Encoder(*local).encode_texts(LONG_TEXTS), atol=1e-6, rtol=0
    )
    assert Encoder(*pair).fingerprint("image") == Encoder(*local).fingerprint("image")
    assert model_revision(pair[0]) == commit
    assert model_revision(local[0]) is None
    assert model_versions(pair[0]).keys() == {"open_clip", "timm", "torchvision"}


def test_activations_of_open_clips_own(
    open_clip: Any, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip import pretrained

    tag = {"file": str(tmp_path / "weights.pt"), "quick_gelu": True}
    monkeypatch.setitem(pretrained._PRETRAINED, architecture, {"openai": tag})
    with pytest.raises(ValueError, match=rf"another activation .* take open_clip:{architecture}-quickgelu/openai"):
        load_model(f"open_clip:{architecture}")
    with pytest.raises(ValueError, match="take open_clip:ViT-B-16-quickgelu/openai"):
        load_model("open_clip:ViT-B-16/openai")
    monkeypatch.setitem(tag, "quick_gelu", False)
    assert load_model(f"open_clip:{architecture}", device="cpu")[0].name_or_path == f"open_clip:{architecture}"


def test_a_folder_without_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "open_clip_config.json", tmp_path)
    with pytest.raises(ValueError, match=r"local-dir:.*: open_clip cannot load it \(Required pretrained weights"):
        load_model(f"open_clip:local-dir:{tmp_path}")
