"""CLIP to LoTLIP: every kind of source, equal outputs, longer position tables, and what is refused."""

import json
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipConfig,
)

import tiny
import tiny_clip
from lotlip_hf import LoTLIPModel, LoTLIPProcessor, LoTLIPTextModel, LoTLIPTextModelWithProjection
from lotlip_hf.conversion import clip as conversion
from lotlip_hf.conversion.clip import convert

TOLERANCE = {"atol": 1e-5, "rtol": 0}
EXACT = {"atol": 1e-6, "rtol": 0}  # in float64
SAME_OUTPUTS = r"differ from CLIP's by at most (0\.0e\+00|\d\.\de-0[6-9]) of their norm"
MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
POSITIONS = 77


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock CLIP checkpoint. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("stock") / "clip"
    tiny_clip.save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def converted(stock: Path) -> Path:
    """The same as LoTLIP with two corner tokens. Tests must not write to it."""
    return convert(stock, stock.with_name("lotlip"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The converter's command line: what it prints when it succeeds."""

    def run_converter(*arguments: object) -> str:
        assert conversion.main([str(argument) for argument in arguments]) == 0
        printed = capsys.readouterr()
        assert printed.out.count("\n") == 3
        return printed.out

    return run_converter


@pytest.fixture
def error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What it prints when it fails, after which everything is as it was."""

    def run_converter(*arguments: object) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        output = ["--output", str(tmp_path / "output")] if "--output" not in arguments else []
        assert conversion.main([*map(str, arguments), *output]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("lotlip convert clip: error: ")
        assert printed.err.count("error: ") == 1
        assert "Traceback" not in printed.err
        assert snapshot(tmp_path) == before
        return printed.err

    return run_converter


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file of a folder with what it holds, and every folder in it."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def padded_ids(lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random texts [len(lengths), width] that start with [SOT] (if longer than 1), end with [EOT] and are padded with
    it; and their mask."""
    tokenizer = tiny_clip.clip_tokenizer()
    input_ids = torch.full((len(lengths), width), tokenizer.eos_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, : length - 1] = torch.randint(tokenizer.bos_token_id, (length - 1,))
        input_ids[row, 0] = tokenizer.bos_token_id if length > 1 else tokenizer.eos_token_id
        attention_mask[row, :length] = 1
    return input_ids, attention_mask


def all_lengths(longest: int = POSITIONS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A batch of texts of every length up to `longest` (beyond 77, of some), and a few batches that are less wide."""
    batches = [padded_ids([*range(1, longest, 1 + longest // 100), longest], longest)]
    return batches + [padded_ids([length], length) for length in (1, 2, longest // 2, longest)]


@torch.no_grad()
def assert_equal_texts(model: Any, stock: Any, longest: int = POSITIONS) -> None:
    """The same hidden states and the same features for texts of all lengths, masked or not."""
    for input_ids, attention_mask in all_lengths(longest):
        for mask in (None, attention_mask):
            if isinstance(stock, CLIPModel):
                ours, theirs = (m.get_text_features(input_ids, attention_mask=mask) for m in (model, stock))
            else:
                ours, theirs = (m(input_ids, attention_mask=mask) for m in (model, stock))
            torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, **TOLERANCE)
            name = "text_embeds" if isinstance(stock, CLIPTextModelWithProjection) else "pooler_output"
            torch.testing.assert_close(ours[name], theirs[name], **TOLERANCE)


def set_json(path: Path, **changes: Any) -> None:
    """Changes some fields of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# A whole CLIP


def test_outputs_are_clips(stock: Path, converted: Path) -> None:
    model, clip = AutoModel.from_pretrained(converted), CLIPModel.from_pretrained(stock)
    assert type(model) is LoTLIPModel
    assert not model.training
    assert_equal_texts(model, clip)
    pixel_values = tiny.pixel_values(2)
    input_ids, attention_mask = padded_ids([5, 40, 77], 77)
    with torch.no_grad():
        ours, theirs = (m(input_ids, pixel_values, attention_mask, return_loss=False) for m in (model, clip))
        images = [m.get_image_features(pixel_values).pooler_output for m in (model, clip)]
    torch.testing.assert_close(*images, **TOLERANCE)
    assert theirs.logits_per_image.std() > 0.5  # unlike each other
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(ours[name], theirs[name], **TOLERANCE)
    # cosines, times the scale
    scaled = {"atol": TOLERANCE["atol"] * clip.logit_scale.exp().item(), "rtol": 0}
    for name in ("logits_per_image", "logits_per_text"):
        torch.testing.assert_close(ours[name], theirs[name], **scaled)


def test_what_a_converted_folder_holds(stock: Path, converted: Path) -> None:
    assert {path.name for path in converted.iterdir()} == MODEL_FILES | tiny.CLIP_CODE | {"processor_config.json"}
    config, clip_config = AutoConfig.from_pretrained(converted), AutoConfig.from_pretrained(stock)
    assert config.architectures == ["LoTLIPModel"]
    assert config.projection_dim == config.text_config.projection_dim == config.vision_config.projection_dim == 24
    assert (config.text_config.pooling, config.vision_config.pooling) == ("eos", "pooler")
    assert config.text_config.max_position_embeddings == POSITIONS
    assert config.logit_scale_init_value == clip_config.logit_scale_init_value
    # the backbones' settings are CLIP's
    for tower in ("text_config", "vision_config"):
        ours, theirs = getattr(config, tower).backbone_config.to_dict(), getattr(clip_config, tower).to_dict()
        for settings in (ours, theirs):
            for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):
                settings.pop(name, None)
        assert ours == theirs
    for path in converted.glob("*.json"):
        assert str(stock.parent) not in path.read_text()


def test_processor_gives_clips_ids_and_pixels(stock: Path, converted: Path) -> None:
    processor, clip_processor = AutoProcessor.from_pretrained(converted), AutoProcessor.from_pretrained(stock)
    assert type(processor) is LoTLIPProcessor
    assert type(processor.tokenizer) is CLIPTokenizer
    assert type(processor.image_processor) is type(clip_processor.image_processor)
    assert processor.image_processor.to_dict() == clip_processor.image_processor.to_dict()
    texts = tiny_clip.texts()
    batch = processor(text=texts, images=Image.effect_noise((50, 40), 80).convert("RGB"), return_tensors="pt")
    assert batch["input_ids"].shape == (len(texts), POSITIONS)  # padded to the longest, which is cut
    expected = clip_processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    nested = processor(text=[["a cat", "the red car"], ["a dog", "a house"]], return_tensors="pt")
    assert nested["input_ids"].shape == (2, 2, 5)
    # no cleaning, no splitting into sentences, no corner tokens: CLIP's own ids for everything
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert type(tokenizer) is CLIPTokenizer
    odd = ["A cat. A dog.", "&amp; &lt;b&gt; schÃ¶n", "<|endoftext|> a", "[SEP] [Corner0]", " \t\n", "漢字🙂", *texts]
    assert tokenizer(odd, verbose=False)["input_ids"] == clip_processor.tokenizer(odd, verbose=False)["input_ids"]


def test_padding_and_side_of_the_tokenizer_stay(stock: Path, tmp_path: Path) -> None:
    tokenizer = tiny_clip.clip_tokenizer(pad_token="!", padding_side="left")
    clip = tiny_clip.save_clip(tmp_path / "clip", tokenizer=tokenizer)
    folder = convert(tmp_path / "clip", tmp_path / "output")
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert model.config.text_config.pad_token_id == tokenizer.pad_token_id == 0
    batch = processor(text=["a cat", "the red house"], return_tensors="pt")
    assert batch["input_ids"][0, 0] == 0
    with torch.no_grad():
        ours = model.get_text_features(**batch).pooler_output
        alone = [clip.get_text_features(**tokenizer(t, return_tensors="pt")) for t in ("a cat", "the red house")]
    torch.testing.assert_close(ours, torch.cat([one.pooler_output for one in alone]), **TOLERANCE)


def test_precision_is_kept(tmp_path: Path, run: Callable[..., str]) -> None:
    dtype = torch.bfloat16
    clip = tiny_clip.save_clip(tmp_path / "clip", tiny_clip.clip_model().to(dtype))
    out = run("--clip", tmp_path / "clip", "--max-positions", 100, "--output", tmp_path / "output")
    assert f"parameters in {str(dtype).removeprefix('torch.')}; 77 positions stretched to 100" in out
    state_dict = load_file(tmp_path / "output" / "model.safetensors")
    assert {tensor.dtype for tensor in state_dict.values()} == {dtype}
    assert torch.equal(state_dict["visual_projection.weight"], clip.visual_projection.weight)
    assert AutoModel.from_pretrained(tmp_path / "output").dtype == dtype


# Text encoders


@pytest.mark.parametrize("with_projection", [False, True])
def test_text_encoders(tmp_path: Path, run: Callable[..., str], with_projection: bool) -> None:
    clip = tiny_clip.save_clip(tmp_path / "clip", tiny_clip.clip_text_model(with_projection))
    out = run("--clip", tmp_path / "clip", "--output", tmp_path / "output")
    assert re.search(SAME_OUTPUTS, out)
    assert "  2 corner tokens, texts of up to 77 tokens\n" in out
    assert {path.name for path in (tmp_path / "output").iterdir()} == MODEL_FILES | tiny.MODEL_CODE
    model_class = LoTLIPTextModelWithProjection if with_projection else LoTLIPTextModel
    config = AutoConfig.from_pretrained(tmp_path / "output")
    assert config.architectures == [model_class.__name__]
    assert config.projection_dim == (24 if with_projection else None)
    model = model_class.from_pretrained(tmp_path / "output")
    assert_equal_texts(model, clip)
    assert type(AutoModel.from_pretrained(tmp_path / "output")) is LoTLIPTextModel
    assert type(AutoTokenizer.from_pretrained(tmp_path / "output")) is CLIPTokenizer


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """The text encoders of a diffusion pipeline, with the tokenizers beside them: one ends its padding otherwise."""
    folder = tmp_path / "pipeline"
    for number, with_projection, pad_token in (("", False, "<|endoftext|>"), ("_2", True, "!")):
        model = tiny_clip.clip_text_model(with_projection, seed=len(number))
        model.save_pretrained(folder / f"text_encoder{number}")
        tiny_clip.clip_tokenizer(pad_token=pad_token).save_pretrained(folder / f"tokenizer{number}")
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", ["", "_2"])
@pytest.mark.parametrize("by_subfolder", [False, True])
def test_text_encoders_of_a_pipeline(pipeline: Path, tmp_path: Path, number: str, by_subfolder: bool) -> None:
    name = f"text_encoder{number}"
    if not number:  # what `swap_text_encoder` leaves in a pipeline
        set_json(pipeline / name / "config.json", architectures=["CLIPTextEncoder"])
    if by_subfolder:
        convert(pipeline, tmp_path / "output", subfolder=name)
    else:
        convert(pipeline / name, tmp_path / "output")
    stock_class, model_class = (
        (CLIPTextModelWithProjection, LoTLIPTextModelWithProjection) if number else (CLIPTextModel, LoTLIPTextModel)
    )
    model = model_class.from_pretrained(tmp_path / "output")
    assert_equal_texts(model, stock_class.from_pretrained(pipeline / name))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    assert type(tokenizer) is CLIPTokenizer
    assert tokenizer.pad_token == ("!" if number else "<|endoftext|>")


def test_what_there_is_not_in_a_pipeline(pipeline: Path, error: Callable[..., str]) -> None:
    assert "--subfolder" in error("--clip", pipeline)
    assert "text_encodr" in error("--clip", pipeline, "--subfolder", "text_encodr")
    (pipeline / "text_encoder" / "model.safetensors").unlink()
    assert f"{pipeline}/text_encoder: " in error("--clip", pipeline, "--subfolder", "text_encoder")


# Old checkpoints


def test_legacy_ids_become_the_tokenizers(tmp_path: Path) -> None:
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    clip = tiny_clip.save_clip(tmp_path / "clip", tiny_clip.clip_model(tiny_clip.clip_config(text=ids)))
    folder = convert(tmp_path / "clip", tmp_path / "output")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = model.config.text_config
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (532, 533)
    assert_equal_texts(model, clip)

    # Added tokens have higher ids than [EOT], and the old configuration reads a text's feature at the highest.
    text_models = LoTLIPTextModel.from_pretrained(folder), CLIPTextModel.from_pretrained(tmp_path / "clip")
    tokenizer.add_tokens(["<concept>"])
    new = torch.randn(1, 32)
    for text_model in text_models:
        text_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            text_model.get_input_embeddings().weight[-1:].copy_(new)  # pyright: ignore
    batch = tokenizer("a <concept> dog", return_tensors="pt")
    assert batch["input_ids"].max() == 534
    with torch.no_grad():
        ours, theirs = (text_model(**batch) for text_model in text_models)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, **TOLERANCE)
    torch.testing.assert_close(ours.pooler_output, theirs.last_hidden_state[:, -1], **TOLERANCE)
    assert not torch.allclose(theirs.pooler_output, theirs.last_hidden_state[:, -1], atol=1e-2)


@pytest.mark.slow
def test_legacy_names_and_files(stock: Path, tmp_path: Path) -> None:
    # a pickle with position ids, as transformers saved before 4.31, and a tokenizer in its older files
    folder = tmp_path / "clip"
    shutil.copytree(stock, folder)
    state_dict = load_file(folder / "model.safetensors")
    state_dict["text_model.embeddings.position_ids"] = torch.arange(POSITIONS).unsqueeze(0)
    state_dict["vision_model.embeddings.position_ids"] = torch.arange(17).unsqueeze(0)
    torch.save(state_dict, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    backend = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(backend["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in backend["merges"]))
    (folder / "tokenizer.json").unlink()
    processor_config = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_config["image_processor"]))
    (folder / "processor_config.json").unlink()
    output = convert(folder, tmp_path / "output")
    assert {path.name for path in output.iterdir()} == MODEL_FILES | tiny.CLIP_CODE | {"processor_config.json"}
    assert_equal_texts(AutoModel.from_pretrained(output), CLIPModel.from_pretrained(stock))
    texts = tiny_clip.texts()
    ids = AutoTokenizer.from_pretrained(output)(texts, truncation=True)["input_ids"]
    assert ids == tiny_clip.clip_tokenizer()(texts, truncation=True)["input_ids"]

    # a text encoder whose names start with `text_model.`, and a tokenizer that does not say what it is
    model = tiny_clip.clip_text_model()
    model.save_pretrained(tmp_path / "text")
    state_dict = {f"text_model.{name}": tensor for name, tensor in model.state_dict().items()}
    state_dict["text_model.embeddings.position_ids"] = torch.arange(POSITIONS).unsqueeze(0)
    safetensors.torch.save_file(state_dict, tmp_path / "text" / "model.safetensors", {"format": "pt"})
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(folder / name, tmp_path / "text" / name)
    set_json(tmp_path / "text" / "config.json", architectures=None)
    output = convert(tmp_path / "text", tmp_path / "output-text")
    assert_equal_texts(LoTLIPTextModel.from_pretrained(output), model)
    ids = AutoTokenizer.from_pretrained(output)(texts, truncation=True)["input_ids"]
    assert ids == tiny_clip.clip_tokenizer()(texts, truncation=True)["input_ids"]


# Corner tokens


def test_corner_tokens_are_there_and_without_effect(stock: Path, converted: Path) -> None:
    model, clip = AutoModel.from_pretrained(converted), CLIPModel.from_pretrained(stock)
    corners = model.text_model.corner_embeds
    assert corners.shape == (2, 32)
    assert corners.requires_grad
    assert not torch.equal(corners[0], corners[1])
    assert 0.01 < corners.std() < 0.03  # CLIP's `initializer_range` is 0.02
    input_ids, attention_mask = padded_ids([3, 20, 77], 77)
    with torch.no_grad():
        expected = clip.get_text_features(input_ids, attention_mask)
        outputs = model.get_text_features(input_ids, attention_mask, output_corner_embeds=True)
        torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, **TOLERANCE)
        torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, **TOLERANCE)
        corners.mul_(-50)
        others = model.get_text_features(input_ids, attention_mask, output_corner_embeds=True)
    torch.testing.assert_close(others.pooler_output, expected.pooler_output, **TOLERANCE)
    assert outputs.corner_embeds.shape == (3, 2, 24)
    assert not torch.allclose(outputs.corner_embeds, others.corner_embeds, atol=1e-2)


