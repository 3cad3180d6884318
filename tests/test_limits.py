"""The longest text: `model_max_length` decides, in what is loaded, trained, converted and exported."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

import tiny
import tiny_clip
from lotlip_hf import Encoder, LoTLIPModel, LoTLIPProcessor, LoTLIPTokenizer
from lotlip_hf.conversion import clip, official, onnx, stock
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.sampling import SubCaptions
from lotlip_hf.engines.texts import encode_unpadded
from lotlip_hf.images import official_image_processor
from lotlip_hf.loading import load_model, max_text_length
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.model import load_or_start_model
from stale import CALL_STATE, is_clean, make_stale

LONG = "a cat of the house " * 200
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37}


def processor(kind: str, golden: Path) -> LoTLIPProcessor:
    """Over BERT, with a limit of 126, or over CLIP, with one of 77."""
    tokenizer: Any = tiny_clip.clip_tokenizer()
    if kind == "bert":
        tokenizer = LoTLIPTokenizer.from_pretrained(golden / "tokenizer", model_max_length=126)
    return LoTLIPProcessor(official_image_processor(32), tokenizer)


def length(one: Any, **call: Any) -> int:
    """Of a text far longer than any limit."""
    return len(one(text=LONG, **call)["input_ids"])


@pytest.mark.parametrize("kind", ["bert", "clip"])
@pytest.mark.parametrize("call", [{"max_length": 16}, {"max_length": 16, "padding": "max_length", "stride": 2}])
def test_a_limit_of_a_call_is_not_saved(kind: str, call: dict[str, Any], golden: Path, tmp_path: Path) -> None:
    own = processor(kind, golden)
    limit = own.tokenizer.model_max_length
    own.tokenizer(LONG, truncation=True, verbose=False, **call)
    assert length(own, **call) == 16
    assert length(own) == limit
    own.save_pretrained(tmp_path)
    assert is_clean(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert length(loaded) == limit
    loaded.tokenizer.model_max_length = 20
    assert length(loaded) == 20
    assert length(loaded, max_length=9) == 9
    assert length(loaded) == 20


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_checkpoints_that_have_kept_a_limit_load_right(kind: str, golden: Path, tmp_path: Path) -> None:
    own = processor(kind, golden)
    own.save_pretrained(tmp_path)
    make_stale(tmp_path, direction="right")
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert not CALL_STATE & loaded.tokenizer.init_kwargs.keys()
    assert length(loaded) == own.tokenizer.model_max_length
    assert loaded(text=["a", "a cat"])["input_ids"] == own(text=["a", "a cat"])["input_ids"]
    loaded.save_pretrained(tmp_path)
    assert is_clean(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_threads_do_not_see_each_others_limits(kind: str, golden: Path) -> None:
    own = processor(kind, golden)
    backend = own.tokenizer._tokenizer.to_str()
    with ThreadPoolExecutor(8) as pool:
        limits = list(range(3, 60)) * 5
        assert list(pool.map(lambda limit: length(own, max_length=limit), limits)) == limits
    assert own.tokenizer._tokenizer.to_str() == backend


def dual_encoder(folder: Path, golden: Path, limit: int) -> int:
    """BERT and ViT in a stock class; the number of positions."""
    text, vision = BertConfig(**SMALL, max_position_embeddings=40), ViTConfig(**SMALL, image_size=32, patch_size=8)
    tokenizer = BertTokenizer(vocab=str(golden / "tokenizer" / "vocab.txt"), model_max_length=limit)
    model = VisionTextDualEncoderModel(text_model=BertModel(text), vision_model=ViTModel(vision))
    model.save_pretrained(folder)
    image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    VisionTextDualEncoderProcessor(image_processor, tokenizer).save_pretrained(folder)
    return 40


def stock_clip(folder: Path, golden: Path, limit: int) -> int:
    tiny_clip.save_clip(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": limit}))
    return 77


def lotlip(folder: Path, golden: Path, limit: int) -> int:
    """Over BERT with 40 positions, of which 2 are the corner tokens'."""
    config = tiny.config(num_corner_tokens=2)
    config.text_config.backbone_config.vocab_size = 30522
    LoTLIPModel(config).save_pretrained(folder)
    tokenizer = LoTLIPTokenizer.from_pretrained(golden / "tokenizer", model_max_length=limit)
    LoTLIPProcessor(official_image_processor(32), tokenizer).save_pretrained(folder)
    return 38


