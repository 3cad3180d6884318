"""LoTLIP checkpoints to stock classes of transformers: what can be equal is, and what cannot is refused."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    CLIPModel,
    CLIPProcessor,
    PreTrainedModel,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)
from transformers.image_utils import load_image

import oldest
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
    LoTLIPTextModel,
    LoTLIPTextModelWithProjection,
    LoTLIPTokenizer,
    LoTLIPVisionConfig,
    LoTLIPVisionModel,
    LoTLIPVisionModelWithProjection,
    from_backbones,
)
from lotlip_hf.conversion import clip as clip_conversion
from lotlip_hf.conversion import stock
from lotlip_hf.conversion.common import ConversionError
from lotlip_hf.conversion.stock import convert, stock_model, stock_tokenizer
from lotlip_hf.images import official_image_processor
from tiny_tokenizers import GOLDEN, PIECES, TEXTS, random_texts, toy_roberta, toy_xlm_roberta

PAIRS = list(itertools.product(tiny.TEXT_BACKBONES, tiny.VISION_BACKBONES))
# In units of a feature's norm, which is what the export promises
TOLERANCE = {"atol": 1e-6, "rtol": 0}  # of features of norm 1
STATES = {"atol": 1e-5, "rtol": 1e-5}  # of features and hidden states as they are
IMAGE = GOLDEN.parent / "images" / "RGB_640x480.png"

# Run where `lotlip_hf` cannot be imported: what each folder's own classes answer to the inputs that lie beside it.
STOCK_ONLY = """
import sys
sys.modules["lotlip_hf"] = None
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer
from transformers.image_utils import load_image

image, version, *folders = sys.argv[1:]
assert transformers.__version__.startswith(version), transformers.__version__
for folder in folders:
    inputs, answers = load_file(f"{folder}/inputs.safetensors"), {}
    checkpoint = f"{folder}/stock"
    model, info = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    assert type(model).__module__.startswith("transformers.models."), type(model)
    with torch.no_grad():
        outputs = model(**inputs)
    for name in ("logits_per_image", "text_embeds", "image_embeds"):
        answers[name] = outputs[name].contiguous()
    if Path(f"{folder}/texts.txt").is_file():
        texts = Path(f"{folder}/texts.txt").read_text(encoding="utf-8").split("|")
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        processor = AutoProcessor.from_pretrained(checkpoint)
        batch = processor(
            text=texts, images=[load_image(image)], padding=True, truncation=True, return_tensors="pt"
        )
        again = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        assert torch.equal(again["input_ids"], batch["input_ids"])
        answers.update({f"processed_{name}": tensor for name, tensor in batch.items()})
        with torch.no_grad():
            answers["processed_logits"] = model(**batch).logits_per_image.contiguous()
    save_file(answers, f"{folder}/answers.safetensors")