@pytest.mark.slow
def test_number_and_seed_of_the_corner_tokens(stock: Path, converted: Path, tmp_path: Path) -> None:
    def corners(folder: Path) -> torch.Tensor:
        return load_file(folder / "model.safetensors")["text_model.corner_embeds"]

    torch.manual_seed(123)  # does not matter
    again = convert(stock, tmp_path / "again")
    assert torch.equal(corners(again), corners(converted))
    other = convert(stock, tmp_path / "other", num_corner_tokens=3, seed=1)
    assert corners(other).shape == (3, 32)
    assert not torch.equal(corners(other)[:2], corners(converted))
    none = convert(stock, tmp_path / "none", num_corner_tokens=0)
    assert "text_model.corner_embeds" not in load_file(none / "model.safetensors")
    assert_equal_texts(AutoModel.from_pretrained(none), CLIPModel.from_pretrained(stock))


# More positions


def long_clip_table(table: torch.Tensor, length: int, kept: int) -> torch.Tensor:
    """Long-CLIP's recipe as a loop: row r of the new part lies at r / ratio in the old part, between its neighbours;
    behind the last the line through the last two goes on."""
    table = table.double()
    new = torch.zeros(length, table.shape[1], dtype=torch.float64)
    for row in range(length):
        if row < kept:
            new[row] = table[row]
            continue
        exact = (row - kept) * (len(table) - kept) / (length - kept)
        left = min(int(exact), len(table) - kept - 2)
        part = exact - left
        new[row] = (1 - part) * table[kept + left] + part * table[kept + left + 1]
    return new