@pytest.mark.slow
@pytest.mark.parametrize("limit", [12, 512])
@pytest.mark.parametrize("make", [lotlip, stock_clip, dual_encoder])
def test_model_tokenizer_and_processor_agree(
    make: Any, limit: int, golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit above the model's positions gives way to them, which is said; one that was kept never counts."""
    longest = min(limit, make(tmp_path, golden, limit))
    make_stale(tmp_path, 9, direction="right")
    with caplog.at_level("WARNING", "lotlip_hf"):
        model, own = load_model(tmp_path, device="cpu")
    assert ("model_max_length" in caplog.text) == (limit == 512)
    assert own.tokenizer.model_max_length == max_text_length(model, own.tokenizer) == longest
    # stock processors pad and cut when they are told to
    batch = own(text=[LONG, "a"], truncation=True, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, longest)
    with torch.no_grad():
        features = model.get_text_features(**batch)
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    expected = torch.nn.functional.normalize(features, dim=-1)
    torch.testing.assert_close(
        Encoder(model, own).encode_texts([LONG, "a"], progress=False), expected, atol=1e-5, rtol=0
    )


# Training


@pytest.fixture
def towers(tmp_path: Path, golden: Path) -> dict[str, str]:
    """Two encoders to start from; the text encoder's tokenizer has kept a limit, as MiniLM's was published with."""
    BertModel(BertConfig(**SMALL, max_position_embeddings=96)).save_pretrained(tmp_path / "text")
    BertTokenizer(vocab=str(golden / "tokenizer" / "vocab.txt"), model_max_length=512).save_pretrained(
        tmp_path / "text"
    )
    ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(tmp_path / "image")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "image")
    return {"text_model": str(tmp_path / "text"), "image_model": str(tmp_path / "image")}


def trained_ids(own: Any) -> list[list[int]]:
    """Of a batch as training makes it."""
    record = {"image": Image.new("RGB", (32, 32)), "short_caption": LONG, "long_captions": [LONG], "id": "1"}
    batch = LoTLIPCollator(own, SubCaptions(num_long_texts=1, num_sentences=None))([record])
    assert batch["long_input_ids"][0].tolist() == batch["input_ids"].tolist()
    return batch["input_ids"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kept", [None, 16, 128, 512])
@pytest.mark.parametrize("asked", [None, 64])
def test_training_and_encoding_cut_at_the_same_token(
    kept: int | None, asked: int | None, towers: dict[str, str], tmp_path: Path
) -> None:
    if kept is not None:
        make_stale(Path(towers["text_model"]), kept)
    model, own = load_or_start_model(TrainingConfig(**towers, max_text_length=asked, num_corner_tokens=2))
    longest = asked or 96
    assert own.tokenizer.model_max_length == longest
    ids = trained_ids(own)
    assert ids == encode_unpadded(own.tokenizer, [LONG], max_text_length(model, own.tokenizer))[0]
    assert len(ids[0]) == longest
    model.get_text_features(torch.tensor(ids))
    model.save_pretrained(tmp_path / "run")
    own.save_pretrained(tmp_path / "run")
    assert is_clean(tmp_path / "run")
    model, own = load_model(tmp_path / "run", device="cpu")
    assert max_text_length(model, own.tokenizer) == longest
    assert trained_ids(own) == ids
    # and goes on with another limit
    model, own = load_or_start_model(TrainingConfig(model=str(tmp_path / "run"), max_text_length=32))
    assert len(trained_ids(own)[0]) == max_text_length(model, own.tokenizer) == 32


def test_a_limit_above_the_models_is_refused(towers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="max_text_length"):
        load_or_start_model(TrainingConfig(**towers, max_text_length=97, num_corner_tokens=2))


@pytest.mark.slow
@pytest.mark.parametrize("cleaning", [None, "official", "sentences"])
def test_a_new_model_ends_sentences_as_is_asked(
    cleaning: Any, towers: dict[str, str], golden: Path, tmp_path: Path
) -> None:
    for start in (towers, {"model": "scenes"}):
        model, own = load_or_start_model(TrainingConfig(**start, cleaning=cleaning))
        assert own.tokenizer.cleaning == (cleaning or "official")
        folder = tmp_path / start.get("model", "towers")
        model.save_pretrained(folder)
        own.save_pretrained(folder)
        assert AutoProcessor.from_pretrained(folder).tokenizer.cleaning == (cleaning or "official")
        load_or_start_model(TrainingConfig(model=str(folder), cleaning=cleaning))
        other = "official" if cleaning == "sentences" else "sentences"
        with pytest.raises(ValueError, match="cleaning"):
            load_or_start_model(TrainingConfig(model=str(folder), cleaning=other))
    tiny_clip.save_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="cleaning"):
        load_or_start_model(TrainingConfig(**{**towers, "text_model": str(tmp_path / "clip")}, cleaning="sentences"))