assert not [name for name in sys.modules if name.split(".")[0] == "lotlip_hf" and sys.modules[name] is not None]
"""


def lotlip(model: PreTrainedModel, folder: Path, seed: int = 0) -> PreTrainedModel:
    """The model with random weights, norms and biases included, saved in a folder."""
    tiny_clip.random_weights(model, seed)
    model.eval().save_pretrained(folder)
    return model


def dual_encoder(
    text: LoTLIPTextConfig, vision: LoTLIPVisionConfig, folder: Path, projection_dim: int | None = 24
) -> LoTLIPModel:
    config = LoTLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim)
    return lotlip(LoTLIPModel(config), folder)


def text_family(name: str, **kwargs: Any) -> LoTLIPTextConfig:
    return LoTLIPTextConfig(backbone_config=tiny_families.FAMILIES[name].stock_config(), **kwargs)


def random_inputs(config: LoTLIPTextConfig, seed: int = 1) -> dict[str, torch.Tensor]:
    """A full-length text, a short one and one of two tokens, padded on the right, and three images."""
    generator = torch.Generator().manual_seed(seed)
    length = config.max_position_embeddings
    ids = torch.randint(7, config.vocab_size - 2, (3, length), generator=generator)
    ids[:, 0] = 5
    mask = torch.ones_like(ids)
    for row, end in enumerate((length, 9, 2)):
        ids[row, end - 1] = config.eos_token_id if config.family.is_causal else 6
        ids[row, end:] = config.pad_token_id
        mask[row, end:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(3, 3, 32, 32, generator=generator),
    }


def assert_same_features(stock_encoder: PreTrainedModel, model: LoTLIPModel, inputs: dict[str, torch.Tensor]) -> None:
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        for ours, theirs in (
            (model.get_text_features(**text), stock_encoder.get_text_features(**text)),
            (
                model.get_image_features(inputs["pixel_values"]),
                stock_encoder.get_image_features(inputs["pixel_values"]),
            ),
        ):
            norm = ours.pooler_output.norm(dim=-1, keepdim=True)
            assert norm.min() > 0.1
            torch.testing.assert_close(theirs.pooler_output / norm, ours.pooler_output / norm, **TOLERANCE)
        ours, theirs = model(**inputs, return_loss=True), stock_encoder(**inputs, return_loss=True)
    scale = model.logit_scale.exp().item()
    for name in ("text_embeds", "image_embeds", "logits_per_image", "logits_per_text", "loss"):
        factor = scale if name.startswith(("logits", "loss")) else 1.0
        torch.testing.assert_close(theirs[name] / factor, ours[name] / factor, **TOLERANCE)
    # Another text or image would be told apart.
    assert (ours.text_embeds[0] - ours.text_embeds[1]).abs().max() > 1e-2
    assert (ours.image_embeds[0] - ours.image_embeds[1]).abs().max() > 1e-2


# Pairs of towers


@pytest.mark.slow
@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_every_pair_of_backbones(text: str, vision: str, tmp_path: Path) -> None:
    model = lotlip(LoTLIPModel(tiny.config(text, vision)), tmp_path / "lotlip")
    written = convert(tmp_path / "lotlip", tmp_path / "stock")
    loaded, info = AutoModel.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(info.values())
    expected = CLIPModel if (text, vision) == ("clip", "clip") else VisionTextDualEncoderModel
    assert type(loaded) is expected
    assert written.model_class == expected.__name__
    assert written.num_parameters == loaded.num_parameters()
    assert written.difference <= 1e-6
    config, text_config = loaded.config, model.config.text_config
    assert config.projection_dim == 24
    assert config.logit_scale_init_value == model.config.logit_scale_init_value
    assert loaded.logit_scale.item() == 3.0
    for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(config.text_config, name) == getattr(text_config, name)
    corner_positions = 0 if text == "clip" else 2
    assert config.text_config.max_position_embeddings == tiny.TEXT_SIZE["max_position_embeddings"] - corner_positions
    assert_same_features(loaded, model, random_inputs(model.config.text_config))


@pytest.mark.parametrize("corners", [0, 1, 3])
@pytest.mark.parametrize(("backbone", "first_word"), [("bert", 1), ("xlm-roberta", 3)])
def test_positions_close_up_behind_cls(backbone: str, first_word: int, corners: int) -> None:
    """Row 0 of BERT's table, rows up to padding id + 1 of RoBERTa's, and those behind the corner tokens'."""
    text = tiny.text_config(backbone, num_corner_tokens=corners)
    if backbone != "bert":
        assert text.pad_token_id == 1
    model = LoTLIPTextModel(text)
    stock_text = stock_model(model)
    table = model.backbone.embeddings.position_embeddings.weight
    kept = [row for row in range(40) if not first_word <= row < first_word + corners]
    assert torch.equal(stock_text.embeddings.position_embeddings.weight, table[kept])
    assert stock_text.config.max_position_embeddings == 40 - corners
    assert model.config.backbone_config.max_position_embeddings == 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("projection_dim", "vision", "vision_pooling"),
    [(None, "vit", "cls"), (32, "vit", "cls"), (24, "vit", "pooler"), (None, "dinov2", "pooler")],
)
def test_poolers_and_projections_that_are_not_there(
    projection_dim: int | None, vision: str, vision_pooling: str, tmp_path: Path
) -> None:
    """None, in one tower or in both, are identities."""
    vision_config = tiny.vision_config(vision, pooling=vision_pooling)
    text_config = tiny.text_config(projection_dim=None if projection_dim is None else 32)
    model = dual_encoder(text_config, vision_config, tmp_path / "lotlip", projection_dim)
    assert (model.config.vision_config.projection_dim is None) == (projection_dim != 24)
    convert(tmp_path / "lotlip", tmp_path / "stock")
    loaded = AutoModel.from_pretrained(tmp_path / "stock")
    assert loaded.config.projection_dim == (projection_dim or 32)
    assert_same_features(loaded, model, random_inputs(model.config.text_config))


@pytest.mark.parametrize(
    ("text", "vision", "options"),
    [
        (("bert", "cls"), "vit", {"pooling": "cls"}),
        (("roberta", "mean"), "clip", {"pooling": "pooler"}),
        (("clip", "eos"), "siglip", {"pooling": "mean"}),
        (("bert", "pooler"), "dinov2", {"pooling": "cls+mean"}),
        (("bert", "pooler"), "vit", {"pooling": "cls", "pooled_layers": 2}),
    ],
)
def test_poolings_that_no_stock_class_has(
    text: tuple[str, str],
    vision: str,
    options: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text_config = tiny.text_config(text[0], pooling=text[1])
    dual_encoder(text_config, tiny.vision_config(vision, **options), tmp_path / "lotlip")
    assert [*options][-1] in error(tmp_path / "lotlip", tmp_path / "stock", capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "dtype"), [("bert", torch.bfloat16), ("clip", torch.float64)])