@pytest.mark.slow
@pytest.mark.parametrize(("stretch", "kept"), [(None, 20), ("knowledge-preserved", 20), ("linear", 0)])
def test_stretching(stock: Path, tmp_path: Path, run: Callable[..., str], stretch: str | None, kept: int) -> None:
    arguments = [] if stretch is None else ["--stretch", stretch]
    out = run("--clip", stock, "--max-positions", 248, *arguments, "--output", tmp_path / "output")
    assert f"77 positions stretched to 248 ({stretch or 'knowledge-preserved'})" in out
    assert bool(re.search(f"outputs for texts of up to 20 tokens {SAME_OUTPUTS}", out)) == (kept == 20)
    assert "texts of up to 248 tokens" in out
    model, clip = AutoModel.from_pretrained(tmp_path / "output"), CLIPModel.from_pretrained(stock)
    positions = model.text_model.backbone.embeddings.position_embedding.weight
    old = clip.text_model.embeddings.position_embedding.weight
    torch.testing.assert_close(positions.double(), long_clip_table(old, 248, kept), **EXACT)
    assert not torch.allclose(positions[:POSITIONS], old, atol=1e-2)
    assert model.config.text_config.max_position_embeddings == 248
    processor = AutoProcessor.from_pretrained(tmp_path / "output")
    assert processor.tokenizer.model_max_length == 248
    batch = processor(text="a cat " * 200, return_tensors="pt")
    assert batch["input_ids"].shape == (1, 248)
    assert model.get_text_features(**batch).pooler_output.shape == (1, 24)
    if kept:
        assert_equal_texts(model, clip, longest=kept)
    # the stock class with that table gives the same for all lengths
    clip.text_model.embeddings.position_embedding = nn.Embedding.from_pretrained(positions.detach())
    clip.text_model.embeddings.position_ids = torch.arange(248).unsqueeze(0)
    assert_equal_texts(model, clip, longest=248)


