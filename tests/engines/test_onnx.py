"""ONNX: both towers answer as in PyTorch at any size of batch and text; what does not is refused."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from onnx import numpy_helper
from PIL import Image
from torch.onnx._internal.exporter import _onnx_program
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

import lotlip_hf.engines.exported
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
    LoTLIPVisionModelWithProjection,
    load_encoder,
)
from lotlip_hf.cli import main as lotlip
from lotlip_hf.conversion import clip as clip_conversion
from lotlip_hf.conversion import onnx as onnx_conversion
from lotlip_hf.conversion.common import ConversionError
from lotlip_hf.conversion.onnx import convert, main
from lotlip_hf.engines.exported import load_exported
from lotlip_hf.engines.onnx import open_tower
from lotlip_hf.images import official_image_processor

pytestmark = pytest.mark.slow

# Of normalised embeddings, which is what the engine promises; what the towers give is a hundred times closer.
TOLERANCE = {"atol": 1e-5, "rtol": 0}
FEATURES = {"atol": 1e-5, "rtol": 1e-5}
TEXTS = [
    "",
    "A cat.",
    "The red car stands in front of a house. A dog looks at it &amp; barks. Nobody is there.",
    "a photo of the house " * 60,
]


def exported_once(checkpoint: Path, name: str, base: Path) -> Path:
    """An export of a checkpoint, which takes seconds; of the processes that run the tests one makes it."""
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            convert(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def clip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoTLIP over CLIP's towers, with more positions than CLIP had."""
    folder = tmp_path_factory.mktemp("clip")
    one_layer = {"num_hidden_layers": 1}
    tiny_clip.save_clip(folder / "clip", tiny_clip.clip_model(tiny_clip.clip_config(one_layer, one_layer)))
    clip_conversion.convert(folder / "clip", folder / "lotlip", num_corner_tokens=2, max_positions=90)
    return folder / "lotlip"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, official_checkpoint: Path) -> Path:
    """BERT and ViT in ONNX."""
    return exported_once(official_checkpoint, "onnx-official", tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", params=["official", "clip"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Encoder]:
    """The same in PyTorch and in ONNX."""
    checkpoint = request.getfixturevalue(f"{request.param}_checkpoint")
    folder = exported_once(checkpoint, f"onnx-{request.param}", tmp_path_factory.getbasetemp())
    return load_encoder(checkpoint, device="cpu"), load_encoder(folder)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """A folder with the model, its weights random, norms and biases included."""
    tiny_clip.random_weights(model)
    model.eval().save_pretrained(folder)
    return folder


def padded_texts(config: Any, lengths: list[int], width: int, side: str) -> dict[str, torch.Tensor]:
    """Random texts of the given lengths, with CLIP's end where the backbone is CLIP's."""
    input_ids = torch.randint(7, config.vocab_size - 2, (len(lengths), width))
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        span = slice(0, length) if side == "right" else slice(width - length, width)
        mask[row, span] = 1
        if config.family.is_causal:
            input_ids[row, span.stop - 1] = config.eos_token_id
    return {"input_ids": input_ids, "attention_mask": mask}


def features(run: Callable[[dict[str, np.ndarray]], np.ndarray], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a tower computes for tensors."""
    return torch.from_numpy(run({name: values.numpy() for name, values in batch.items()}))


def test_texts_and_images_are_encoded_as_in_pytorch(pair: tuple[Encoder, Encoder], golden: Path) -> None:
    encoder, exported = pair
    pictures = sorted((golden / "images").glob("*.png"))
    for batch_size in (1, 3):
        options = {"batch_size": batch_size, "progress": False}
        texts, images = exported.encode_texts(TEXTS, **options), exported.encode_images(pictures, **options)
        torch.testing.assert_close(texts, encoder.encode_texts(TEXTS, **options), **TOLERANCE)
        torch.testing.assert_close(images, encoder.encode_images(pictures, **options), **TOLERANCE)
    # texts and images differ by far more than the tolerance
    assert (texts[1] - texts[2]).abs().max() > 1e-3
    assert (images[0] - images[1]).abs().max() > 1e-3


@torch.no_grad()
def test_features_are_pytorchs_for_any_batch_length_and_padding(pair: tuple[Encoder, Encoder]) -> None:
    (_, model), engine = pair[0].lotlip(), pair[1].engine
    config = model.config.text_config
    limit = config.max_position_embeddings
    sizes = [([1], 1), ([2], 2), ([2, 1], 2), ([limit, 1, 2, 30], limit), ([limit, 5], limit + 4), ([9] * 6, 9)]
    for (lengths, width), side in itertools.product(sizes, ("right", "left")):
        batch = padded_texts(config, lengths, width, side)
        expected = model.get_text_features(**batch).pooler_output
        torch.testing.assert_close(features(partial(engine.features, "text"), batch), expected, **FEATURES)
    size = model.config.vision_config.image_size
    for count in (1, 4):
        batch = {"pixel_values": torch.randn(count, 3, size, size)}
        expected = model.get_image_features(**batch).pooler_output
        torch.testing.assert_close(features(partial(engine.features, "image"), batch), expected, **FEATURES)


def test_the_files_say_what_they_are(exported: Path, official_checkpoint: Path, repository: Path) -> None:
    config = AutoConfig.from_pretrained(official_checkpoint)
    size = config.vision_config.image_size
    inputs = {
        "text_model.onnx": {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]},
        "vision_model.onnx": {"pixel_values": ["batch", 3, size, size]},
    }
    for name, expected in inputs.items():
        session = onnxruntime.InferenceSession(exported / name, providers=["CPUExecutionProvider"])
        assert {one.name: one.shape for one in session.get_inputs()} == expected
        (output,) = session.get_outputs()
        assert output.name == ("text_embeds" if name.startswith("text") else "image_embeds")
        assert output.shape == ["batch", config.projection_dim]
        graph = onnx.load(exported / name)
        onnx.checker.check_model(graph, full_check=True)
        operators = {one.domain: one.version for one in graph.opset_import}
        assert operators == {"": 23}  # none of ONNX Runtime's own
        assert str(repository).encode() not in (exported / name).read_bytes()
        # neither corner tokens nor the other tower
        other = "vision" if name.startswith("text") else "text"
        assert not [one.name for one in graph.graph.initializer if "corner" in one.name or other in one.name]


def test_int8_with_weights_beside_the_graph(
    tmp_path: Path,
    official_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 0)  # as if they had more than 2 GB
    arguments = ["--model", str(official_checkpoint), "--output", str(tmp_path / "made"), "--vision-only"]
    assert main([*arguments, "--quantize", "int8"]) == 0
    out, err = capsys.readouterr()
    assert all(word in out for word in ("vision_model.onnx", "int8", "LoTLIPProcessor"))
    assert err == ""

    folder = tmp_path / "moved"
    (tmp_path / "made").rename(folder)
    files = [folder / "vision_model.onnx", folder / "vision_model.onnx.data"]
    assert sorted(folder.glob("*.onnx*")) == files
    encoder, own = load_encoder(folder), load_encoder(official_checkpoint, device="cpu")
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)) for _ in range(4)]
    given, expected = (one.encode_images(images, progress=False) for one in (encoder, own))
    assert ((given * expected).sum(-1) > 0.98).all()
    assert not torch.allclose(given, expected, **TOLERANCE)  # it is quantised
    with pytest.raises(ValueError, match=r"text_model\.onnx"):
        encoder.encode_texts(TEXTS, progress=False)

    graph = onnx.load(files[0]).graph
    weights = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    layers = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert not [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and set(node.input) & set(weights)]
    assert len(layers) >= 12
    for layer in layers:
        weight, zero_point = weights[layer.input[1]], weights[layer.input[3]]
        assert weight.dtype == np.int8
        assert abs(weight.astype(int)).max() <= 64  # 7 bits
        assert zero_point.shape == weight.shape[1:]  # for each channel its own

    # a fingerprint knows the weights, wherever they are
    before = encoder.fingerprint("image")
    data = bytearray(files[1].read_bytes())
    data[0] ^= 1
    files[1].write_bytes(data)
    assert encoder.fingerprint("image") != before


def test_what_an_index_knows_an_export_by(tmp_path: Path, exported: Path, official_checkpoint: Path) -> None:
    encoder, own = load_encoder(exported), load_encoder(official_checkpoint, device="cpu")
    elsewhere = load_encoder(shutil.copytree(exported, tmp_path / "elsewhere"))
    names = [[one.fingerprint(modality) for modality in ("image", "text")] for one in (encoder, elsewhere, own)]
    assert names[0] == names[1]
    assert len({*names[0], *names[2]}) == 4
    assert (encoder.name, encoder.revision) == (str(exported), None)
    assert encoder.versions == {"onnxruntime": onnxruntime.__version__}
    with pytest.raises(ValueError, match="`revision`"):
        load_encoder(exported, revision="main")


def test_a_tower_by_itself_in_half_precision(tmp_path: Path) -> None:
    model = LoTLIPTextModel(tiny.text_config("clip", num_hidden_layers=1))
    tiny_clip.random_weights(model)
    model.bfloat16().eval().save_pretrained(tmp_path / "tower")
    written = convert(tmp_path / "tower", tmp_path / "onnx")
    assert [tower.file for tower in written.towers] == ["text_model.onnx"]
    assert written.towers[0].difference < 1e-6
    assert written.processor == ()
    run = open_tower(tmp_path / "onnx", "text")
    model.float()
    for lengths, width, side in (([1], 1, "right"), ([8, 3], 8, "right"), ([40, 2, 5], 43, "left")):
        batch = padded_texts(model.config, lengths, width, side)
        with torch.no_grad():
            expected = model(**batch).pooler_output
        torch.testing.assert_close(features(run, batch), expected, **FEATURES)
    with pytest.raises(ConversionError, match="vision"):
        convert(tmp_path / "tower", tmp_path / "other", towers=("vision",))
    assert not (tmp_path / "other").exists()


def test_the_first_version_of_operators(tmp_path: Path) -> None:
    folder = saved(LoTLIPModel(tiny.config("roberta", "siglip", num_hidden_layers=1)), tmp_path / "checkpoint")
    written = convert(folder, tmp_path / "onnx", quantize="int8", opset=18)
    assert [tower.file for tower in written.towers] == ["text_model.onnx", "vision_model.onnx"]
    for tower in written.towers:
        assert tower.difference < 1e-6
        assert tower.cosine > 0.98
        assert onnx.load(tmp_path / "onnx" / tower.file).opset_import[0].version == 18


@pytest.mark.parametrize(
    ("name", "changes", "fields", "quantize"),
    [
        ("modernbert", {}, {"projection": "residual_mlp", "projection_layers": 1, "pooling": "mean"}, "int8"),
        ("deberta-v2", {"num_hidden_layers": 1}, {}, None),
        ("t5", {"num_layers": 1}, {}, None),
        ("llama", {"num_hidden_layers": 1}, {"attention": "bidirectional", "pooling": "weighted_mean"}, None),
        ("llama", {}, {"token_prepending": (1, 1), "placeholder_token_id": 7}, None),
    ],
)
def test_families_of_text_encoders(
    tmp_path: Path, name: str, changes: dict[str, int], fields: dict[str, Any], quantize: str | None
) -> None:
    """One of each kind of positions: rotary and windows, relative in two ways, decoders."""
    backbone_config = tiny_families.FAMILIES[name].stock_config(**changes)
    config = LoTLIPTextConfig(backbone_config=backbone_config, projection_dim=24, **fields)
    model = tiny_families.spread(LoTLIPTextModelWithProjection(config))
    model.save_pretrained(tmp_path / "tower")
    written = convert(tmp_path / "tower", tmp_path / "onnx", quantize=quantize)
    assert written.towers[0].difference < 1e-5
    if quantize is not None:
        return
    run = open_tower(tmp_path / "onnx", "text")
    for lengths, width, side in (([1], 1, "right"), ([8, 3], 8, "right"), ([20, 2, 5], 23, "left")):
        batch = padded_texts(config, lengths, width, side)
        with torch.no_grad():
            expected = model(**batch).text_embeds
        torch.testing.assert_close(features(run, batch), expected, **FEATURES)


@pytest.mark.parametrize(
    ("name", "pooling", "layers"),
    [
        ("dinov2_with_registers", "cls+mean", 2),
        ("dinov3_vit", "mean", 1),
        ("convnext", "pooler", 1),
        ("vit_tiny_patch16_224", "pooler", 1),
    ],
)
def test_families_of_image_encoders(tmp_path: Path, name: str, pooling: str, layers: int) -> None:
    (family,) = (one for one in tiny_vision.FAMILIES if one.name == name)
    model = LoTLIPVisionModelWithProjection(family.config(pooling=pooling, pooled_layers=layers, projection_dim=24))
    saved(model, tmp_path / "tower")
    assert convert(tmp_path / "tower", tmp_path / "onnx").towers[0].difference < 1e-5
    run = open_tower(tmp_path / "onnx", "vision")
    any_size = model.config.family.any_size_in_onnx
    for size in [(32, 32), (48, 24)] if any_size else [(32, 32)]:
        images = torch.randn(3, 3, *size)
        with torch.no_grad():
            expected = model(images).image_embeds
        torch.testing.assert_close(features(run, {"pixel_values": images}), expected, **FEATURES)


def test_a_family_that_has_no_graph(tmp_path: Path) -> None:
    (family,) = (one for one in tiny_vision.FAMILIES if one.name == "siglip2_vision_model")
    saved(LoTLIPVisionModelWithProjection(family.config(projection_dim=24)), tmp_path / "tower")
    with pytest.raises(ConversionError, match="siglip2_vision_model"):
        convert(tmp_path / "tower", tmp_path / "onnx")


def with_processor(model: LoTLIPModel, folder: Path, official_checkpoint: Path, side: int) -> Path:
    """A checkpoint whose processor makes images of so many pixels."""
    tokenizer = AutoProcessor.from_pretrained(official_checkpoint).tokenizer
    processor = LoTLIPProcessor(official_image_processor(side), tokenizer)
    processor.save_pretrained(saved(model, folder))
    return folder


def test_a_dinov2_takes_what_its_processor_makes(tmp_path: Path, official_checkpoint: Path, golden: Path) -> None:
    """Its configuration says 32, as the published ones say 518; processors make 24 and, for the one in int8, 40."""
    text_config = LoTLIPModel.from_pretrained(official_checkpoint).config.text_config
    vision_config = tiny.vision_config("dinov2", num_hidden_layers=1)
    model = LoTLIPModel(LoTLIPConfig(text_config=text_config, vision_config=vision_config))
    folders = [with_processor(model, tmp_path / str(side), official_checkpoint, side) for side in (24, 40)]
    convert(folders[0], tmp_path / "onnx", towers=("vision",))
    convert(folders[1], tmp_path / "int8", towers=("vision",), quantize="int8", opset=25)
    assert onnx.load(tmp_path / "int8" / "vision_model.onnx").opset_import[0].version == 25
    images = sorted((golden / "images").glob("*.png"))[:3]
    exported, quantised = load_encoder(tmp_path / "onnx"), load_encoder(tmp_path / "int8")
    expected = load_encoder(folders[0], device="cpu").encode_images(images, progress=False)
    torch.testing.assert_close(exported.encode_images(images, progress=False), expected, **TOLERANCE)
    expected = load_encoder(folders[1], device="cpu").encode_images(images, progress=False)
    assert (quantised.encode_images(images, progress=False) * expected).sum(-1).min() > 0.98
    for size in ((32, 32), (40, 40), (8, 16), (48, 24)):
        pixel_values = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model.get_image_features(pixel_values).pooler_output
        answer = features(partial(exported.engine.features, "image"), {"pixel_values": pixel_values})
        torch.testing.assert_close(answer, expected, **FEATURES)


# Refused: nothing is written


def test_images_that_the_tower_does_not_take(tmp_path: Path, official_checkpoint: Path, exported: Path) -> None:
    model = LoTLIPModel.from_pretrained(official_checkpoint)
    folder = with_processor(model, tmp_path / "checkpoint", official_checkpoint, 24)
    with pytest.raises(ConversionError, match=r"vision tower.*\[24, 24\]"):
        convert(folder, tmp_path / "onnx", towers=("vision",))
    assert not (tmp_path / "onnx").exists()
    shutil.copytree(exported, tmp_path / "old")
    shutil.copy(folder / "processor_config.json", tmp_path / "old")
    with pytest.raises(ValueError, match=r"vision_model\.onnx: .*24.*32.*Export"):
        load_encoder(tmp_path / "old").encode_images([Image.new("RGB", (40, 40))], progress=False)


@pytest.mark.parametrize("other", ["one percent more", "not a number"])
def test_a_graph_that_differs_is_refused(
    tmp_path: Path, official_checkpoint: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    model = LoTLIPModel.from_pretrained(official_checkpoint)
    with torch.no_grad():
        for parameter in model.vision_model.parameters():
            parameter.mul_(1.01 if other == "one percent more" else float("nan"))
    model.save_pretrained(tmp_path / "checkpoint")
    # the exporter writes the graph of the model as it was before
    monkeypatch.setattr(onnx_conversion, "_export", lambda *_: shutil.copy(exported / _[-1].name, _[-1]))
    with pytest.raises(ConversionError, match=r"vision_model\.onnx"):
        convert(tmp_path / "checkpoint", tmp_path / "onnx", towers=("vision",))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_int8_that_is_too_coarse_is_refused(tmp_path: Path) -> None:
    model = LoTLIPVisionModelWithProjection(tiny.vision_config(num_hidden_layers=1, projection_dim=24))
    tiny_clip.random_weights(model)
    # One state outshines the others, and is not read by the projection: of the others, 8 bits keep nothing.
    with torch.no_grad():
        model.vision_model.backbone.layernorm.bias[0] = 1e4
        model.visual_projection.weight[:, 0] = 0
    model.save_pretrained(tmp_path / "tower")
    with pytest.raises(ConversionError, match=r"vision_model\.onnx: .*--quantize"):
        convert(tmp_path / "tower", tmp_path / "onnx", quantize="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]


def test_wrong_arguments(tmp_path: Path, official_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    broken = shutil.copytree(official_checkpoint, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    output = tmp_path / "onnx"
    for arguments, options, message in (
        ((official_checkpoint, output), {"quantize": "int4"}, "--quantize"),
        ((tmp_path / "nowhere", output), {}, "nowhere"),
        ((official_checkpoint, tmp_path / "full"), {}, "full"),
        ((broken, output), {}, "broken"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            convert(*arguments, **options)
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: export(torch.nn.Linear(2, 2), (), dynamo=True))
    with pytest.raises(ConversionError, match=r"vision_model\.onnx"):
        convert(official_checkpoint, output, towers=("vision",))
    assert not output.exists()


def test_missing_packages_are_named_in_one_line(
    tmp_path: Path, official_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find(name: str) -> Any:
        return None if name in ("onnxscript", "onnxruntime") else find_spec(name)

    monkeypatch.setattr("lotlip_hf.conversion.towers.find_spec", find)
    monkeypatch.setattr(lotlip_hf.engines.exported, "find_spec", find)
    assert main(["--model", str(official_checkpoint), "--output", str(tmp_path / "onnx")]) == 2
    assert "onnxscript, onnxruntime: pip install 'lotlip-hf[onnx]'" in capsys.readouterr().err
    (tmp_path / "text_model.onnx").touch()
    with pytest.raises(ImportError, match=r"onnxruntime: pip install 'lotlip-hf\[onnx\]'"):
        load_encoder(tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tmp_path / "a"), "--output", str(tmp_path / "b")]
    assert main([*arguments, "--quantize", "int8"]) == 2
    assert str(tmp_path / "a") in capsys.readouterr().err
    assert main([*arguments, "--text-only", "--vision-only"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_commands_take_an_export(
    tmp_path: Path, exported: Path, official_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("A cat.\nA dog on a lawn. It barks.\n")
    for name, model in (("onnx", exported), ("torch", official_checkpoint)):
        files = ["--texts", str(tmp_path / "texts.txt"), "--output", str(tmp_path / f"{name}.parquet")]
        assert lotlip(["embed", "--model", str(model), *files]) == 0
    given, expected = (
        torch.tensor(pq.read_table(tmp_path / f"{name}.parquet")["embedding"].to_pylist())
        for name in ("onnx", "torch")
    )
    torch.testing.assert_close(given, expected, **TOLERANCE)
    assert lotlip(["embed", "--model", str(exported), *files, "--overwrite", "--device", "cuda"]) == 2
    assert "cuda" in capsys.readouterr().err


# The engine


def test_folders_that_cannot_be_opened(tmp_path: Path, exported: Path, official_checkpoint: Path) -> None:
    with pytest.raises(FileNotFoundError, match="lotlip convert onnx"):
        load_exported(str(official_checkpoint))
    broken = shutil.copytree(exported, tmp_path / "broken")
    (broken / "vision_model.onnx").write_bytes((exported / "vision_model.onnx").read_bytes()[:-100])
    encoder = load_encoder(broken)
    assert encoder.encode_texts(TEXTS, progress=False).shape == (len(TEXTS), encoder.dim)
    with pytest.raises(ValueError, match=r"vision_model\.onnx"):
        encoder.encode_images([Image.new("RGB", (40, 40))], progress=False)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_encoder(broken)
    (broken / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (broken / "tokenizer.json").write_bytes((exported / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=r"config\.json .*'clip'"):
        load_encoder(broken)


def test_it_stays_where_it_is(exported: Path) -> None:
    encoder = load_encoder(exported, device=torch.device("cpu"), dtype=torch.float32)
    assert (encoder.device, encoder.dtype) == (torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="bfloat16"):
        load_encoder(exported, dtype="bfloat16")
    with pytest.raises(ValueError, match="`device` 'nowhere'"):
        load_encoder(exported, device="nowhere")
    with pytest.raises(ValueError, match="not a LoTLIP"):
        list(encoder.iterate_texts(["a"], pooled=True))


# torch.export


# test_modeling.py has quick ones, of one tower
@pytest.mark.parametrize("backbone", ["bert", "clip"])
def test_the_dual_encoder_is_exported_by_torch_saved_and_loaded(tmp_path: Path, backbone: str) -> None:
    model = LoTLIPModel(tiny.config(backbone, "clip" if backbone == "clip" else "vit", num_hidden_layers=1)).eval()
    tiny_clip.random_weights(model)
    texts, images = torch.export.Dim("texts"), torch.export.Dim("images")
    length = torch.export.Dim("length", max=38)
    text_sizes = {0: texts, 1: length}
    sizes = {"input_ids": text_sizes, "attention_mask": text_sizes, "pixel_values": {0: images}}
    config = model.config.text_config
    example = {**padded_texts(config, [5, 9], 9, "right"), "pixel_values": tiny.pixel_values(3)}
    program = torch.export.export(model, (), example, dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "lotlip.pt2")
    loaded = torch.export.load(tmp_path / "lotlip.pt2").module()
    for lengths, width, side, count in (([3, 12, 7, 1], 12, "left", 2), ([30, 4, 2], 30, "right", 5)):
        batch = {**padded_texts(config, lengths, width, side), "pixel_values": tiny.pixel_values(count)}
        with torch.no_grad():
            expected, answer = model(**batch), loaded(**batch)
        for name in ("text_embeds", "image_embeds", "logits_per_image"):
            scale = model.logit_scale.exp().item() if name.startswith("logits") else 1
            torch.testing.assert_close(answer[name], expected[name], atol=1e-5 * scale, rtol=0)