def test_precision_is_kept(text: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Two models in the same precision answer alike: to a few of its steps, for one step more or less in a sum of one
    layer moves all that follow."""
    model = LoTLIPModel(tiny.config(text, "vit")).to(dtype)
    lotlip(model, tmp_path / "lotlip")
    assert convert(tmp_path / "lotlip", tmp_path / "stock").dtype == dtype
    loaded = AutoModel.from_pretrained(tmp_path / "stock", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    inputs = random_inputs(model.config.text_config)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    pixel_values = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        both = [one(**text, pixel_values=pixel_values) for one in (model, loaded)]
        pairs = [
            (
                one.get_text_features(**text).pooler_output,
                one.get_image_features(pixel_values).pooler_output,
                outputs.text_embeds,
                outputs.image_embeds,
            )
            for one, outputs in zip((model, loaded), both, strict=True)
        ]
    for ours, theirs in zip(*pairs, strict=True):
        difference = (theirs - ours).double().norm(dim=-1) / ours.double().norm(dim=-1)
        assert difference.max() < 4 * torch.finfo(dtype).eps


# Towers by themselves


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "pooling", "model_class", "projection_dim", "expected"),
    [
        ("clip", "eos", LoTLIPTextModel, 24, "CLIPTextModel"),
        ("clip", "eos", LoTLIPTextModelWithProjection, 24, "CLIPTextModelWithProjection"),
        ("clip", "eos", LoTLIPTextModelWithProjection, None, "CLIPTextModel"),
        ("bert", "pooler", LoTLIPTextModelWithProjection, None, "BertModel"),
        ("xlm-roberta", "pooler", LoTLIPTextModel, None, "XLMRobertaModel"),
    ],
)
def test_text_towers(
    backbone: str,
    pooling: str,
    model_class: Callable[..., PreTrainedModel],
    projection_dim: int | None,
    expected: str,
    tmp_path: Path,
) -> None:
    text_config = tiny.text_config(backbone, pooling=pooling, projection_dim=projection_dim)
    model = lotlip(model_class(text_config), tmp_path / "lotlip")
    assert convert(tmp_path / "lotlip", tmp_path / "stock").model_class == expected
    loaded = getattr(transformers, expected).from_pretrained(tmp_path / "stock")
    assert loaded.config.architectures == [expected]
    inputs = random_inputs(text_config)
    del inputs["pixel_values"]
    with torch.no_grad():
        ours, theirs = model(**inputs), loaded(**inputs)
    name = "text_embeds" if "Projection" in expected else "pooler_output"
    feature = ours.pooler_output if model_class is LoTLIPTextModel else ours.text_embeds
    torch.testing.assert_close(theirs[name], feature, **STATES)
    is_text = inputs["attention_mask"].bool()
    torch.testing.assert_close(theirs.last_hidden_state[is_text], ours.last_hidden_state[is_text], **STATES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "model_class", "projection_dim", "expected"),
    [
        ("clip", LoTLIPVisionModel, 24, "CLIPVisionModel"),
        ("clip", LoTLIPVisionModelWithProjection, 24, "CLIPVisionModelWithProjection"),
        ("clip", LoTLIPVisionModelWithProjection, None, "CLIPVisionModel"),
        ("vit", LoTLIPVisionModel, None, "ViTModel"),
    ],
)
def test_vision_towers(
    backbone: str,
    model_class: Callable[..., PreTrainedModel],
    projection_dim: int | None,
    expected: str,
    tmp_path: Path,
) -> None:
    model = lotlip(model_class(tiny.vision_config(backbone, projection_dim=projection_dim)), tmp_path / "lotlip")
    official_image_processor(32).save_pretrained(tmp_path / "lotlip")
    written = convert(tmp_path / "lotlip", tmp_path / "stock")
    assert written.model_class == expected
    loaded = getattr(transformers, expected).from_pretrained(tmp_path / "stock")
    pixel_values = AutoImageProcessor.from_pretrained(tmp_path / "stock")(load_image(str(IMAGE)), return_tensors="pt")
    with torch.no_grad():
        ours, theirs = model(**pixel_values), loaded(**pixel_values)
    name = "image_embeds" if expected.endswith("Projection") else "pooler_output"
    feature = ours.pooler_output if model_class is LoTLIPVisionModel else ours.image_embeds
    torch.testing.assert_close(theirs[name], feature, **STATES)
    torch.testing.assert_close(theirs.last_hidden_state, ours.last_hidden_state, **STATES)


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (LoTLIPTextModelWithProjection(tiny.text_config("clip", projection="residual_mlp")), "residual_mlp"),
        (LoTLIPTextModelWithProjection(text_family("modernbert", projection="residual_mlp")), "residual_mlp"),
        (LoTLIPTextModel(text_family("llama", attention="bidirectional")), "attention"),
        (LoTLIPTextModel(text_family("llama", token_prepending=(1, 1), placeholder_token_id=7)), "token_prepending"),
        (LoTLIPVisionModelWithProjection(tiny.vision_config("vit", projection_dim=24)), "projection"),
    ],
)
def test_towers_that_no_stock_class_has(model: PreTrainedModel, word: str) -> None:
    with pytest.raises(ConversionError, match=word):
        stock_model(model)


def test_the_model_given_stays_as_it_is() -> None:
    model = LoTLIPModel(tiny.config("bert", "vit"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()
    exported = stock_model(model)
    assert exported.vision_model.embeddings.cls_token is not None
    assert model.config.to_dict() == before[1]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.state_dict().items())


# All families


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tiny_families.FAMILIES if not name.endswith("layers")])
def test_every_family_of_text_encoders(name: str, tmp_path: Path) -> None:
    """`convert` compares features and states. With a projection, towers become folders for sentence-transformers."""
    family = tiny_families.FAMILIES[name]
    config = text_family(name, projection_dim=24)
    model = LoTLIPTextModelWithProjection(config)
    tiny_families.spread(model).save_pretrained(tmp_path / "lotlip")
    written = convert(tmp_path / "lotlip", tmp_path / "stock")
    assert written.difference <= 1e-6
    stock_class = getattr(transformers, written.model_class)
    assert stock_class.config_class.model_type == family.model_type
    loaded, info = stock_class.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert all(name.startswith("pooler.") for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    corners = config.num_corner_tokens if family.positions == "inserted" else 0
    if hasattr(loaded.config, "max_position_embeddings"):
        assert loaded.config.max_position_embeddings == tiny_families.LONGEST - corners
    assert (tmp_path / "stock" / "modules.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_vision.FAMILIES, ids=lambda family: family.name)
def test_every_family_of_image_encoders(family: tiny_vision.Family, tmp_path: Path) -> None:
    pooling = family.poolings[0]
    for vision, is_dual in ((family.config(pooling=pooling), False), (family.config(pooling=pooling), True)):
        folder = tmp_path / ("dual" if is_dual else "tower")
        if is_dual:
            dual_encoder(tiny.text_config(), vision, folder / "lotlip")
        else:
            lotlip(LoTLIPVisionModel(vision), folder / "lotlip")
        if is_dual and family.model_type == "siglip2_vision_model":
            with pytest.raises(ConversionError, match="-only"):
                convert(folder / "lotlip", folder / "stock")
            continue
        assert convert(folder / "lotlip", folder / "stock").difference <= 1e-6
        loaded, info = AutoModel.from_pretrained(folder / "stock", output_loading_info=True)
        assert not any(info.values())
        assert type(loaded).__module__.startswith("transformers.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "template"),
    [
        ("bert", {"pooling": "mean", "projection_dim": None}, "{}"),
        ("roberta", {"pooling": "pooler", "projection_dim": 24}, "{}"),
        ("modernbert", {"projection_dim": 24}, "query: {}"),
        ("t5", {"pooling": "mean", "projection_dim": 24}, "{}"),
        ("qwen3", {"pooling": "last", "projection_dim": 24}, "Instruct: find the picture. Query: {}"),
        ("llama", {"pooling": "weighted_mean", "projection_dim": None}, "{}"),
    ],
)
def test_sentence_transformers_loads_a_text_tower(
    name: str, fields: dict[str, Any], template: str, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers", reason="needs `pip install sentence-transformers`")
    backbone = tiny_families.FAMILIES[name].stock_config(vocab_size=30522, pad_token_id=0)
    text = LoTLIPTextConfig(backbone_config=backbone, **fields)
    config = LoTLIPConfig(text_config=text, vision_config=tiny.vision_config(), projection_dim=text.output_size)
    model = LoTLIPModel(config)
    tiny_families.spread(model).save_pretrained(tmp_path / "lotlip")
    tokenizer = LoTLIPTokenizer.from_pretrained(
        GOLDEN, clean_text=False, prompt_template=template, model_max_length=min(30, text.max_position_embeddings)
    )
    processor = LoTLIPProcessor(official_image_processor(32), tokenizer)
    processor.save_pretrained(tmp_path / "lotlip")
    arguments = ["--model", str(tmp_path / "lotlip"), "--output", str(tmp_path / "stock"), "--text-only"]
    assert stock.main([*arguments, "--without-text-cleaning"]) == 0
    texts = ["A cat sleeps. It is old.", "a dog", "the lawn and the house " * 20]
    expected = Encoder(model, processor).encode_texts(texts, progress=False)
    sentences = library.SentenceTransformer(str(tmp_path / "stock"), device="cpu")
    assert sentences.max_seq_length == tokenizer.model_max_length
    torch.testing.assert_close(sentences.encode(texts, convert_to_tensor=True), expected, **STATES)
    assert (expected[0] - expected[1]).abs().max() > 1e-2


def test_a_stock_encoder_goes_in_and_out() -> None:
    """Text encoders of which corner tokens take no positions come out bit by bit."""
    for name in ("modernbert", "qwen3", "t5"):
        encoder = tiny_families.FAMILIES[name].stock_model()
        image_encoder = AutoModel.from_config(tiny.vision_config().backbone_config)
        model = from_backbones(encoder, image_encoder)
        exported = stock_model(model.text_model)
        assert type(exported) is type(encoder)
        assert exported.state_dict().keys() == encoder.state_dict().keys()
        assert all(torch.equal(tensor, encoder.state_dict()[key]) for key, tensor in exported.state_dict().items())


# CLIP


@pytest.mark.slow
def test_a_converted_clip_comes_out_as_it_went_in(tmp_path: Path) -> None:
    clip = tiny_clip.save_clip(tmp_path / "clip")
    clip_conversion.convert(tmp_path / "clip", tmp_path / "lotlip")
    written = convert(tmp_path / "lotlip", tmp_path / "stock")
    assert written.processor == "CLIPProcessor"
    loaded = AutoModel.from_pretrained(tmp_path / "stock")
    assert {name: tensor.tolist() for name, tensor in loaded.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in clip.state_dict().items()
    }
    for name in ("text_config", "vision_config"):
        ours, theirs = getattr(loaded.config, name).to_dict(), getattr(clip.config, name).to_dict()
        assert {key: value for key, value in ours.items() if key not in ("dtype", "architectures")} == {
            key: value for key, value in theirs.items() if key not in ("dtype", "architectures")
        }
    ours, theirs = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("stock", "clip"))
    assert type(ours) is CLIPProcessor
    assert type(ours.tokenizer) is type(theirs.tokenizer)
    batches = [
        one(text=tiny_clip.texts(), images=load_image(str(IMAGE)), padding=True, truncation=True, return_tensors="pt")
        for one in (ours, theirs)
    ]
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])

    # and in again: the same answers
    clip_conversion.convert(tmp_path / "stock", tmp_path / "again")
    again = LoTLIPModel.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected, outputs = clip(**batches[1]), again(**batches[0])
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(outputs[name], expected[name], **TOLERANCE)


@pytest.mark.parametrize("with_projection", [True, False])
def test_a_text_encoder_goes_in_and_out(with_projection: bool, tmp_path: Path) -> None:
    clip = tiny_clip.save_clip(tmp_path / "clip", tiny_clip.clip_text_model(with_projection))
    clip_conversion.convert(tmp_path / "clip", tmp_path / "lotlip")
    written = convert(tmp_path / "lotlip", tmp_path / "stock")
    assert (written.model_class, written.processor) == (type(clip).__name__, "CLIPTokenizer")
    loaded = type(clip).from_pretrained(tmp_path / "stock")
    assert loaded.state_dict().keys() == clip.state_dict().keys()
    assert all(torch.equal(tensor, clip.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config.to_diff_dict() == clip.config.to_diff_dict()


def test_the_eos_id_of_old_configurations(tmp_path: Path) -> None:
    """It is 2, and [EOT] the highest id of the text."""
    config = tiny.config("clip", "clip")
    config.text_config.eos_token_id = 2
    model = lotlip(LoTLIPModel(config), tmp_path / "lotlip")
    convert(tmp_path / "lotlip", tmp_path / "stock")
    loaded = AutoModel.from_pretrained(tmp_path / "stock")
    assert loaded.config.text_config.eos_token_id == 2
    inputs = random_inputs(config.text_config)
    inputs["input_ids"][torch.arange(3), inputs["attention_mask"].sum(1) - 1] = config.text_config.vocab_size - 1
    assert_same_features(loaded, model, inputs)


# Without this package


def prepare(folder: Path) -> dict[str, LoTLIPModel]:
    """An export of each backbone, and of two checkpoints with tokenizers, each with inputs."""
    pairs = [("bert", "vit"), ("roberta", "dinov2"), ("bert", "siglip"), ("xlm-roberta", "clip"), ("clip", "vit")]
    checkpoints = {f"{text}-{vision}": tiny.config(text, vision) for text, vision in pairs}
    checkpoints["clip-clip"] = LoTLIPConfig(
        text_config=LoTLIPTextConfig(backbone_config=tiny_clip.clip_text_config(), projection_dim=24),
        vision_config=tiny.vision_config("clip"),
    )
    found = {}
    for name, config in checkpoints.items():
        found[name] = lotlip(LoTLIPModel(config), folder / name / "lotlip")
        if name == "xlm-roberta-clip":
            tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(
                toy_xlm_roberta(), clean_text=False, model_max_length=30
            )
            LoTLIPProcessor(official_image_processor(32), tokenizer).save_pretrained(folder / name / "lotlip")
        if name == "clip-clip":
            processor = CLIPProcessor(tiny_clip.image_processor(), tiny_clip.clip_tokenizer())
            processor.save_pretrained(folder / name / "lotlip")
        convert(folder / name / "lotlip", folder / name / "stock")
        save_file(random_inputs(found[name].config.text_config), folder / name / "inputs.safetensors")
    for name in ("xlm-roberta-clip", "clip-clip"):
        (folder / name / "texts.txt").write_text("a cat. it sleeps|a [b] & </s>. c|" + "a dog " * 30, encoding="utf-8")
    return found


def run_stock_only(interpreter: str | Path, version: str, folder: Path, names: list[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHON"))}
    command = [str(interpreter), "-c", STOCK_ONLY, str(IMAGE), version, *(str(folder / name) for name in names)]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-5000:]


def compare_answers(folder: Path, found: dict[str, LoTLIPModel]) -> None:
    processed = 0
    for name, model in found.items():
        inputs, answers = (load_file(folder / name / f"{kind}.safetensors") for kind in ("inputs", "answers"))
        with torch.no_grad():
            outputs = model(**inputs)
        scale = model.logit_scale.exp()
        for key in ("text_embeds", "image_embeds", "logits_per_image"):
            factor = scale if key == "logits_per_image" else 1.0
            torch.testing.assert_close(
                answers[key] / factor, outputs[key] / factor, **TOLERANCE, msg=f"{name}: {key}".__add__
            )
        if "processed_logits" in answers:
            processor = LoTLIPProcessor.from_pretrained if name.startswith("xlm") else AutoProcessor.from_pretrained
            texts = (folder / name / "texts.txt").read_text(encoding="utf-8").split("|")
            batch = processor(folder / name / "lotlip")(
                text=texts, images=[load_image(str(IMAGE))], padding=True, truncation=True, return_tensors="pt"
            )
            for key, tensor in batch.items():
                assert torch.equal(answers[f"processed_{key}"], tensor), (name, key)
            with torch.no_grad():
                logits = model(**batch).logits_per_image
            torch.testing.assert_close(answers["processed_logits"] / scale, logits / scale, **TOLERANCE)
            processed += 1
    assert processed == 2


@pytest.mark.slow
def test_exports_load_where_lotlip_hf_cannot_be_imported(tmp_path: Path) -> None:
    """With the installed transformers and with the oldest."""
    found = prepare(tmp_path)
    for interpreter, version in (
        (sys.executable, transformers.__version__),
        (oldest.python(), oldest.oldest_version()),
    ):
        run_stock_only(interpreter, version, tmp_path, list(found))
        compare_answers(tmp_path, found)
        for file in tmp_path.glob("*/answers.safetensors"):
            file.unlink()


def test_the_official_model(official_checkpoint: Path, golden: Path, tmp_path: Path) -> None:
    """What the official code answered, given by stock classes: corner ids out of the texts, and plain masks."""
    convert(official_checkpoint, tmp_path / "stock")
    model = AutoModel.from_pretrained(tmp_path / "stock")
    expected = load_file(golden / "official-corners2" / "expected.safetensors")
    tolerance = {"atol": 1e-5, "rtol": 0}
    with torch.no_grad():
        images = model.get_image_features(expected["pixel_values"]).pooler_output
        torch.testing.assert_close(images, expected["image_features"], **tolerance)
        for name in ("short", "long"):
            ids = expected[f"{name}_input_ids"]
            ids = torch.cat([ids[:, :1], ids[:, 3:]], dim=1)
            features = model.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
            torch.testing.assert_close(features, expected[f"{name}_text_features"], **tolerance)
    torch.testing.assert_close(model.logit_scale.exp(), expected["logit_scale_exp"].reshape(()), **tolerance)


# Tokenizers

BACKENDS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertTokenizer(vocab=str(GOLDEN / "vocab.txt")),
    "cased bert": lambda: BertTokenizer(vocab=str(GOLDEN / "vocab.txt"), do_lower_case=False),
    "roberta": toy_roberta,
    "xlm-roberta": toy_xlm_roberta,
}
HARD = [
    *PIECES,
    *("</s>", "<s>", "<mask>", "<pad>", " </s> ", "[sep]", "\u0301", " .", ".  ", "... ", ". . ", ".\n", "\u2014"),
]


@pytest.mark.slow
@pytest.mark.parametrize("split_special_tokens", [True, False])
@pytest.mark.parametrize("split_sentences", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_are_lotlips_without_cleaning(
    backend: str, split_sentences: bool, split_special_tokens: bool, tmp_path: Path
) -> None:
    ours = LoTLIPTokenizer.from_backbone_tokenizer(
        BACKENDS[backend](),
        clean_text=False,
        split_sentences=split_sentences,
        split_special_tokens=split_special_tokens,
        model_max_length=40,
    )
    stock_tokenizer(ours).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__module__.startswith("transformers.")
    assert theirs.model_max_length == 40
    assert theirs.special_tokens_map == ours.special_tokens_map
    assert len(theirs) == len(ours)
    special = list(ours.special_tokens_map.values())
    texts = sorted({*random_texts(600, HARD, seed=2), *TEXTS, *special, *(f"{name} " for name in special), "a" * 99})
    differing = set()
    for settings in ({"truncation": False}, {"truncation": True, "padding": True}):
        expected, given = (one(texts, verbose=False, **settings) for one in (ours, theirs))
        assert expected.keys() == given.keys() == {"input_ids", "attention_mask"}
        rows = zip(texts, expected["input_ids"], given["input_ids"], strict=True)
        differing |= {text for text, one, other in rows if one != other}
    # The one case that cannot be told apart, as the docstring says
    assert differing == (set(special) if split_special_tokens else set())


@pytest.mark.slow
@pytest.mark.parametrize("mark", ["\u2e3b\u2e3a0\u2e3a\u2e3b", "\u2e3b\u2e3a102\u2e3a\u2e3b", "\u2e3b \u2e3a"])
def test_no_text_writes_a_special_token(mark: str) -> None:
    """Not even one that holds what stands for it inside the tokenizer."""
    ours = LoTLIPTokenizer.from_pretrained(GOLDEN, clean_text=False)
    text = f"a{mark}b. c"
    assert stock_tokenizer(ours)(text)["input_ids"] == ours(text)["input_ids"]
    for backend in (toy_roberta, toy_xlm_roberta):
        theirs = stock_tokenizer(LoTLIPTokenizer.from_backbone_tokenizer(backend(), clean_text=False))
        assert theirs(text)["input_ids"].count(theirs.sep_token_id) == 2


def test_padding_is_on_the_right() -> None:
    ours = LoTLIPTokenizer.from_pretrained(GOLDEN, clean_text=False, padding_side="left", truncation_side="left")
    theirs = stock_tokenizer(ours)
    assert (theirs.padding_side, theirs.truncation_side) == ("right", "left")
    with pytest.raises(ConversionError, match="clean_text"):
        stock_tokenizer(LoTLIPTokenizer.from_pretrained(GOLDEN))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A BERT and ViT model with LoTLIP's processor."""
    config = tiny.config("bert", "vit")
    config.text_config.vocab_size = 30522
    lotlip(LoTLIPModel(config), tmp_path / "lotlip")
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN)
    LoTLIPProcessor(official_image_processor(32), tokenizer).save_pretrained(tmp_path / "lotlip")
    return tmp_path / "lotlip"