def test_stretching_a_text_encoder(tmp_path: Path) -> None:
    clip = tiny_clip.save_clip(tmp_path / "clip", tiny_clip.clip_text_model())
    folder = convert(tmp_path / "clip", tmp_path / "output", max_positions=120, stretch="knowledge-preserved")
    model = LoTLIPTextModel.from_pretrained(folder)
    assert model.config.max_position_embeddings == AutoTokenizer.from_pretrained(folder).model_max_length == 120
    assert_equal_texts(model, clip, longest=20)
    assert model(padded_ids([120], 120)[0]).last_hidden_state.shape == (1, 120, 32)


# open_clip, OpenAI, Long-CLIP: a model in their layout, on torch's own attention


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int, activation: nn.Module, eps: float) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        layers = (("c_fc", nn.Linear(width, mlp_width)), ("gelu", activation), ("c_proj", nn.Linear(mlp_width, width)))
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, layers: int, *block: Any) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(*block) for _ in range(layers)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = x.permute(1, 0, 2)  # the length first, as `nn.MultiheadAttention` takes it by default
        for block in self.resblocks:
            x = block(x, mask)
        return x.permute(1, 0, 2)


class Visual(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int, activation: nn.Module, eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(17, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.transformer = Transformer(3, width, heads, mlp_width, activation, eps)
        self.proj = nn.Parameter(torch.empty(width, 24))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenAIClip(nn.Module):
    """CLIP as OpenAI and open_clip lay it out; heads are 64 wide unless told otherwise."""

    def __init__(
        self,
        text_width: int = 64,
        vision_width: int = 128,
        text_heads: int = 1,
        vision_heads: int = 2,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = True,
        eps: float = 1e-5,
        context_length: int = 30,
    ) -> None:
        super().__init__()
        activation = QuickGELU() if quick_gelu else nn.GELU()
        vocab_size = len(tiny_clip.clip_tokenizer())
        self.visual = Visual(vision_width, vision_heads, int(vision_width * mlp_ratio), activation, eps)
        self.transformer = Transformer(2, text_width, text_heads, int(text_width * mlp_ratio), activation, eps)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.ln_final = nn.LayerNorm(text_width, eps=eps)
        self.text_projection = nn.Parameter(torch.empty(text_width, 24))
        self.logit_scale = nn.Parameter(torch.empty([]))
        tiny_clip.random_weights(self)

    def positions(self) -> torch.Tensor:
        return self.positional_embedding

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        """Of texts padded with zeros to the whole context; the feature stands at the highest id."""
        x = self.token_embedding(text) + self.positions()
        mask = torch.full((text.shape[1], text.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
        x = self.transformer(x, mask)
        return self.ln_final(x)[torch.arange(text.shape[0]), text.argmax(-1)] @ self.text_projection

    def forward(self, images: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.visual(images), self.encode_text(text)


class LongClip(OpenAIClip):
    """The first 20 rows of one table and the others of a second one, as Long-CLIP's masks add them."""

    def __init__(self) -> None:
        super().__init__(context_length=248)
        generator = torch.Generator().manual_seed(1)
        self.positional_embedding_res = nn.Parameter(0.2 * torch.randn(248, 64, generator=generator))

    def positions(self) -> torch.Tensor:
        mask1, mask2 = torch.zeros(248, 1), torch.zeros(248, 1)
        mask1[:20], mask2[20:] = 1, 1
        return self.positional_embedding * mask1 + self.positional_embedding_res * mask2


SETTINGS = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8},
    "text_cfg": {"context_length": 30, "vocab_size": 534, "width": 64, "heads": 1, "layers": 2},
}
MEAN = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
PREPROCESSING = {**MEAN, "interpolation": "bilinear", "resize_mode": "squash", "mode": "RGB", "size": 32}


def settings(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **own: Any) -> dict[str, Any]:
    return {
        **SETTINGS,
        **own,
        "vision_cfg": {**SETTINGS["vision_cfg"], **(vision or {})},
        "text_cfg": {**SETTINGS["text_cfg"], **(text or {})},
    }


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_clip.clip_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path, tokenizer_folder: Path) -> "Files":
    return Files(tmp_path, tokenizer_folder)


class Files:
    """An open_clip checkpoint for a test to make, and the arguments that convert it."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.weights, self.config, self.tokenizer = folder / "model.pt", folder / "config.json", tokenizer
        self.output = folder / "output"

    def save(self, model: nn.Module | None = None, **changes: torch.Tensor | None) -> None:
        """Writes the weights as a pickle; `changes` replace or, if None, remove tensors (`__` is a dot)."""
        state_dict = {**(model or OpenAIClip()).state_dict()}
        state_dict.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
        torch.save({name: tensor for name, tensor in state_dict.items() if tensor is not None}, self.weights)

    def arguments(self, *more: object, config: dict[str, Any] | None = None) -> list[object]:
        if config is not None:
            self.config.write_text(json.dumps(config))
            more = ("--open-clip-config", self.config, *more)
        return ["--clip", self.weights, "--tokenizer", self.tokenizer, *more]


@torch.no_grad()
def assert_equal_to_reference(folder: Path, reference: OpenAIClip, dtype: torch.dtype = torch.float32) -> None:
    """The same features of images and of texts of all lengths, in tokens and pixels of the converted processor."""
    model = AutoModel.from_pretrained(folder)
    assert type(model) is LoTLIPModel
    assert model.dtype == dtype
    model, reference = model.double(), reference.double()
    context_length = len(reference.positional_embedding)
    assert model.config.text_config.max_position_embeddings == context_length
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == context_length
    lengths = [*range(1, context_length, 1 + context_length // 30), context_length]
    input_ids, attention_mask = padded_ids(lengths, context_length)
    features = reference.encode_text(input_ids * attention_mask)
    assert features.std(dim=0).min() > 0.05
    ours = model.get_text_features(input_ids, attention_mask).pooler_output
    torch.testing.assert_close(ours, features, **EXACT)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model.get_image_features(images).pooler_output, reference.visual(images), **EXACT)
    torch.testing.assert_close(model.logit_scale, reference.logit_scale, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "folder-bin", "files", "checkpoint", "custom-text"])
def test_open_clip(files: Files, tmp_path: Path, kind: str) -> None:
    reference = OpenAIClip(quick_gelu=False)
    state_dict = {**reference.state_dict()}
    config = {"model_cfg": settings(quick_gelu=False), "preprocess_cfg": PREPROCESSING}
    source, arguments = files.weights, {"open_clip_config": files.config}
    if kind in ("folder", "folder-bin"):
        source, arguments = tmp_path / "folder", {}
        source.mkdir()
        (source / "open_clip_config.json").write_text(json.dumps(config))
        if kind == "folder":
            safetensors.torch.save_file(state_dict, source / "open_clip_model.safetensors")
        else:
            torch.save(state_dict, source / "open_clip_pytorch_model.bin")
    elif kind == "files":
        source = tmp_path / "weights.safetensors"
        safetensors.torch.save_file({f"model._orig_mod.{name}": t for name, t in state_dict.items()}, source)
    elif kind == "checkpoint":  # of a training run
        prefixed = {f"module.{name}": tensor for name, tensor in state_dict.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": prefixed, "optimizer": {"state": {}}}, source)
    else:
        text = ("positional_embedding", "text_projection", "token_embedding", "transformer", "ln_final")
        custom = {f"text.{name}" if name.startswith(text) else name: t for name, t in state_dict.items()}
        assert "text.text_projection" in custom
        torch.save({**custom, "text.attn_mask": torch.zeros(30, 30)}, source)
        config["model_cfg"]["custom_text"] = True
    if arguments:
        files.config.write_text(json.dumps(config))
    convert(source, files.output, tokenizer=files.tokenizer, **arguments)
    assert_equal_to_reference(files.output, reference)
    image_processor = AutoProcessor.from_pretrained(files.output).image_processor
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    resized = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    expected = (resized - np.array(MEAN["mean"])) / np.array(MEAN["std"])
    pixel_values = image_processor(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixel_values[0], expected.transpose(2, 0, 1), atol=1e-5)


def test_open_clip_settings(files: Files, run: Callable[..., str]) -> None:
    shape = {"text_width": 48, "vision_width": 40, "text_heads": 3, "vision_heads": 2, "mlp_ratio": 3.33}
    reference = OpenAIClip(**shape, eps=1e-3)
    files.save(reference)
    norm = {"norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 3.33}
    config = settings(
        vision={**norm, "width": 40, "head_width": 20, "image_size": [32, 32], "patch_dropout": 0.5},
        text={**norm, "width": 48, "heads": 3, "pool_type": "eos", "eos_id": 533},
    )
    run(*files.arguments(config=config), "--output", files.output)
    assert_equal_to_reference(files.output, reference)
    processor = AutoProcessor.from_pretrained(files.output).image_processor
    expected = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert processor.to_dict() == expected.to_dict()  # OpenAI's constants


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_bare_file_with_activation(files: Files, run: Callable[..., str], activation: str) -> None:
    reference = OpenAIClip(quick_gelu=activation == "quick_gelu", mlp_ratio=3.3)
    files.save(reference)
    run(*files.arguments("--activation", activation), "--output", files.output)
    assert_equal_to_reference(files.output, reference)
    assert AutoConfig.from_pretrained(files.output).vision_config.backbone_config.hidden_act == activation


def save_archive(model: OpenAIClip, path: Path) -> None:
    """A TorchScript archive with the numbers that OpenAI's hold beside the weights."""
    for name, number in (("input_resolution", 32), ("context_length", 30), ("vocab_size", 534)):
        model.register_buffer(name, torch.tensor(number))
    traced = torch.jit.trace(model.eval(), (torch.zeros(1, 3, 32, 32), torch.zeros(1, 30, dtype=torch.long)))
    torch.jit.save(traced, path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_openai_archive(files: Files, run: Callable[..., str]) -> None:
    reference = OpenAIClip()
    save_archive(reference, files.weights)
    assert {"input_resolution", "context_length", "vocab_size"} <= torch.jit.load(files.weights).state_dict().keys()
    run(*files.arguments(), "--output", files.output)
    assert_equal_to_reference(files.output, reference)
    processor = AutoProcessor.from_pretrained(files.output).image_processor
    assert processor.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_mixed_precision_becomes_the_wider_one(files: Files) -> None:
    # OpenAI's matrices are float16 and its norms and embeddings float32
    reference = OpenAIClip()
    for module in reference.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.half()
    files.save(reference)
    convert(files.weights, files.output, tokenizer=files.tokenizer, activation="quick_gelu")
    assert_equal_to_reference(files.output, reference)
    shutil.rmtree(files.output)
    files.save(OpenAIClip().half())
    convert(files.weights, files.output, tokenizer=files.tokenizer, activation="quick_gelu")
    assert_equal_to_reference(files.output, OpenAIClip().half(), torch.float16)


@pytest.mark.slow
def test_long_clip(files: Files, tmp_path: Path, run: Callable[..., str]) -> None:
    reference = LongClip()
    files.save(reference)
    out = run(*files.arguments(), "--output", files.output)
    assert "texts of up to 248 tokens, images of 32 x 32 pixels" in out
    assert_equal_to_reference(files.output, reference)
    # and on from there
    out = run(*files.arguments("--max-positions", 300), "--output", tmp_path / "longer")
    assert "248 positions stretched to 300" in out


# Hub ids, from a local cache


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Puts a folder into the Hub's local cache, which is all that a machine without a network has."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def add(repo_id: str, folder: Path) -> None:
        repository = cache / f"models--{repo_id.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / "0123")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123")

    return add


@pytest.mark.slow
def test_hub_ids(
    hub: Callable[[str, Path], None],
    stock: Path,
    pipeline: Path,
    files: Files,
    tmp_path: Path,
    run: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub("someone/clip", stock)
    run("--clip", "someone/clip", "--output", tmp_path / "a")
    assert_equal_texts(AutoModel.from_pretrained(tmp_path / "a"), CLIPModel.from_pretrained(stock))
    hub("someone/pipeline", pipeline)
    assert conversion.main(["--clip", "someone/pipeline", "--output", str(tmp_path / "b")]) == 2
    assert "--subfolder" in capsys.readouterr().err
    run("--clip", "someone/pipeline", "--subfolder", "text_encoder_2", "--output", tmp_path / "b")
    model = LoTLIPTextModelWithProjection.from_pretrained(tmp_path / "b")
    assert_equal_texts(model, CLIPTextModelWithProjection.from_pretrained(pipeline / "text_encoder_2"))
    assert AutoTokenizer.from_pretrained(tmp_path / "b").pad_token == "!"
    # open_clip's, with the tokenizer of the default repository, then with its own
    hub("openai/clip-vit-base-patch32", stock)
    (tmp_path / "open_clip").mkdir()
    reference = OpenAIClip()
    torch.save(reference.state_dict(), tmp_path / "open_clip" / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings()}))
    hub("someone/open_clip", tmp_path / "open_clip")
    run("--clip", "someone/open_clip", "--output", tmp_path / "c")
    assert_equal_to_reference(tmp_path / "c", reference)
    tiny_clip.clip_tokenizer(pad_token="!").save_pretrained(tmp_path / "open_clip")
    run("--clip", tmp_path, "--subfolder", "open_clip", "--output", tmp_path / "e")
    assert_equal_to_reference(tmp_path / "e", reference)
    assert AutoTokenizer.from_pretrained(tmp_path / "e").pad_token == "!"


def test_without_a_network(hub: Callable[[str, Path], None], files: Files, error: Callable[..., str]) -> None:
    assert "someone/clip" in error("--clip", "someone/clip")
    files.save(LongClip())
    message = error("--clip", files.weights)
    assert "openai/clip-vit-base-patch32" in message
    assert "--tokenizer" in message


# What is refused: transformers' checkpoints


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere"])
def test_no_such_source(error: Callable[..., str], name: str) -> None:
    assert name in error("--clip", name)


def test_source_without_a_model(tmp_path: Path, error: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in error("--clip", tmp_path / "empty")
    (tmp_path / "empty" / "open_clip_config.json").write_text(json.dumps(SETTINGS))
    assert "open_clip_model.safetensors" in error("--clip", tmp_path / "empty")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (SiglipConfig().to_dict(), "siglip"),
        ({"model_type": "clip", "architectures": ["CLIPForImageClassification"]}, "CLIPForImageClassification"),
        ({"model_type": "clip_vision_model", "architectures": [CLIPVisionModel.__name__]}, "CLIPVisionModel"),
        ({}, "None"),
    ],
)
def test_other_architectures(tmp_path: Path, error: Callable[..., str], config: Any, name: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert name in error("--clip", tmp_path / "other")


def test_a_lotlip_is_one_already(converted: Path, error: Callable[..., str]) -> None:
    assert "stretch_text_model" in error("--clip", converted, "--max-positions", 100)


@pytest.fixture
def spoilt(stock: Path, tmp_path: Path) -> Path:
    """A copy of the stock checkpoint for a test to spoil."""
    return shutil.copytree(stock, tmp_path / "spoilt")


def test_tensors_that_do_not_fit(stock: Path, spoilt: Path, error: Callable[..., str]) -> None:
    weights = spoilt / "model.safetensors"
    state_dict = load_file(weights)
    projection = state_dict.pop("visual_projection.weight")
    state_dict["extra"] = torch.ones(1)
    state_dict["text_model.final_layer_norm.bias"] = torch.ones(5)
    safetensors.torch.save_file(state_dict, weights, {"format": "pt"})
    message = error("--clip", spoilt)
    for name in ("visual_projection.weight", "extra", "text_model.final_layer_norm.bias"):
        assert name in message
    safetensors.torch.save_file({**state_dict, "visual_projection.weight": projection}, weights, {"format": "pt"})
    weights.write_bytes(weights.read_bytes()[:-10])
    assert f"{spoilt}: " in error("--clip", spoilt)
    (spoilt / "processor_config.json").unlink()
    shutil.copyfile(stock / "model.safetensors", weights)
    assert "preprocessor_config.json" in error("--clip", spoilt)
    (spoilt / "config.json").write_text("{")
    assert "config.json" in error("--clip", spoilt)


def test_a_text_encoder_with_a_projection_that_says_it_has_none(tmp_path: Path, error: Callable[..., str]) -> None:
    tiny_clip.save_clip(tmp_path / "text", tiny_clip.clip_text_model(with_projection=True))
    set_json(tmp_path / "text" / "config.json", architectures=["CLIPTextModel"])
    assert "text_projection.weight" in error("--clip", tmp_path / "text")


SWAPPED = {"eos_token": "<|startoftext|>", "bos_token": "<|endoftext|>"}


@pytest.mark.parametrize("case", ["other ends", "other ends, old ids", "too many", "damaged", "BERT's"])
def test_tokenizers_that_do_not_fit(
    spoilt: Path, tmp_path: Path, golden: Path, error: Callable[..., str], case: str
) -> None:
    folder, word = tmp_path / "tokenizer", "--tokenizer"
    if case == "BERT's":
        BertTokenizer.from_pretrained(golden / "tokenizer").save_pretrained(folder)
    else:
        tiny_clip.clip_tokenizer(**({"pad_token": "<|pad|>"} if case == "too many" else SWAPPED)).save_pretrained(
            folder
        )
        word = "535" if case == "too many" else "533"
    if case == "other ends, old ids":
        text_config = json.loads((spoilt / "config.json").read_text())["text_config"]
        set_json(spoilt / "config.json", text_config={**text_config, "eos_token_id": 2})
    elif case == "damaged":
        (folder / "tokenizer.json").write_text("{}")
        word = "--tokenizer"
    assert word in error("--clip", spoilt, "--tokenizer", folder)


def test_text_encoder_without_a_tokenizer(tmp_path: Path, error: Callable[..., str]) -> None:
    tiny_clip.clip_text_model().save_pretrained(tmp_path / "text_encoder")
    assert "--tokenizer" in error("--clip", tmp_path / "text_encoder")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--stretch", "linear"),
        ("--max-positions", 76),
        ("--num-corner-tokens", -1),
        ("--activation", "gelu"),
        ("--open-clip-config", "x"),
    ],
)
def test_arguments_that_do_not_fit(stock: Path, error: Callable[..., str], option: str, value: object) -> None:
    assert option.strip("-").replace("-", "_") in error("--clip", stock, option, value).replace("-", "_")


