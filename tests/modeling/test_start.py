"""What a new model takes from its text encoder: positions, pooling, layers after pooling, tokenizer and length."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import tiny
from hub_server import hub_server, use_in_process
from lotlip_hf import LoTLIPModel, from_backbones
from lotlip_hf.cli import main
from lotlip_hf.conversion.stock import stock_model
from lotlip_hf.files import write_json
from lotlip_hf.sentence_folder import read_sentence_folder
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.model import load_or_start_model
from tiny_families import FAMILIES

TOLERANCE = {"rtol": 0.0, "atol": 1e-6}
LEARNED = [name for name, family in FAMILIES.items() if family.positions == "inserted"]  # learned positions
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ":", *"a the cat dog sleeps runs red blue query".split()]
TEXTS = ["the red cat sleeps", "a dog. the dog runs", "a", "blue cat. red dog. the cat sleeps. a dog runs"]


def spread(model: nn.Module) -> Any:
    """Weights large enough that positions matter to the features."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def vision() -> PreTrainedModel:
    return AutoModel.from_config(tiny.vision_config().backbone_config)


def save_bert(folder: Path, model_class: type[PreTrainedModel] = BertModel, **options: Any) -> PreTrainedModel:
    """Saves a BERT with its tokenizer, which cuts at 20 tokens."""
    config = BertConfig(**{**tiny.TEXT_SIZE, "vocab_size": len(WORDS)})
    model = spread(model_class(config, **options))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer.from_pretrained(folder, model_max_length=20).save_pretrained(folder)
    return model


def sentence_transformer(tmp_path: Path, *modules: nn.Module, **options: Any) -> tuple[SentenceTransformer, Path]:
    """A tiny BERT with modules after it, and the folder that sentence-transformers saves."""
    (tmp_path / "bert").mkdir()
    save_bert(tmp_path / "bert")
    model = SentenceTransformer(modules=[Transformer(str(tmp_path / "bert")), *modules], device="cpu", **options)
    model.save(str(tmp_path / "folder"), create_model_card=False)
    return model, tmp_path / "folder"


def embeddings(model: LoTLIPModel, folder: Path, texts: list[str] = TEXTS) -> torch.Tensor:
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        features = model.eval().get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    return nn.functional.normalize(features, dim=-1)


# Positions


@pytest.mark.parametrize("family", LEARNED)
def test_positions_of_corner_tokens_are_added_and_left_out(family: str, vision: PreTrainedModel) -> None:
    """They start as those of the first words. The stock export is the encoder."""
    text: Any = FAMILIES[family].stock_model()
    model: Any = from_backbones(text, vision, 3)
    first = FAMILIES[family].offset + 1
    old, new = (one.embeddings.position_embeddings.weight for one in (text, model.text_model.backbone))
    assert torch.equal(new[: first + 3], old[: first + 3])
    assert torch.equal(new[first + 3 :], old[first:])

    stock = stock_model(model.text_model)
    assert stock.config.max_position_embeddings == text.config.max_position_embeddings
    own = text.state_dict()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    assert not [name for name in own if name not in stock.state_dict() and not name.startswith("pooler.")]


# Projection