def test_a_tokenizer_that_cleans_is_left_out(checkpoint: Path, tmp_path: Path) -> None:
    written = convert(checkpoint, tmp_path / "stock")
    assert written.processor.startswith("CLIPImageProcessor")
    assert "--without-text-cleaning" in written.processor
    assert {path.name for path in (tmp_path / "stock").iterdir()} == {
        *("config.json", "model.safetensors", "preprocessor_config.json")
    }
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path / "stock"), type(official_image_processor()))


@pytest.mark.slow
def test_without_text_cleaning(checkpoint: Path, tmp_path: Path) -> None:
    written = convert(checkpoint, tmp_path / "stock", without_text_cleaning=True)
    assert written.processor == "VisionTextDualEncoderProcessor"
    processor = AutoProcessor.from_pretrained(tmp_path / "stock")
    assert type(processor) is VisionTextDualEncoderProcessor
    # the model's positions where the tokenizer itself had no limit
    assert processor.tokenizer.model_max_length == 38
    settings = {"padding": True, "truncation": True, "return_tensors": "pt"}
    texts = ["A cat sleeps. It is [SEP] old. &amp;  x", "a dog " * 50]
    ours = LoTLIPProcessor.from_pretrained(checkpoint)
    ours.tokenizer.clean_text, ours.tokenizer.model_max_length = False, 38
    with Image.open(IMAGE) as image:
        expected = ours(text=texts, images=image, verbose=False, **settings)
        given = processor(text=texts, images=image, **settings)
    assert expected.keys() == given.keys()
    assert all(torch.equal(expected[name], given[name]) for name in expected)


