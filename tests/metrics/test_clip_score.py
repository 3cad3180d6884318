"""CLIPScore: the cosine of each pair, whatever the batches, for texts of any length that the model takes."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPProcessor

import tiny_clip
from lotlip_hf import Encoder, LoTLIPConfig, LoTLIPModel, LoTLIPTextConfig, LoTLIPVisionConfig
from lotlip_hf.images import ImageError
from lotlip_hf.loading import load_model
from lotlip_hf.metrics import clip_score

LONG = "a red car and the house of a dog " * 30
TEXTS = ["a cat", "", "the red house and the dog", "a photo of a car " * 6, "a dog", "cat", "x y z"]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = generator.integers(20, 60, (len(TEXTS) - 3, 2))
    noise = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    return noise + [Image.new("RGB", (40, 30), colour) for colour in ("black", "white", "red")]


@pytest.fixture(scope="module")
def processor() -> CLIPProcessor:
    return CLIPProcessor(tiny_clip.image_processor(), tiny_clip.clip_tokenizer())


def naive(pictures: list[Image.Image], texts: list[str], model: Any, processor: Any) -> torch.Tensor:
    scores = []
    for picture, text in zip(pictures, texts, strict=True):
        inputs = processor(text=[text], images=[picture], truncation=True, return_tensors="pt")
        with torch.no_grad():
            text_features = model.get_text_features(inputs.input_ids, inputs.attention_mask).pooler_output[0]
            image_features = model.get_image_features(inputs.pixel_values).pooler_output[0]
        cosine = torch.nn.functional.cosine_similarity(text_features, image_features, dim=0).item()
        scores.append(100 * max(cosine, 0.0))
    return torch.tensor(scores)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_scores_are_those_of_a_plain_loop(
    batch_size: int, pictures: list[Image.Image], official_checkpoint: Path
) -> None:
    model, processor = load_model(official_checkpoint, device="cpu")
    result = clip_score(pictures, TEXTS, Encoder(model, processor), batch_size=batch_size)
    expected = naive(pictures, TEXTS, model, processor)
    assert (expected > 0).any()
    assert (expected == 0).any()  # a pair below 0 is clipped by itself
    torch.testing.assert_close(result.scores, expected, atol=1e-4, rtol=0)
    assert result.mean == pytest.approx(expected.mean().item(), abs=1e-4)
    assert result.num_truncated == 0


def test_a_folder_gives_what_its_model_gives(pictures: list[Image.Image], official_checkpoint: Path) -> None:
    model, processor = load_model(official_checkpoint, device="cpu")
    by_folder = clip_score(iter(pictures), iter(TEXTS), official_checkpoint, device="cpu")
    expected = clip_score(pictures, TEXTS, Encoder(model, processor)).scores
    torch.testing.assert_close(by_folder.scores, expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="`processor` is read from the folder"):
        clip_score(pictures, TEXTS, Encoder(official_checkpoint, processor))


def test_clip_towers_score_as_the_stock_clip_does(pictures: list[Image.Image], processor: CLIPProcessor) -> None:
    clip = tiny_clip.clip_model()
    config = LoTLIPConfig(
        text_config=LoTLIPTextConfig(backbone_config=clip.config.text_config.to_dict()),
        vision_config=LoTLIPVisionConfig(backbone_config=clip.config.vision_config.to_dict(), pooling="pooler"),
        projection_dim=clip.config.projection_dim,
    )
    model = LoTLIPModel(config).eval()
    for name in ("text", "vision"):
        getattr(model, f"{name}_model").backbone.load_state_dict(getattr(clip, f"{name}_model").state_dict())
    for name in ("text_projection", "visual_projection"):
        getattr(model, name).load_state_dict(getattr(clip, name).state_dict())

    texts = [text for text in TEXTS if len(text) < 30]
    pictures = pictures[: len(texts)]
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = clip(**inputs)
    expected = 100 * (outputs.logits_per_image.diagonal() / clip.logit_scale.exp()).clamp(min=0)
    assert (expected > 0).any()
    for scored in (model, clip):
        torch.testing.assert_close(
            clip_score(pictures, texts, Encoder(scored, processor)).scores, expected.detach(), atol=1e-4, rtol=0
        )


def test_texts_that_are_cut_are_counted(
    pictures: list[Image.Image], processor: CLIPProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    clip = tiny_clip.clip_model()
    texts = [LONG, "a cat", LONG, LONG + "cat"]
    with caplog.at_level(logging.WARNING):
        result = clip_score(pictures[:4], texts, Encoder(clip, processor))
    assert result.num_truncated == 3
    assert "3 of 4 texts were cut at 77 tokens" in caplog.text


def test_texts_that_would_be_cut_raise_before_anything_is_computed(
    pictures: list[Image.Image], processor: CLIPProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tiny_clip.clip_model()
    monkeypatch.setattr(clip, "get_text_features", None)  # a call would be another error
    texts = [LONG, "a cat", LONG, LONG + "cat"]
    message = r"3 of 4 texts .* 77 tokens that the model's positions allow \(texts 0, 2, 3\).* more positions"
    with pytest.raises(ValueError, match=message):
        clip_score(pictures[:4], texts, Encoder(clip, processor), on_truncation="raise")
    short = CLIPProcessor(tiny_clip.image_processor(), tiny_clip.clip_tokenizer(12))
    message = (
        r"6 of 6 texts .* 12 tokens that the tokenizer's `model_max_length` allows \(texts 0, 1, 2, 3, 4, \.\.\.\)"
    )
    with pytest.raises(ValueError, match=message):
        clip_score(pictures[:6], [LONG] * 6, Encoder(clip, short), on_truncation="raise")
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string, got NoneType"):
        clip_score(pictures[:2], ["a cat", None], Encoder(clip, processor), on_truncation="raise")
    with pytest.raises(ValueError, match=r"texts\[0\] is not valid Unicode"):
        clip_score(pictures[:1], ["a \ud800"], Encoder(clip, processor), on_truncation="raise")
    # a text of exactly the length is whole
    monkeypatch.undo()
    exact = " ".join(["cat"] * 75)
    assert len(processor.tokenizer(exact).input_ids) == 77
    assert clip_score(pictures[:1], [exact], Encoder(clip, processor), on_truncation="raise").num_truncated == 0
    with pytest.raises(ValueError, match="1 of 1 texts"):
        clip_score(pictures[:1], [exact + " cat"], Encoder(clip, processor), on_truncation="raise")


def test_a_model_with_more_positions_reads_the_whole_text(pictures: list[Image.Image]) -> None:
    clip = tiny_clip.clip_model(tiny_clip.clip_config(text={"max_position_embeddings": 320}))
    processor = CLIPProcessor(tiny_clip.image_processor(), tiny_clip.clip_tokenizer(320))
    scores = []
    for text in (LONG, LONG + "cat"):
        texts = [text] * len(pictures)
        scores.append(clip_score(pictures, texts, Encoder(clip, processor), on_truncation="raise").scores)
        torch.testing.assert_close(scores[-1], naive(pictures, texts, clip, processor), atol=1e-4, rtol=0)
    assert (scores[0] - scores[1]).abs().max() > 1e-3  # the last word counts


def test_errors(pictures: list[Image.Image], processor: CLIPProcessor) -> None:
    clip = tiny_clip.clip_model()
    with pytest.raises(ValueError, match="got 7 images and 6 texts"):
        clip_score(pictures, TEXTS[:-1], Encoder(clip, processor))
    with pytest.raises(ValueError, match="got 0 images and 0 texts"):
        clip_score([], [], Encoder(clip, processor))
    with pytest.raises(ValueError, match="`processor` is missing: give that of the CLIPModel"):
        clip_score(pictures, TEXTS, clip)
    with pytest.raises(TypeError, match="`texts` must be a list"):
        clip_score(pictures, "a cat", Encoder(clip, processor))
    for one in (pictures[0], np.zeros((2, 8, 8, 3), np.uint8), torch.zeros(2, 3, 8, 8), {"a": 1}, b"png", Path("a")):
        with pytest.raises(TypeError, match=f"`images` must be a list, .* got one {type(one).__name__}"):
            clip_score(one, ["a cat", "a dog"], Encoder(clip, processor))
    for one in ({"a cat": 1, "a dog": 2}, {"a cat", "a dog"}, np.array(["a cat", "a dog"]), None):
        with pytest.raises(TypeError, match=f"`texts` must be a list, .* got one {type(one).__name__}"):
            clip_score(pictures[:2], one, Encoder(clip, processor))
    message = (
        "`model` is a CLIPTextModel, without `get_text_features` and `get_image_features`: expected a dual encoder"
    )
    with pytest.raises(ValueError, match=message):
        clip_score(pictures, TEXTS, Encoder(tiny_clip.clip_text_model(), processor))
    with pytest.raises(ValueError, match="`processor` is a CLIPTokenizer: expected one with `tokenizer` and"):
        clip_score(pictures, TEXTS, Encoder(clip, processor.tokenizer))
    with pytest.raises(ValueError, match="`on_truncation` must be one of warn, raise"):
        clip_score(pictures, TEXTS, Encoder(clip, processor), on_truncation="ignore")
    with pytest.raises(ImageError, match=r"nowhere\.png"):
        clip_score(["nowhere.png"], ["a cat"], Encoder(clip, processor))