def test_the_width_of_the_text_encoder_needs_no_text_projection(vision: PreTrainedModel) -> None:
    wide = BertModel(BertConfig(**{**tiny.TEXT_SIZE, "hidden_size": 40}))
    model = from_backbones(wide, vision, projection_dim=40)
    assert isinstance(model.text_projection, nn.Identity)
    assert model.visual_projection.weight.shape == (40, 32)
    model = from_backbones(wide, vision)
    assert model.text_projection.weight.shape == (32, 40)
    assert isinstance(model.visual_projection, nn.Identity)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (32, (32, 64))),
        ({"projection_dim": 64}, (64, None)),
        ({"pooled_layers": 2}, (32, (32, 128))),
        ({"pooled_layers": 2, "projection_dim": 128}, (128, None)),
        ({"vision_projection": True, "projection_dim": 64}, (64, (64, 64))),
        ({"vision_projection": True, "vision_pooling": "mean"}, (32, (32, 32))),
    ],
)
def test_the_image_projection(
    options: dict[str, Any], expected: tuple[int, Any], vision: PreTrainedModel, tmp_path: Path
) -> None:
    """It reads the pooled states, which `cls+mean` and two layers make wider. It is saved, and not always needed."""
    text = AutoModel.from_config(tiny.text_config().backbone_config)
    model = from_backbones(text, vision, **{"vision_pooling": "cls+mean", **options}).eval()
    model.save_pretrained(tmp_path)
    loaded, pixels = LoTLIPModel.from_pretrained(tmp_path), torch.randn(2, 3, 32, 32)
    width, shape = expected
    for one in (model, loaded):
        assert one.config.projection_dim == width
        assert getattr(getattr(one.visual_projection, "weight", None), "shape", None) == shape
    with torch.no_grad():
        features = model.get_image_features(pixels).pooler_output
        assert features.shape == (2, width)
        assert torch.equal(loaded.get_image_features(pixels).pooler_output, features)


def test_a_text_tower_does_not_join_poolings(vision: PreTrainedModel) -> None:
    text = AutoModel.from_config(tiny.text_config().backbone_config)
    with pytest.raises(Exception, match="pooling"):  # the validation's own class
        from_backbones(text, vision, text_pooling="cls+mean")


# sentence-transformers


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("mode", ["cls", "mean"])
def test_embeddings_are_those_of_sentence_transformers(
    mode: Any, number: int, vision: PreTrainedModel, tmp_path: Path
) -> None:
    stock, folder = sentence_transformer(tmp_path, Pooling(32, mode), Normalize())
    model = from_backbones(folder, vision, number, projection_dim=32)
    assert model.config.text_config.pooling == mode
    expected = stock.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(embeddings(model, folder), expected, **TOLERANCE)


def dense(size: int, output_size: int, **options: Any) -> Dense:
    return Dense(size, output_size, **{"bias": False, "activation_function": nn.Identity(), **options})