# Conversions and exports


def test_an_official_conversion(golden: Path, tmp_path: Path) -> None:
    BertTokenizer.from_pretrained(golden / "tokenizer").save_pretrained(tmp_path / "tokenizer")
    make_stale(tmp_path / "tokenizer")
    source = golden / "official-corners2"
    folder = official.convert(
        source / "model.pt", source / "open_clip_config.json", tmp_path / "tokenizer", tmp_path / "out"
    )
    assert is_clean(folder)
    assert length(AutoProcessor.from_pretrained(folder)) == 126


@pytest.mark.parametrize("save", ["clip", "text"])
def test_a_stretched_clip(save: str, tmp_path: Path) -> None:
    tiny_clip.save_clip(tmp_path / "clip")
    if save == "text":
        source = AutoModel.from_pretrained(tmp_path / "clip").text_model
        shutil.rmtree(tmp_path / "clip")
        source.save_pretrained(tmp_path / "clip")
        tiny_clip.clip_tokenizer().save_pretrained(tmp_path / "clip")
    make_stale(tmp_path / "clip", 77, direction="right")
    folder = clip.convert(tmp_path / "clip", tmp_path / "out", max_positions=248)
    assert is_clean(folder)
    if save == "clip":
        assert length(AutoProcessor.from_pretrained(folder)) == 248
        assert length(load_model(folder, device="cpu")[1]) == 248
    ids = AutoTokenizer.from_pretrained(folder)(LONG, truncation=True)["input_ids"]
    assert len(ids) == 248


@pytest.mark.slow
@pytest.mark.parametrize("over", ["bert", "clip"])
def test_exports(over: str, golden: Path, tmp_path: Path) -> None:
    if over == "clip":
        tiny_clip.save_clip(tmp_path / "stock")
        clip.convert(tmp_path / "stock", tmp_path / "model")
        longest = 77
    else:
        longest = lotlip(tmp_path / "model", golden, 512)
    make_stale(tmp_path / "model", direction="right")
    stock.convert(tmp_path / "model", tmp_path / "export", without_text_cleaning=True)
    pytest.importorskip("onnxruntime")
    onnx.convert(tmp_path / "model", tmp_path / "onnx", towers=("text",))
    for folder in (tmp_path / "export", tmp_path / "onnx"):
        assert is_clean(folder)
        assert AutoTokenizer.from_pretrained(folder).model_max_length == longest
        assert length(AutoProcessor.from_pretrained(folder), truncation=True) == longest


@pytest.mark.slow
def test_sentence_transformers(golden: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    longest = lotlip(tmp_path, golden, 30)
    make_stale(tmp_path, 20)
    sentences = library.SentenceTransformer(str(tmp_path), device="cpu")
    model, own = load_model(tmp_path, device="cpu")
    assert sentences.max_seq_length == 30 < longest
    for limit in (30, 8):
        sentences.max_seq_length = limit
        expected = Encoder(model, own).encode_texts([LONG], max_length=limit, progress=False)
        found = torch.nn.functional.normalize(torch.tensor(sentences.encode([LONG])), dim=-1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
