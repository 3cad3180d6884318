"""A model of the released size goes through the whole conversion, and answers as stock transformers does."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel, ViTConfig, ViTModel
from transformers.initialization import no_init_weights

from lotlip_hf import Encoder, LoTLIPConfig, LoTLIPModel
from lotlip_hf.conversion.official import RELEASED, main, to_official

pytestmark = pytest.mark.slow

TOLERANCE = {"atol": 1e-5, "rtol": 0}
CORNERS, MAX_LENGTH = 2, 126
TEXTS = [
    "a cat",
    "A tram waits at a stop in a wide square. Two passengers are getting on, and a dog watches them.",
    "A page of a sketchbook shows six studies of the same teapot. " * 20,
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Iterator[Path]:
    """Converted from a `model.pt` of the released size; the weights are random, every one another."""
    temporary = tmp_path_factory.mktemp("full-size")
    checkpoint, config, output = temporary / "model.pt", temporary / "open_clip_config.json", temporary / "output"
    try:
        torch.manual_seed(0)
        with no_init_weights():
            model = LoTLIPModel(LoTLIPConfig())
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # biases and norms too
                is_norm_weight = name.endswith("weight") and parameter.dim() == 1
                parameter.normal_(mean=float(is_norm_weight), std=0.025)
        torch.save({"state_dict": {f"module.{name}": t for name, t in to_official(model).items()}}, checkpoint)
        del model
        config.write_text(json.dumps(RELEASED["weiwu-ww/LoTLIP-ViT-B-16-100M"]))

        arguments = ["--checkpoint", str(checkpoint), "--open-clip-config", str(config), "--output", str(output)]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            assert main([*arguments, "--tokenizer", str(golden / "tokenizer")]) == 0
        assert err.getvalue() == ""
        assert f"2 corner tokens, texts of up to {MAX_LENGTH} tokens, images of 224 x 224 pixels" in out.getvalue()
        yield output
    finally:
        shutil.rmtree(temporary)  # 1.6 GB


def test_a_model_of_the_released_size(converted: Path) -> None:
    model = AutoModel.from_pretrained(converted).eval()
    processor = AutoProcessor.from_pretrained(converted)
    assert type(model) is LoTLIPModel
    assert model.num_parameters() > 190_000_000
    assert processor.tokenizer.model_max_length == MAX_LENGTH
    images = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
        for seed, size in enumerate([(240, 320), (500, 224)])
    ]

    text_embeds = Encoder(model, processor).encode_texts(TEXTS, progress=False)
    image_embeds = Encoder(model, processor).encode_images(images, progress=False)
    batch = processor(text=TEXTS, images=images, return_tensors="pt", verbose=False)
    assert batch.input_ids.shape == (len(TEXTS), MAX_LENGTH)

    # BERT with the words' positions moved on by the corner tokens' places, and a ViT
    weights = model.state_dict()
    with no_init_weights():
        bert = BertModel(BertConfig()).eval()
        vit = ViTModel(ViTConfig(layer_norm_eps=1e-6), add_pooling_layer=False).eval()
    bert.load_state_dict(part(weights, "text_model.backbone."), assign=True)
    vit.load_state_dict(part(weights, "vision_model.backbone."), assign=True)
    position_ids = torch.arange(MAX_LENGTH) + CORNERS
    position_ids[0] = 0
    with torch.inference_mode():
        pooled = bert(batch.input_ids, batch.attention_mask, position_ids=position_ids[None]).pooler_output
        expected_text = torch.nn.functional.normalize(pooled @ weights["text_projection.weight"].T, dim=-1)
        expected_image = torch.nn.functional.normalize(vit(batch.pixel_values).last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(text_embeds, expected_text, **TOLERANCE)
    torch.testing.assert_close(image_embeds, expected_image, **TOLERANCE)
    # the features tell the inputs apart, so that equality means something
    assert (text_embeds @ text_embeds.T - torch.eye(len(TEXTS))).abs().max() < 0.999
    assert not torch.allclose(image_embeds[0], image_embeds[1], atol=1e-2)


def part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
