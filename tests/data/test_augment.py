"""Random changes of training images: against naive versions, and the same for any process, worker and order."""

import colorsys
import math
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lotlip_hf.data.augment import CROP_RATIOS, Augment, draw_crop, parse_augment
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.record import record_rng
from lotlip_hf.images import load_image
from lotlip_hf.modeling.processing_lotlip import LoTLIPProcessor
from lotlip_hf.training.config import TrainingConfig
from tiny_vision import FAMILIES, Family

SIZES = [(64, 48), (48, 64), (31, 31), (200, 3), (3, 200), (1, 1), (1, 9)]
ALL = Augment(crop=0.3, flip=0.5, jitter=0.4, grey=0.2)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def record(number: int, size: tuple[int, int] = (64, 48)) -> dict[str, Any]:
    return {
        "image": picture(*size, seed=number),
        "short_caption": "a star",
        "long_captions": ["A star. It is big. It is red."],
        "id": str(number),
    }


def naive_crop(width: int, height: int, smallest: float, draw: Callable[[float, float], float]) -> list[float]:
    """`RandomResizedCrop.get_params` of torchvision, line by line; `draw` returns a number of a range."""
    area = height * width
    log_ratio = [math.log(ratio) for ratio in CROP_RATIOS]
    for _ in range(10):
        target_area = area * draw(smallest, 1.0)
        aspect_ratio = math.exp(draw(log_ratio[0], log_ratio[1]))
        w = int(round(math.sqrt(target_area * aspect_ratio)))
        h = int(round(math.sqrt(target_area / aspect_ratio)))
        if 0 < w <= width and 0 < h <= height:
            j = draw(0, width - w + 1)
            i = draw(0, height - h + 1)
            return [i, j, h, w]
    in_ratio = float(width) / float(height)
    if in_ratio < min(CROP_RATIOS):
        w = width
        h = int(round(w / min(CROP_RATIOS)))
    elif in_ratio > max(CROP_RATIOS):
        h = height
        w = int(round(h * max(CROP_RATIOS)))
    else:
        w = width
        h = height
    return [(height - h) // 2, (width - w) // 2, h, w]


def scaled(random: Callable[[], float], low: float, high: float) -> float:
    return low + (high - low) * random()


class Drawn(Random):
    """Repeats its numbers in [0, 1) for the naive version, whose integers are drawn in the same way."""

    def randint(self, a: int, b: int) -> int:
        return a + int((b - a + 1) * self.random())


@pytest.mark.parametrize("size", SIZES)
def test_crops_are_those_of_torchvision(size: tuple[int, int]) -> None:
    shares = []
    for seed in range(200):
        left, top, right, bottom = draw_crop(size, 0.2, Drawn(seed))
        random = Random(seed).random
        numbers = naive_crop(*size, 0.2, partial(scaled, random))
        assert [top, left, bottom - top, right - left] == [int(number) for number in numbers]
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        shares.append((right - left) * (bottom - top) / math.prod(size))
    if size == (64, 48):
        assert min(shares) < 0.25
        assert max(shares) > 0.9


def test_a_crop_is_cut_out_and_resized_in_one_go() -> None:
    image = picture(64, 48)
    for seed in range(20):
        box = draw_crop(image.size, 0.3, Random(seed))
        expected = image.crop(box).resize((32, 24), Image.Resampling.BILINEAR)
        cropped = Augment(crop=0.3)(image, Random(seed), (32, 24), Image.Resampling.BILINEAR)
        assert cropped.tobytes() == expected.tobytes()


def test_each_change_alone() -> None:
    image = picture(8, 6)
    pixels = np.array(image).astype(float)
    mirrored = {Augment(flip=1)(image, Random(seed)).tobytes() for seed in range(9)}
    assert mirrored == {np.ascontiguousarray(np.array(image)[:, ::-1]).tobytes()}
    greys = np.array(Augment(grey=1)(image, Random(0)))
    np.testing.assert_allclose(greys, np.repeat((pixels @ [0.299, 0.587, 0.114])[..., None], 3, -1), atol=1)
    assert Augment()(image, Random(0)).tobytes() == image.tobytes()
    halves = [Augment(flip=0.5)(image, Random(seed)).tobytes() in mirrored for seed in range(200)]
    assert 60 < sum(halves) < 140


def naive_jitter(pixels: np.ndarray, strength: float, rng: Random) -> np.ndarray:
    """`ColorJitter` of torchvision in floating point, for pixels [N, 3] in 0..255."""
    brightness, contrast, saturation = (rng.uniform(1 - strength, 1 + strength) for _ in range(3))
    turn = rng.uniform(-strength / 4, strength / 4)

    def grey(pixels: np.ndarray) -> np.ndarray:
        return pixels @ [[0.299], [0.587], [0.114]]

    def turned(pixels: np.ndarray) -> np.ndarray:
        rows = []
        for pixel in pixels:
            hue, *rest = colorsys.rgb_to_hsv(*(pixel / 255))
            rows.append(colorsys.hsv_to_rgb((hue + turn) % 1, *rest))
        return 255 * np.array(rows)

    changes = [
        lambda pixels: brightness * pixels,
        lambda pixels: contrast * pixels + (1 - contrast) * grey(pixels).mean(),
        lambda pixels: saturation * pixels + (1 - saturation) * grey(pixels),
        turned,
    ]
    rng.shuffle(changes)
    for change in changes:
        pixels = change(pixels).clip(0, 255)
    return pixels


def test_colours_are_those_of_torchvision() -> None:
    """But for the roundings of PIL: whole numbers after each change, and a hue of 256 steps."""
    image = picture(8, 6)
    pixels = np.array(image).astype(float)
    for seed in range(30):
        jittered = np.array(Augment(jitter=0.4)(image, (after := Random(seed)), None)).astype(float)
        rng = Random(seed)
        rng.random()  # of the mirror image
        difference = np.abs(jittered - naive_jitter(pixels.reshape(-1, 3), 0.4, rng).reshape(pixels.shape))
        assert difference.max() < 12  # 2 steps of the hue
        assert difference.mean() < 2
        assert np.abs(jittered - pixels).mean() > 2
        rng.random()  # of shades of grey
        assert rng.random() == after.random()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_crop_replaces_the_resizing_of_any_processor(family: Family, processor: LoTLIPProcessor) -> None:
    """The model sees the drawn crop, whole, at its size: also where the processor would cut a margin off."""
    image_processor = family.image_processor()
    made = LoTLIPProcessor(image_processor, processor.tokenizer)
    if family.model_type == "siglip2_vision_model":
        with pytest.raises(ValueError, match="`augment`"):
            LoTLIPCollator(made, augment=Augment(crop=0.5))
        return
    records = [record(0), record(1, (31, 70))]
    batch = LoTLIPCollator(made, augment=Augment(crop=0.5), seed=3)(records)["pixel_values"]
    for one, pixels in zip(records, batch, strict=True):
        cropped = one["image"].crop(draw_crop(one["image"].size, 0.5, record_rng(3, 0, one["id"], "view 0")))
        resized = (
            np.array(cropped.resize(pixels.shape[:0:-1], image_processor.resample)) * image_processor.rescale_factor
        )
        if image_processor.do_normalize:
            resized = (resized - np.array(image_processor.image_mean)) / np.array(image_processor.image_std)
        torch.testing.assert_close(pixels, torch.from_numpy(resized).float().movedim(-1, 0), atol=1e-5, rtol=0)


def test_the_same_for_any_workers_batches_and_order(processor: LoTLIPProcessor) -> None:
    records = [record(number) for number in range(6)]
    collator = LoTLIPCollator(processor, augment=ALL, return_ids=True)

    def pixels(loader: Any, epoch: int) -> dict[str, torch.Tensor]:
        collator.set_epoch(epoch)
        rows = {}
        for batch in loader:
            rows |= dict(zip(batch["ids"], batch["pixel_values"], strict=True))
        return dict(sorted(rows.items()))

    first = pixels(DataLoader(records, 6, collate_fn=collator), 1)  # pyright: ignore[reportArgumentType]
    for options in ({"num_workers": 2}, {"shuffle": True}, {"sampler": [5, 3, 1, 0, 2, 4]}):
        again = pixels(DataLoader(records, 2, collate_fn=collator, **options), 1)  # pyright: ignore[reportArgumentType]
        assert again.keys() == first.keys()
        assert all(torch.equal(again[name], first[name]) for name in first)
    other = pixels(DataLoader(records, 6, collate_fn=collator), 2)  # pyright: ignore[reportArgumentType]
    assert not any(torch.equal(other[name], first[name]) for name in first)


def test_texts_are_drawn_as_without(processor: LoTLIPProcessor) -> None:
    records = [record(number) for number in range(3)]
    plain, changed = (LoTLIPCollator(processor, augment=augment)(records) for augment in (None, ALL))
    assert torch.equal(plain["long_input_ids"], changed["long_input_ids"])
    assert not torch.equal(plain["pixel_values"], changed["pixel_values"])
    assert torch.equal(
        LoTLIPCollator(processor, augment=Augment(flip=1))(records)["pixel_values"],
        LoTLIPCollator(processor)(
            [{**one, "image": load_image(one["image"]).transpose(Image.Transpose.FLIP_LEFT_RIGHT)} for one in records]
        )["pixel_values"],
    )


@pytest.mark.parametrize(
    "entries",
    [["turn:0.5"], ["flip:0.5", "flip:0.2"], ["flip"], ["crop:x"], ["crop:1.5"], ["grey:-1"], ["jitter:nan"]],
)
def test_wrong_changes_are_named(entries: list[str]) -> None:
    with pytest.raises(ValueError, match="augment"):
        TrainingConfig(augment=entries)


def test_the_option_and_boxes(processor: LoTLIPProcessor) -> None:
    assert parse_augment([]) is None
    assert TrainingConfig(augment=["crop:0.5", "flip:0.5"]).augmentation() == Augment(crop=0.5, flip=0.5)
    assert TrainingConfig(augment=["grey:0.5"], terms=["infonce", "region_text"]).augmentation()
    with pytest.raises(ValueError, match="`augment`.*region_text"):
        TrainingConfig(augment=["flip:0.5"], terms=["infonce", "region_text"])
    with pytest.raises(ValueError, match="`augment`"):
        LoTLIPCollator(processor, augment=Augment(flip=0.5), num_regions=1)
