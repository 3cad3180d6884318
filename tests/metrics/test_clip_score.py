"""CLIPScore: the cosine of each pair, whatever the batches, for texts of any length that the model takes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPProcessor

import tiny_clip
from lotlip_hf import Encoder, load_encoder
from lotlip_hf.conversion.clip import convert
from lotlip_hf.images import ImageError
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
def clip() -> Encoder:
    return clip_encoder(77)


def clip_encoder(max_length: int) -> Encoder:
    model = tiny_clip.clip_model(tiny_clip.clip_config(text={"max_position_embeddings": max_length}))
    return Encoder(model, CLIPProcessor(tiny_clip.image_processor(), tiny_clip.clip_tokenizer(max_length)))


@torch.no_grad()
def naive(pictures: list[Image.Image], texts: list[str], encoder: Encoder) -> torch.Tensor:
    model, processor = encoder.engine.model, encoder.engine.processor
    scores = []
    for picture, text in zip(pictures, texts, strict=True):
        inputs = processor(text=[text], images=[picture], truncation=True, return_tensors="pt")
        text_features = model.get_text_features(inputs.input_ids, inputs.attention_mask).pooler_output[0]
        image_features = model.get_image_features(inputs.pixel_values).pooler_output[0]
        cosine = torch.nn.functional.cosine_similarity(text_features, image_features, dim=0).item()
        scores.append(100 * max(cosine, 0.0))
    return torch.tensor(scores)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_scores_are_those_of_a_plain_loop(
    batch_size: int, pictures: list[Image.Image], official_checkpoint: Path
) -> None:
    encoder = load_encoder(official_checkpoint, device="cpu")
    result = clip_score(pictures, TEXTS, encoder, batch_size=batch_size)
    expected = naive(pictures, TEXTS, encoder)
    assert (expected > 0).any()
    assert (expected == 0).any()  # a pair below 0 is clipped by itself
    torch.testing.assert_close(result.scores, expected, atol=1e-4, rtol=0)
    assert result.mean == pytest.approx(expected.mean().item(), abs=1e-4)
    assert result.num_truncated == 0
    by_folder = clip_score(iter(pictures), iter(TEXTS), official_checkpoint).scores
    torch.testing.assert_close(by_folder, result.scores, atol=1e-4, rtol=0)


def test_a_stock_clip_and_lotlip_over_its_towers(pictures: list[Image.Image], clip: Encoder, tmp_path: Path) -> None:
    tiny_clip.save_clip(tmp_path / "clip")
    convert(tmp_path / "clip", tmp_path / "lotlip", num_corner_tokens=0)
    texts = [text for text in TEXTS if len(text) < 30]
    pictures = pictures[: len(texts)]
    model = clip.engine.model
    with torch.no_grad():
        outputs = model(**clip.engine.processor(text=texts, images=pictures, padding=True, return_tensors="pt"))
    expected = 100 * (outputs.logits_per_image.diagonal() / model.logit_scale.detach().exp()).clamp(min=0)
    assert (expected > 0).any()
    for encoder in (clip, tmp_path / "lotlip"):
        torch.testing.assert_close(clip_score(pictures, texts, encoder).scores, expected, atol=1e-4, rtol=0)


def test_texts_that_are_cut_are_counted(
    pictures: list[Image.Image], clip: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="`on_truncation`"):
        clip_score([PICTURE], ["a cat"], clip, on_truncation="ignore")  # pyright: ignore[reportArgumentType]
    texts = [LONG, "a cat", LONG, LONG + "cat"]
    assert clip_score(pictures[:4], texts, clip).num_truncated == 3
    assert "3 of 4 texts were cut at 77 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"texts\[\d\].* 77 tokens"):
        clip_score(pictures[:4], texts, clip, on_truncation="raise")
    exact = " ".join(["cat"] * 75)  # whole
    assert clip_score(pictures[:1], [exact], clip, on_truncation="raise").num_truncated == 0
    with pytest.raises(ValueError, match=r"texts\[0\]"):
        clip_score(pictures[:1], [exact + " cat"], clip, on_truncation="raise")


def test_a_model_with_more_positions_reads_the_whole_text(pictures: list[Image.Image]) -> None:
    encoder = clip_encoder(320)
    scores = []
    for text in (LONG, LONG + "cat"):
        texts = [text] * len(pictures)
        scores.append(clip_score(pictures, texts, encoder, on_truncation="raise").scores)
        torch.testing.assert_close(scores[-1], naive(pictures, texts, encoder), atol=1e-4, rtol=0)
    assert (scores[0] - scores[1]).abs().max() > 1e-3  # the last word counts


PICTURE = Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("images", "texts", "error", "message"),
    [
        ([PICTURE] * 7, TEXTS[:-1], ValueError, "7 images and 6 texts"),
        ([], [], ValueError, "0 images"),
        *((one, ["a cat", "a dog"], TypeError, "`images`") for one in (PICTURE, torch.zeros(2, 3, 8, 8), Path("a"))),
        *(([PICTURE] * 2, one, TypeError, "`texts`") for one in ("a cat", {"a cat", "a dog"}, None)),
        ([PICTURE] * 2, ["a cat", None], TypeError, r"texts\[1\]"),
        ([PICTURE], ["a \ud800"], ValueError, r"texts\[0\] .*Unicode"),
        (["nowhere.png"], ["a cat"], ImageError, r"nowhere\.png"),
    ],
)
def test_wrong_arguments(clip: Encoder, images: Any, texts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        clip_score(images, texts, clip)