def test_a_stock_tokenizer_stays(tmp_path: Path) -> None:
    lotlip(LoTLIPTextModel(tiny.text_config(vocab_size=30522)), tmp_path / "lotlip")
    BertTokenizer(vocab=str(GOLDEN / "vocab.txt"), padding_side="left").save_pretrained(tmp_path / "lotlip")
    assert convert(tmp_path / "lotlip", tmp_path / "stock").processor == "BertTokenizer"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "stock")
    assert (type(tokenizer), tokenizer.model_max_length, tokenizer.padding_side) == (BertTokenizer, 38, "right")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["bert", "roberta", "xlm-roberta", "clip"])
def test_auto_tokenizer_beside_an_encoder_of_the_same_kind(backend: str, tmp_path: Path) -> None:
    """`AutoTokenizer` builds no tokenizer of its own for the encoder's type: `tokenizer.json` is taken as it is."""
    text_config = tiny.text_config(backend, vocab_size=31000)
    lotlip(LoTLIPTextModel(text_config), tmp_path / "lotlip")
    stock_backend = tiny_clip.clip_tokenizer() if backend == "clip" else BACKENDS[backend]()
    ours = LoTLIPTokenizer.from_backbone_tokenizer(
        stock_backend,
        clean_text=False,
        split_sentences=backend != "clip",
        model_max_length=text_config.max_position_embeddings,
    )
    ours.save_pretrained(tmp_path / "lotlip")
    assert convert(tmp_path / "lotlip", tmp_path / "stock").processor == "TokenizersBackend"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "stock")
    assert type(theirs).__module__.startswith("transformers.")
    special = set(ours.special_tokens_map.values())
    for text in {*random_texts(300, HARD, seed=5), *TEXTS, *tiny_clip.texts()} - special:
        assert theirs(text, truncation=True)["input_ids"] == ours(text, truncation=True, verbose=False)["input_ids"]


