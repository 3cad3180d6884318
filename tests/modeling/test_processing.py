"""The processor: the official pixels, nested texts and saving and loading."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, CLIPImageProcessorPil

from lotlip_hf import LoTLIPConfig, LoTLIPProcessor, LoTLIPTokenizer
from lotlip_hf.images import background_of, load_image, official_image_processor

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PIXELS = load_file(GOLDEN / "images" / "expected_pixels.safetensors")


def make_processor(**image_settings) -> LoTLIPProcessor:
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN / "tokenizer", model_max_length=126)
    image_processor = CLIPImageProcessorPil(**image_settings) if image_settings else official_image_processor()
    return LoTLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def processor() -> LoTLIPProcessor:
    return make_processor()


# Images


@pytest.mark.parametrize("name", sorted(PIXELS))
@pytest.mark.parametrize("form", ["path", "PIL image", "RGB array"])
def test_pixels_are_the_official_ones(processor: LoTLIPProcessor, name: str, form: str) -> None:
    """The same pixels whether a file, what PIL makes of it, or an array is given: transparency is dropped."""
    constants, file = name.split(".", 1)
    if constants == "clip":
        processor = LoTLIPProcessor(CLIPImageProcessorPil(), processor.tokenizer)
    path = GOLDEN / "images" / file
    image = {
        "path": str(path),
        "PIL image": Image.open(path),
        "RGB array": np.asarray(Image.open(path).convert("RGB")),
    }[form]
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    torch.testing.assert_close(pixels, PIXELS[name].reshape(pixels.shape), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["LA", "PA", "P", "L", "RGB", "RGBA"])
def test_transparency_is_dropped_in_every_mode(processor: LoTLIPProcessor, tmp_path: Path, mode: str) -> None:
    """An alpha channel, or a colour that the file declares transparent: from memory and from a file."""
    image = Image.open(GOLDEN / "images" / "RGBA_256x320.png")
    image = image.convert("RGB").convert("P").convert("PA") if mode == "PA" else image.convert("RGB").convert(mode)
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    else:
        image.info["transparency"] = image.getpixel((128, 160))
    colours = np.asarray(image.convert("RGB"))
    expected = processor(images=colours, return_tensors="pt")["pixel_values"]
    given = [image, image.copy()]
    if mode != "PA":  # which PNG does not know
        image.save(tmp_path / "image.png", transparency=image.info.get("transparency"))
        given.append(str(tmp_path / "image.png"))
    kept = list(given)
    pixels = processor(images=given, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, expected.expand(len(given), -1, -1, -1), atol=1e-5, rtol=0)
    assert given == kept
    assert image.mode == mode


def test_orientation_is_applied_to_paths_only(processor: LoTLIPProcessor, tmp_path: Path) -> None:
    """As in transformers: `load_image` turns a picture as its EXIF entry says, a PIL image is taken as it lies."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = Image.open(GOLDEN / "images" / "RGB_640x480.png")
    image.save(tmp_path / "turned.png", exif=exif)
    upright = processor(images=image.transpose(Image.Transpose.ROTATE_270), return_tensors="pt")["pixel_values"]
    from_path = processor(images=str(tmp_path / "turned.png"), return_tensors="pt")["pixel_values"]
    from_image = processor(images=Image.open(tmp_path / "turned.png"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(from_path, upright, atol=1e-5, rtol=0)
    as_it_lies = processor(images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(from_image, as_it_lies, atol=1e-5, rtol=0)
    assert (upright - as_it_lies).abs().max() > 0.1


def test_another_image_size(processor: LoTLIPProcessor) -> None:
    processor = LoTLIPProcessor(official_image_processor(image_size=32), processor.tokenizer)
    images = [Image.new("RGB", size) for size in ((1, 1), (300, 20), (20, 300))]
    assert processor(images=images, return_tensors="pt")["pixel_values"].shape == (3, 3, 32, 32)


# Texts


def test_texts_are_padded_and_cut_unless_told_otherwise(processor: LoTLIPProcessor) -> None:
    texts = ["a", "a cat", 200 * "word "]
    batch = processor(text=texts, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 126)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 4, 126]
    assert [len(ids) for ids in processor(text=texts, padding=False)["input_ids"]] == [3, 4, 126]
    assert [len(ids) for ids in processor(text=texts, truncation=False)["input_ids"]] == [202] * 3
    assert processor(text=texts, max_length=7, return_tensors="pt")["input_ids"].shape == (3, 7)
    assert len(processor(text="a", text_kwargs={"padding": "max_length"})["input_ids"]) == 126
    assert processor(text=("a", "b"))["input_ids"] == processor(text=["a", "b"])["input_ids"]
    assert processor(text="a")["input_ids"] == processor.tokenizer("a")["input_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_nested_texts_give_one_more_dimension(processor: LoTLIPProcessor, side: str) -> None:
    texts = [["a cat", "A grey cat. It sleeps.", ""], ("a dog", "A dog barks.", "x &amp; y")]
    given = copy.deepcopy(texts)
    batch = processor(text=texts, padding_side=side, return_tensors="pt")
    flat = processor(text=[one for row in texts for one in row], padding_side=side, return_tensors="pt")
    assert texts == given
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 3, flat["input_ids"].shape[1])
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[name].flatten(0, 1), flat[name])
    last = batch["input_ids"][1, 2][batch["attention_mask"][1, 2].bool()]
    assert last.tolist() == processor.tokenizer("x & y")["input_ids"]

    lists = processor(text=texts, padding=False)
    assert lists["input_ids"] == [[processor.tokenizer(one)["input_ids"] for one in row] for row in texts]
    arrays = processor(text=texts, padding_side=side, return_tensors="np")
    assert arrays["input_ids"].shape == (2, 3, flat["input_ids"].shape[1])


def test_nested_texts_with_images(processor: LoTLIPProcessor) -> None:
    image = Image.open(GOLDEN / "images" / "RGB_640x480.png")
    batch = processor(text=[["a", "b c"], ["d", "e"]], images=[image, image], return_tensors="pt")
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (2, 2, 4),
        "attention_mask": (2, 2, 4),
        "pixel_values": (2, 3, 224, 224),
    }
    expected = PIXELS["lotlip.RGB_640x480.png"].reshape(3, 224, 224)
    torch.testing.assert_close(batch["pixel_values"][1], expected, atol=1e-5, rtol=0)
    one = processor(text=[["a", "b c"]], images=image, return_tensors="pt")
    assert one["input_ids"].shape == (1, 2, 4)
    assert one["pixel_values"].shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"text": [["a"], ["b", "c"]]}, r"text\[1\]"),
        ({"text": [["a"], "b"]}, r"text\[1\]"),
        ({"text": ["b", ["a"]]}, r"text\[0\]"),
        ({"text": [["a"], [3]]}, r"text\[1\]"),
        ({"text": [[], []]}, r"text\[0\]"),
        ({"text": [["a"]], "return_overflowing_tokens": True}, "return_overflowing_tokens"),
        ({"text": []}, "text"),
        ({}, "input"),
    ],
)
def test_what_does_not_fit_gets_one_clear_error(processor: LoTLIPProcessor, arguments: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        processor(**arguments)


def test_decoding_and_names(processor: LoTLIPProcessor) -> None:
    ids = processor(text=["A cat. A dog."])["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a cat. a dog."]
    assert processor.decode(ids[0]) == "[CLS] a cat [SEP] a dog. [SEP]"
    assert sorted(processor.model_input_names) == ["attention_mask", "input_ids", "pixel_values"]


# Saving and loading


def test_loads_by_auto_processor(processor: LoTLIPProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["image_processor"]["image_processor_type"] == "CLIPImageProcessor"  # loads with either backend
    inputs = {"text": [["a cat", "A cat. It sleeps."]], "images": str(GOLDEN / "images" / "L_300x200.png")}
    expected = processor(**inputs, return_tensors="pt")
    for step in ("alone", "beside a configuration"):
        if step != "alone":
            LoTLIPConfig().save_pretrained(tmp_path)
        loaded = AutoProcessor.from_pretrained(tmp_path)
        assert type(loaded) is LoTLIPProcessor, step
        assert type(loaded.tokenizer) is LoTLIPTokenizer, step
        batch = loaded(**inputs, return_tensors="pt")
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)


def test_settings_of_both_parts_are_kept(tmp_path: Path) -> None:
    processor = make_processor(size={"shortest_edge": 48}, crop_size={"height": 32, "width": 32}, image_mean=[0.1] * 3)
    settings = {"model_max_length": 9, "clean_text": False, "padding_side": "left"}
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN / "tokenizer", **settings)
    LoTLIPProcessor(processor.image_processor, tokenizer).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert (loaded.tokenizer.clean_text, loaded.tokenizer.split_sentences) == (False, True)
    assert loaded(text=["a", 20 * "b "])["attention_mask"] == [6 * [0] + 3 * [1], 9 * [1]]
    image = Image.open(GOLDEN / "images" / "RGB_640x480.png")
    torch.testing.assert_close(
        loaded(images=image, return_tensors="pt")["pixel_values"],
        processor(images=image, return_tensors="pt")["pixel_values"],
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("background", "shown"),
    [("#00ff00", (0, 255, 0)), ([0, 255, 0], (0, 255, 0)), (None, (0, 0, 0)), ("absent", (255, 255, 255))],
)
def test_the_background_is_kept(
    processor: LoTLIPProcessor, tmp_path: Path, background: Any, shown: tuple[int, int, int]
) -> None:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    if background == "absent":  # as checkpoints of before
        processor.save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "processor_config.json").read_text())
        assert settings.pop("background") == "white"
        (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    else:
        LoTLIPProcessor(processor.image_processor, processor.tokenizer, background).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.background == ("white" if background == "absent" else background)
    image.save(tmp_path / "art.png")
    assert load_image(tmp_path / "art.png", background=background_of(loaded)).getpixel((3, 3)) == shown
    # called by itself it is the official one
    official = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.equal(loaded(images=image, return_tensors="pt")["pixel_values"], official)