def test_files_of_weights_have_no_subfolder_and_their_configuration(files: Files, error: Callable[..., str]) -> None:
    files.save()
    assert "--subfolder" in error("--clip", files.weights, "--subfolder", "x")
    assert "nowhere.json" in error(*files.arguments("--open-clip-config", "nowhere.json"))


@pytest.mark.parametrize("name", ["mine", "mine/file/sub/below"])
def test_output_exists(stock: Path, tmp_path: Path, error: Callable[..., str], name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    assert str(tmp_path / name) in error("--clip", stock, "--output", tmp_path / name)


def test_weights_that_are_not_finite(spoilt: Path, error: Callable[..., str]) -> None:
    weights, name = spoilt / "model.safetensors", "vision_model.encoder.layers.0.mlp.fc1.weight"
    state_dict = load_file(weights)
    state_dict[name][3, 5] = torch.nan
    safetensors.torch.save_file(state_dict, weights, {"format": "pt"})
    assert name in error("--clip", spoilt)


@pytest.mark.slow
def test_a_difference_after_saving_is_found(
    stock: Path, tmp_path: Path, error: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = LoTLIPModel.save_pretrained

    def save_with_an_error(self: LoTLIPModel, folder: Path) -> None:
        with torch.no_grad():
            self.vision_model.backbone.encoder.layers[1].mlp.fc1.weight[3, 5] += 1e-6
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(LoTLIPModel, "save_pretrained", save_with_an_error)
        message = error("--clip", stock)
        assert "vision_model.encoder.layers.1.mlp.fc1.weight" in message
    load = conversion.load_strict

    def load_with_an_error(model_class: type[PreTrainedModel], *arguments: Any, **kwargs: Any) -> PreTrainedModel:
        model: Any = load(model_class, *arguments, **kwargs)
        if model_class is LoTLIPModel:  # the same weights, but another activation
            for layer in model.text_model.backbone.encoder.layers:
                layer.mlp.activation_fn = nn.GELU()
        return model

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "load_strict", load_with_an_error)
        assert "outputs" in error("--clip", stock)
    with monkeypatch.context() as patch:
        patch.setattr(CLIPTokenizer, "save_pretrained", save_another_tokenizer)
        assert "tokenizer" in error("--clip", stock)
    assert convert(stock, tmp_path / "output").is_dir()


def save_another_tokenizer(self: CLIPTokenizer, folder: Path, **_: Any) -> None:
    other = CLIPTokenizer(vocab=self.get_vocab(), merges=[], model_max_length=self.model_max_length)
    super(CLIPTokenizer, other).save_pretrained(folder)


# What is refused: open_clip's checkpoints


def test_files_of_transformers(stock: Path, tmp_path: Path, files: Files, error: Callable[..., str]) -> None:
    tiny_clip.clip_text_model().save_pretrained(tmp_path / "new")
    for weights in (stock / "model.safetensors", tmp_path / "new" / "model.safetensors"):
        files.weights = weights
        assert "config.json" in error(*files.arguments("--activation", "gelu"))


def test_the_activation_is_said_once(files: Files, error: Callable[..., str]) -> None:
    files.save()
    assert "--activation" in error(*files.arguments())
    files.save(LongClip())
    assert "quick_gelu" in error(*files.arguments(config=settings(quick_gelu=False, text={"context_length": 248})))
    assert "--activation" in error(*files.arguments("--activation", "quick_gelu", config=SETTINGS))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"embed_dim": 24}, "vision_cfg"),
        (settings(embed_dim=0), "embed_dim"),
        (settings(text={"new": 1, "other": 2}), "new, other"),
        (settings(multimodal_cfg={}), "multimodal_cfg"),
        (settings(vision={"layers": [3, 4, 6, 3]}), "layers"),
        (settings(vision={"pool_type": "avg"}), "pool_type"),
        (settings(vision={"norm_kwargs": {"bias": 1}}), "bias"),
        (settings(vision={"norm_kwargs": {"eps": "tiny"}}), "config.json"),
        (settings(text={"heads": 7}), "heads"),
        (settings(vision={"image_size": [32, 40]}), "image_size"),
        (settings(text={"pool_type": "eos"}), "eos_id"),
        (settings(text={"pool_type": "eos", "eos_id": 7}), "id 7"),
        ({"model_cfg": SETTINGS, "preprocess_cfg": {"resize_mode": "longest"}}, "resize_mode"),
        ({"model_cfg": SETTINGS, "preprocess_cfg": {"fill": 1}}, "fill"),
    ],
)
def test_settings_that_clip_has_not(files: Files, error: Callable[..., str], config: Any, name: str) -> None:
    files.save()
    assert name in error(*files.arguments(config=config))


