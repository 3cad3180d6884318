"""Exported towers without transformers: the ids and the pixels are those of its classes, or its classes are used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from lotlip_hf import LoTLIPProcessor, LoTLIPTokenizer, load_encoder
from lotlip_hf.engines.plain import PlainInputs, PlainTokenizer
from lotlip_hf.engines.torch import ProcessorInputs
from lotlip_hf.images import PlainImageProcessor, kept_box, load_pixels
from tiny_tokenizers import GOLDEN, TEXTS, random_texts, toy_roberta

HOSTILE = [
    *TEXTS,
    *("", " ", "\u200b " * 300 + "end", "[SEP]", "a [SEP] b. c [MASK]", "&#91;SEP&#93;. &amp;amp; schÃ¶n", "⸻⸺3⸺⸻ a"),
    *(
        "Dr. Smith sleeps! Does he? No. 5\nYes",
        "word. " * 200,
        "x" * 300,
        "猫が寝る。犬も",
        "\ufdd0\ufdd1 [CLS]\ufdd0",
    ),
]
SIZES = [(1, 1), (5, 3), (31, 33), (32, 32), (64, 48), (97, 203), (2000, 9), (7, 1500), (4500, 4000)]


def exported_folder(folder: Path, official_checkpoint: Path, processor: Any) -> Path:
    """The files of an export, of which the towers are empty: they are opened later."""
    folder.mkdir()
    shutil.copy(official_checkpoint / "config.json", folder)
    processor.save_pretrained(folder)
    for tower in ("text", "vision"):
        (folder / f"{tower}_model.onnx").touch()
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cleaning": "sentences"},
        {"clean_text": False},
        {"split_sentences": False, "split_special_tokens": False},
        {"split_special_tokens": False, "cleaning": "sentences", "clean_text": False},
    ],
)
def test_ids_are_those_of_the_tokenizer(settings: dict[str, Any], tmp_path: Path, official_checkpoint: Path) -> None:
    tokenizer = LoTLIPTokenizer.from_pretrained(GOLDEN, model_max_length=126, **settings)
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(official_checkpoint / "config.json", tmp_path)
    plain = PlainTokenizer(tmp_path)
    texts = [*HOSTILE, *random_texts(300, seed=4)]
    for limit in (3, 9, 126):
        # One by one, as a query is: the cut texts have no long neighbours.
        expected = [tokenizer(text, truncation=True, max_length=limit, verbose=False) for text in texts]
        ids, was_cut = plain(texts, limit)
        assert ids == [one["input_ids"] for one in expected]
        assert was_cut == [bool(one.encodings[0].overflowing) for one in expected]


def test_other_tokenizers_are_those_of_transformers(tmp_path: Path, official_checkpoint: Path) -> None:
    def changed(**settings: Any) -> Any:
        return LoTLIPTokenizer.from_pretrained(GOLDEN, **{"model_max_length": 126, **settings})

    added = changed()
    added.add_tokens(["a cat"])
    makers = [
        changed(prompt_template="A photo of {}"),
        changed(padding_side="left"),
        changed(truncation_side="left"),
        changed(model_max_length=10**30),
        added,
        LoTLIPTokenizer.from_backbone_tokenizer(toy_roberta(), model_max_length=30),
    ]
    for number, tokenizer in enumerate(makers):
        processor = LoTLIPProcessor(CLIPImageProcessorPil(size=32), tokenizer)
        folder = exported_folder(tmp_path / str(number), official_checkpoint, processor)
        engine = load_encoder(folder).engine
        assert isinstance(engine.inputs, ProcessorInputs)  # pyright: ignore[reportAttributeAccessIssue]
        limit = min(engine.max_text_length, 30)
        ids, _ = engine.tokenize(HOSTILE, limit)
        assert ids["input_ids"] == tokenizer(HOSTILE, truncation=True, max_length=limit, verbose=False)["input_ids"]


def is_plain(folder: Path) -> bool:
    """Whether the files are read without transformers: any error makes `load_exported` use it."""
    try:
        PlainInputs(folder, ["text", "vision"])
    except Exception:
        return False
    return True


def edited(name: str, **settings: Any) -> Callable[[Path], None]:
    """Changes entries of a JSON file."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        part = content["image_processor"] if name == "processor_config.json" else content
        part.update(settings)
        (folder / name).write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        edited("tokenizer_config.json", extra_special_tokens=["<x>"]),
        edited("tokenizer_config.json", sep_token="<sep>"),
        edited("tokenizer_config.json", model_max_length=500),  # more than the positions
        edited("tokenizer_config.json", clean_text=1),
        edited("processor_config.json", image_processor_type="ConvNextImageProcessor"),
        edited("processor_config.json", do_pad=True),
        edited("processor_config.json", size={"longest_edge": 32}),
        edited("processor_config.json", size={"shortest_edge": 5000}),
        edited("processor_config.json", do_resize="yes"),
        edited("processor_config.json", resample=9),
        edited("processor_config.json", image_std=[0, 1, 1]),
        edited("processor_config.json", image_std=[0.5]),
        edited("processor_config.json", crop_size=None),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (folder / "special_tokens_map.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}'),
    ],
)
def test_settings_that_are_not_plain(edit: Callable[[Path], Any], tmp_path: Path, official_checkpoint: Path) -> None:
    processor = LoTLIPProcessor.from_pretrained(official_checkpoint)
    folder = exported_folder(tmp_path / "exported", official_checkpoint, processor)
    assert is_plain(folder)
    edit(folder)
    assert not is_plain(folder)


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 33, "width": 31}, do_normalize=False),
        BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 31, "width": 31}),
        BitImageProcessorPil(size={"height": 20, "width": 50}, crop_size={"height": 32, "width": 32}, resample=0),
        ViTImageProcessorPil(size={"height": 32, "width": 32}),
        ViTImageProcessorPil(size={"height": 24, "width": 40}, do_rescale=False),
        SiglipImageProcessorPil(size={"height": 32, "width": 32}, rescale_factor=0.01, image_mean=[0.1, 0.2, 0.3]),
    ],
)
def test_pixels_are_those_of_transformers(processor: Any) -> None:
    plain = PlainImageProcessor(json.loads(processor.to_json_string()))
    generator = np.random.default_rng(0)
    for width, height in SIZES:
        noise = generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        given, expected = (load_pixels(image, image_processor=one)["pixel_values"] for one in (plain, processor))
        assert isinstance(given, np.ndarray)
        np.testing.assert_array_equal(given, expected.numpy())
        assert given.dtype == np.float32
        assert kept_box(image.size, plain) == kept_box(image.size, processor)


def test_a_processor_with_its_own_code_is_not_plain() -> None:
    with pytest.raises(ValueError, match="ConvNext"):
        PlainImageProcessor(ConvNextImageProcessorPil().to_dict())