def test_ids_that_would_differ_are_said(tmp_path: Path) -> None:
    """A normaliser that strips every sentence cannot be one that strips the whole text."""
    lotlip(LoTLIPTextModel(tiny.text_config("roberta")), tmp_path / "lotlip")
    pieces = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")] + [(one, -1.0) for one in "▁abcest.D"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=3))
    backend.normalizer, backend.pre_tokenizer = normalizers.Strip(), pre_tokenizers.Metaspace()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
    LoTLIPTokenizer(tokenizer_object=backend, clean_text=False, **names).save_pretrained(tmp_path / "lotlip")
    written = convert(tmp_path / "lotlip", tmp_path / "stock")
    assert "no tokenizer" in written.processor
    assert not (tmp_path / "stock" / "tokenizer.json").exists()


@pytest.mark.slow
def test_tokens_of_ones_own_stay_tokens(tmp_path: Path) -> None:
    ours = LoTLIPTokenizer.from_pretrained(GOLDEN, clean_text=False)
    ours.add_tokens([AddedToken("<thing>", normalized=False), "zebrafish"])
    ours.add_special_tokens({"extra_special_tokens": ["<image>"]})
    stock_tokenizer(ours).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a <thing>. <image> Zebrafish", "zebrafish<image>. ", "<image> a"):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert "<thing>" in theirs.tokenize("a <thing>")