def test_open_clip_tensors_that_do_not_fit(files: Files, error: Callable[..., str]) -> None:
    files.save(
        visual__ln_pre__bias=None,
        logit_bias=torch.tensor(-10.0),
        logit_scale=torch.ones(1),
        visual__proj=torch.ones(24, 128),
        ln_final__bias=torch.ones(64, dtype=torch.int8),
        text__ln_final__weight=torch.ones(64),  # there without the prefix too
    )
    message = error(*files.arguments(config=SETTINGS))
    for name in (
        "logit_bias",
        "visual.ln_pre.bias",
        "logit_scale",
        "visual.proj",
        "torch.int8",
        "text.ln_final.weight",
    ):
        assert name in message
    files.save(LongClip(), positional_embedding=torch.ones(77, 64))
    assert "positional_embedding_res" in error(*files.arguments())


def test_bare_files_that_are_no_clip(files: Files, error: Callable[..., str]) -> None:
    files.save(text_projection=torch.ones(3))
    assert "text_projection" in error(*files.arguments("--activation", "gelu"))
    files.save(OpenAIClip(text_width=48))
    assert "48" in error(*files.arguments("--activation", "gelu"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["model.safetensors", "archive.pt"])
def test_damaged_files(files: Files, tmp_path: Path, error: Callable[..., str], name: str) -> None:
    files.weights = tmp_path / name
    files.weights.write_bytes(b"nothing of the kind")
    if name == "archive.pt":
        with zipfile.ZipFile(files.weights, "w") as archive:
            archive.writestr("archive/constants.pkl", b"")
    assert name in error(*files.arguments())


# The command, and the real size


def test_command_line(stock: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert conversion.main(["--clip", str(stock), "--output", str(tmp_path / "output")]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert re.sub(SAME_OUTPUTS, "as CLIP's", out) == (
        f"Wrote {tmp_path / 'output'}\n  55,221 parameters in float32; outputs as CLIP's\n"
        "  2 corner tokens, texts of up to 77 tokens, images of 32 x 32 pixels\n"
    )


@pytest.mark.slow
def test_text_tower_of_clip_vit_large(tmp_path: Path, run: Callable[..., str]) -> None:
    """The encoder of Stable Diffusion 1 in all its sizes, with two of its twelve layers."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12, projection_dim=768
    )
    assert (config.vocab_size, config.max_position_embeddings) == (49408, POSITIONS)
    clip = CLIPTextModelWithProjection(config).eval()
    tokenizer = large_tokenizer(config.vocab_size)
    tiny_clip.save_clip(tmp_path / "clip", clip, tokenizer)
    out = run("--clip", tmp_path / "clip", "--max-positions", 248, "--output", tmp_path / "output")
    assert "77 positions stretched to 248 (knowledge-preserved)" in out
    model = LoTLIPTextModelWithProjection.from_pretrained(tmp_path / "output")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    batch = tokenizer(["a cat " * 200, "a photo of the dog"], padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 248)
    with torch.no_grad():
        embeds = model(**batch).text_embeds
        short = clip(**tokenizer("a photo of the dog", return_tensors="pt")).text_embeds
    assert embeds.shape == (2, 768)
    ours, theirs = (nn.functional.normalize(one, dim=-1) for one in (embeds[1:], short))
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def large_tokenizer(vocab_size: int) -> CLIPTokenizer:
    """The tiny tokenizer with as many tokens as CLIP's, the special ones last."""
    backend = json.loads(tiny_clip.clip_tokenizer().backend_tokenizer.to_str())["model"]
    words = [token for token in backend["vocab"] if not token.startswith("<|")]
    words += [f"filler{number}</w>" for number in range(vocab_size - 2 - len(words))]
    vocabulary = {token: index for index, token in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge) for merge in backend["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=POSITIONS)