@pytest.mark.parametrize("widths", [(24,), (48, 24), (48, 32)])
def test_linear_layers_become_the_text_projection(
    widths: tuple[int, ...], vision: PreTrainedModel, tmp_path: Path
) -> None:
    layers = [dense(*sizes) for sizes in zip((32, *widths), widths, strict=False)]
    stock, folder = sentence_transformer(tmp_path, Pooling(32, "mean"), *layers, Normalize())
    model = from_backbones(folder, vision, projection_dim=widths[-1])
    expected = stock.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(embeddings(model, folder), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (dense(32, 24, activation_function=nn.Tanh()), "Tanh"),
        (dense(32, 24, bias=True), "Dense"),
        (dense(32, 24, use_residual=True), "Dense"),
        (dense(32, 20), "projection_dim"),
    ],
)
def test_other_layers_are_left_out_with_a_warning(
    layer: Dense, word: str, vision: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = sentence_transformer(tmp_path, Pooling(32, "mean"), layer)
    model = from_backbones(folder, vision, projection_dim=24)
    assert word in caplog.text
    assert model.text_projection.weight.shape == (24, 32)


def write_settings(folder: Path, pooling: Any, modules: Any = None, **more: Any) -> None:
    """The settings of sentence-transformers beside an encoder; `more` are files by name."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "modules.json", listed if modules is None else modules)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    for name, value in more.items():
        write_json(folder / f"{name}.json", value)


OLD = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def switches(*names: str) -> dict[str, bool]:
    """The settings before version 6."""
    return {f"pooling_mode_{name}": name in names for name in OLD}


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (switches("cls_token"), "cls"),
        (switches("mean_tokens"), "mean"),
        (switches("lasttoken"), "last"),
        (switches("weightedmean_tokens"), "weighted_mean"),
        (switches(), "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode": "cls", **switches("mean_tokens")}, "cls"),
    ],
)
def test_poolings(pooling: dict[str, Any], expected: str, tmp_path: Path) -> None:
    write_settings(tmp_path, pooling)
    folder = read_sentence_folder(tmp_path)
    assert folder is not None
    assert folder.pooling == expected


@pytest.mark.parametrize(
    ("pooling", "word"),
    [
        (switches("max_tokens"), "max"),
        (switches("mean_sqrt_len_tokens"), "mean_sqrt_len_tokens"),
        (switches("cls_token", "mean_tokens"), r"cls \+ mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_other_poolings_are_refused_and_can_be_replaced(
    pooling: dict[str, Any], word: str, vision: PreTrainedModel, tmp_path: Path
) -> None:
    save_bert(tmp_path)
    write_settings(tmp_path, pooling)
    with pytest.raises(Exception, match=word):
        from_backbones(tmp_path, vision)
    assert from_backbones(tmp_path, vision, text_pooling="cls").config.text_config.pooling == "cls"


def test_a_decoder_pools_as_its_folder_says(vision: PreTrainedModel, tmp_path: Path) -> None:
    sizes = {**tiny.TEXT_SIZE, "pad_token_id": 0, "num_key_value_heads": 2}
    LlamaModel(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    assert from_backbones(tmp_path, vision).config.text_config.pooling == "last"
    write_settings(tmp_path, switches("weightedmean_tokens"))
    assert from_backbones(tmp_path, vision).config.text_config.pooling == "weighted_mean"


# Files of strangers


def link_outside(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    write_json(outside / "config.json", {"pooling_mode": "cls"})
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "1_Pooling").rmdir()
    os.symlink(outside, folder / "1_Pooling")


def module(path: Any, kind: Any = "x.Pooling") -> list[dict[str, Any]]:
    return [{"path": path, "type": kind}]


@pytest.mark.parametrize(
    ("write", "word"),
    [
        (lambda folder: write_settings(folder, {}, module("../elsewhere")), "modules.json"),
        (lambda folder: write_settings(folder, {}, module("..")), "modules.json"),
        (lambda folder: write_settings(folder, {}, module("/etc")), "modules.json"),
        (lambda folder: write_settings(folder, {}, module("a\0b")), "modules.json"),
        (lambda folder: write_settings(folder, {}, module("1_Pooling", 3)), "modules.json"),
        (lambda folder: write_settings(folder, {}, ["x"]), "modules.json"),
        (lambda folder: write_settings(folder, {}, {"path": ""}), "modules.json"),
        (lambda folder: (folder / "modules.json").write_text("["), "modules.json"),
        (lambda folder: (folder / "modules.json").write_text("[" * 100_000), "modules.json"),
        (lambda folder: (folder / "modules.json").write_text(" " * (1 << 21)), "modules.json"),
        (lambda folder: write_settings(folder, []), "config.json"),
        (lambda folder: (folder / "1_Pooling" / "config.json").unlink(), "1_Pooling"),
        (lambda folder: write_settings(folder, {"pooling_mode": {"mean": 1}}), "pooling_mode"),
        (lambda folder: write_settings(folder, {"pooling_mode": "\x1b[2J"}), "pooling_mode"),
        (lambda folder: write_settings(folder, {}, config_sentence_transformers=[]), "config_sentence_transformers"),
        (link_outside, "1_Pooling"),
    ],
)
def test_damaged_settings_are_named(write: Callable[[Path], None], word: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_settings(folder, {"pooling_mode": "mean"})
    write(folder)
    with pytest.raises(ValueError, match=word) as raised:
        read_sentence_folder(folder)
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": [], "default_prompt_name": "query"},
        {"prompts": {"query": 3}, "default_prompt_name": "query"},
        {"prompts": {"query": "x"}, "default_prompt_name": []},
        {"prompts": {"query": "x"}, "default_prompt_name": None},
        {"prompts": {"query": "x"}, "default_prompt_name": "document"},
    ],
)
def test_prompts_that_are_none(settings: dict[str, Any], tmp_path: Path) -> None:
    more = {"config_sentence_transformers": settings, "sentence_bert_config": {"max_seq_length": -1}}
    write_settings(tmp_path, {"pooling_mode": "mean"}, **more)
    folder = read_sentence_folder(tmp_path)
    assert folder is not None
    assert (folder.prompt, folder.max_length) == ("", None)


def test_a_prompt_that_is_not_pooled_is_said(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "x: "}, "default_prompt_name": "query"}
    pooling = {"pooling_mode": "mean", "include_prompt": False}
    write_settings(tmp_path, pooling, config_sentence_transformers=prompts)
    folder = read_sentence_folder(tmp_path)
    assert folder is not None
    assert "prompt" in folder.left_out[0]


def test_damaged_dense_layers_are_named(tmp_path: Path) -> None:
    _, folder = sentence_transformer(tmp_path, Pooling(32, "mean"), dense(32, 24), dense(24, 16))
    weights = folder / "3_Dense" / "model.safetensors"
    for wrong in (torch.ones(16, 23), torch.full((16, 24), torch.nan)):
        save_file({"linear.weight": wrong}, weights)
        with pytest.raises(ValueError, match="3_Dense"):
            read_sentence_folder(folder)
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(ValueError, match="3_Dense"):
        read_sentence_folder(folder)


def test_from_the_hub(
    vision: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stock, folder = sentence_transformer(tmp_path, Pooling(32, "mean"), dense(32, 24))
    files = {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}
    with hub_server(tmp_path / "hub") as hub:
        use_in_process(monkeypatch, hub, tmp_path / "cache")
        hub.add("ada/sentences", {**files, "onnx/model.onnx": b"large", "2_Dense/pytorch_model.bin": b"a pickle"})
        model = from_backbones("ada/sentences", vision, projection_dim=24)
        assert not hub.matching("GET", r"\.onnx|\.bin")
        hub.add("ada/plain", {name: files[name] for name in ("config.json", "model.safetensors")})
        assert read_sentence_folder("ada/plain") is None
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        caplog.clear()
        again = from_backbones("ada/sentences", vision, projection_dim=24)
        assert read_sentence_folder("ada/plain") is None
        assert not caplog.text
        assert read_sentence_folder("ada/never-seen") is None
        assert "ada/never-seen" in caplog.text
    expected = nn.functional.normalize(stock.encode(TEXTS, convert_to_tensor=True), dim=-1)
    for one in (model, again):
        torch.testing.assert_close(embeddings(one, folder), expected, **TOLERANCE)


# `lotlip train --text-model`


def save_image_encoder(folder: Path) -> str:
    AutoModel.from_config(tiny.vision_config().backbone_config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def start(text: Path, tmp_path: Path, **options: Any) -> tuple[LoTLIPModel, Any]:
    image = save_image_encoder(tmp_path / "image")
    config = TrainingConfig(text_model=str(text), image_model=image, data="scenes", output="unused", **options)
    return load_or_start_model(config)


@pytest.mark.parametrize(
    ("limit", "options", "expected"),
    [(12, {}, 12), (None, {}, 20), (1000, {}, 40), (12, {"max_text_length": 30}, 30)],
)
def test_the_longest_text_is_the_folders(
    limit: int | None, options: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    save_bert(text)
    write_settings(text, {"pooling_mode": "mean"}, sentence_bert_config={"max_seq_length": limit})
    _, processor = start(text, tmp_path, **options)
    assert processor.tokenizer.model_max_length == expected


def test_the_default_prompt_is_the_tokenizers_template(tmp_path: Path) -> None:
    prompts: dict[str, Any] = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    stock, folder = sentence_transformer(tmp_path, Pooling(32, "mean"), Normalize(), **prompts)
    model, processor = start(folder, tmp_path, projection_dim=32)
    assert processor.tokenizer.prompt_template == "query: {}"
    texts = [text for text in TEXTS if ". " not in text]
    with torch.no_grad():
        features = model.eval().get_text_features(**processor(text=texts, return_tensors="pt")).pooler_output
    expected = stock.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(nn.functional.normalize(features, dim=-1), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("options", "width", "shape"),
    [
        ({}, 32, None),
        ({"lock_vision": True}, 32, (32, 32)),
        ({"image_pooling": "cls+mean"}, 32, (32, 64)),
        ({"image_pooling": "cls+mean", "projection_dim": 64}, 64, None),
        ({"image_pooling": "cls+mean", "image_layers": 2}, 32, (32, 128)),
        ({"image_pooling": "cls+mean", "lock_vision": True, "projection_dim": 24}, 24, (24, 64)),
    ],
)
def test_the_image_tower_of_a_run(options: dict[str, Any], width: int, shape: Any, tmp_path: Path) -> None:
    """A locked one has a projection, which trains."""
    text = tmp_path / "text"
    text.mkdir()
    save_bert(text)
    model, _ = start(text, tmp_path, **options)
    assert model.config.projection_dim == width
    assert getattr(getattr(model.visual_projection, "weight", None), "shape", None) == shape


def test_the_command_reports_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    save_bert(text)
    prompts = {"prompts": {"query": "query : "}, "default_prompt_name": "query"}
    more = {"sentence_bert_config": {"max_seq_length": 12}, "config_sentence_transformers": prompts}
    write_settings(text, switches("mean_tokens"), **more)
    options = ["--text-model", str(text), "--image-model", save_image_encoder(tmp_path / "image")]
    options += ["--data", "scenes", "--num-scenes", "8", "--batch-size", "4", "--max-steps", "1"]
    assert main(["train", *options, "--trackers", "none", "--output", str(tmp_path / "run")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if str(text) in line)
    assert all(word in line for word in ("mean", "query : ", "12"))


def test_a_retromae_starts_a_model(tmp_path: Path) -> None:
    """RetroMAE trains [CLS] of a BERT and saves it with the head of a masked language model and without a pooler."""
    text = tmp_path / "text"
    text.mkdir()
    encoder = save_bert(text, BertForMaskedLM).bert
    assert not [name for name in load_file(text / "model.safetensors") if "pooler" in name]
    model, processor = start(text, tmp_path, projection_dim=32)
    assert model.config.text_config.pooling == "cls"
    inputs = processor(text=TEXTS, return_tensors="pt")
    with torch.no_grad():
        expected = encoder(**inputs).last_hidden_state[:, 0]
        torch.testing.assert_close(model.eval().get_text_features(**inputs).pooler_output, expected, **TOLERANCE)


def zett_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens of XLM-R at the start, as ZeTT makes it."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, unk_token="<unk>", model_max_length=38)


def test_a_zett_starts_a_model(tmp_path: Path) -> None:
    """ZeTT gives an XLM-R the tokenizer and the vocabulary of another model."""
    tokenizer = zett_tokenizer()
    text = spread(XLMRobertaModel(XLMRobertaConfig(**{**tiny.TEXT_SIZE, "vocab_size": len(tokenizer)})))
    text.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    model, processor = start(tmp_path / "text", tmp_path, projection_dim=32)
    assert model.config.text_config.vocab_size == len(tokenizer) == len(processor.tokenizer)
    texts = ["A cat on a mat", "Ein Hund läuft"]
    inputs = processor(text=texts, return_tensors="pt")
    assert inputs["input_ids"].tolist() == tokenizer(texts, padding=True)["input_ids"]
    with torch.no_grad():
        expected = text(**inputs).pooler_output
        torch.testing.assert_close(model.eval().get_text_features(**inputs).pooler_output, expected, **TOLERANCE)
    assert processor.tokenizer("A cat. A dog.")["input_ids"].count(2) == 2