# The command line, and what it refuses


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def error(model: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of an export that fails, after which everything is as it was."""
    before = snapshot(output.parent)
    capsys.readouterr()
    assert stock.main(["--model", str(model), "--output", str(output)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("lotlip convert stock: error: ")
    assert "Traceback" not in printed.err
    assert snapshot(output.parent) == before
    return printed.err


@pytest.mark.slow
def test_command_line(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "stock"
    before = snapshot(checkpoint)
    assert stock.main(["--model", str(checkpoint), "--output", str(output), "--without-text-cleaning"]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert str(output) in printed.out
    assert "VisionTextDualEncoderProcessor" in printed.out
    assert snapshot(checkpoint) == before
    assert [path.name for path in output.parent.iterdir()] == ["stock"]


@pytest.mark.slow
def test_nothing_in_the_folder_is_ours(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "stock", without_text_cleaning=True)
    files = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "stock").glob("*.json")}
    assert set(files) == {"config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    for name, content in files.items():
        assert "lotlip" not in content.lower(), name
        assert "auto_map" not in content, name
        assert str(tmp_path) not in content, name
    config = json.loads(files["config.json"])
    assert config["architectures"] == ["VisionTextDualEncoderModel"]
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_options_for_one_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = dual_encoder(tiny.text_config(pooling="mean"), tiny.vision_config("clip"), tmp_path / "lotlip")
    assert "--text-only" in error(tmp_path / "lotlip", tmp_path / "stock", capsys)
    assert convert(tmp_path / "lotlip", tmp_path / "text", tower="text").model_class == "BertModel"
    written = convert(tmp_path / "lotlip", tmp_path / "vision", tower="vision")
    assert written.model_class == "CLIPVisionModelWithProjection"
    lotlip(model.text_model, tmp_path / "tower")
    with pytest.raises(ConversionError, match="--text-only"):
        convert(tmp_path / "tower", tmp_path / "stock", tower="text")


@pytest.mark.parametrize("case", ["missing", "clip", "incomplete", "tokenizer.json"])
def test_what_cannot_be_exported(
    case: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, word = tmp_path / case, case
    if case == "clip":
        tiny_clip.save_clip(model)
    elif case == "incomplete":
        weights = load_file(checkpoint / "model.safetensors")
        word = "text_model.corner_embeds"
        del weights[word]
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        model = checkpoint
    elif case == "tokenizer.json":
        (checkpoint / case).write_text("{", encoding="utf-8")
        model, word = checkpoint, "tokenizer"
    assert word in error(model, tmp_path / "stock", capsys)


def test_features_that_differ_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export whose weights are off by a little: the comparison sees it, and nothing is written."""
    right = stock.stock_model

    def wrong(model: PreTrainedModel) -> PreTrainedModel:
        exported = right(model)
        with torch.no_grad():
            # one row of the shared table would change the LoTLIP with it
            exported.text_projection.weight = torch.nn.Parameter(exported.text_projection.weight * 1.00001)
        return exported

    monkeypatch.setattr(stock, "stock_model", wrong)
    assert "differs" in error(checkpoint, tmp_path / "stock", capsys)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = lotlip(LoTLIPModel(tiny.config("bert", "vit")), tmp_path / "lotlip")
    with torch.no_grad():
        model.text_projection.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "lotlip")
    assert "nan" in error(tmp_path / "lotlip", tmp_path / "stock", capsys)


@pytest.mark.slow
def test_remote_code_of_the_checkpoint_stays_behind(tmp_path: Path) -> None:
    lotlip(LoTLIPModel(tiny.config("clip", "clip")), tmp_path / "lotlip")
    stock_backend = tiny_clip.clip_tokenizer()
    stock_backend = LoTLIPTokenizer.from_backbone_tokenizer(stock_backend, clean_text=False, split_sentences=False)
    LoTLIPProcessor(official_image_processor(32), stock_backend).save_pretrained(tmp_path / "lotlip")
    code = {"AutoModel": "modeling_lotlip.LoTLIPModel", "AutoProcessor": "processing_lotlip.LoTLIPProcessor"}
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        settings = json.loads((tmp_path / "lotlip" / name).read_text())
        settings["auto_map"] = code
        if "image_processor" in settings:
            settings["image_processor"]["auto_map"] = code
        if "vision_config" in settings:
            settings["vision_config"]["backbone_config"]["auto_map"] = code
        (tmp_path / "lotlip" / name).write_text(json.dumps(settings))
    assert convert(tmp_path / "lotlip", tmp_path / "stock").processor == "CLIPProcessor"
    for path in (tmp_path / "stock").glob("*.json"):
        assert "auto_map" not in path.read_text(encoding="utf-8"), path.name
    assert type(AutoProcessor.from_pretrained(tmp_path / "stock")) is CLIPProcessor
