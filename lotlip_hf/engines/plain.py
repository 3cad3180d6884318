"""Prepares the inputs of exported towers without transformers and PyTorch, which take seconds to import."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from ..files import parse_json, read_regular
from ..images import (
    WHITE,
    Background,
    ImageSource,
    PlainImageProcessor,
    checked_background,
    load_image,
    load_pixels,
)
from ..modeling.cleaning_lotlip import is_local_to_words, sentences_of, without_cleaning
from . import Modality
from .texts import adds_ends, encode_words

# Settings of a tokenizer for which `PlainTokenizer` gives the ids of `LoTLIPTokenizer`: all have the default value
REQUIRED = {
    "tokenizer_class": "LoTLIPTokenizer",
    "backend": "tokenizers",
    "padding_side": "right",
    "truncation_side": "right",
    "prompt_template": "{}",
}
SWITCHES = ("clean_text", "split_sentences", "split_special_tokens")
NEEDED = ("cls_token", "sep_token", "pad_token")
SPECIAL = (*NEEDED, "unk_token", "mask_token")
# Entries that do not change the ids: those about BERT's vocab.txt are in the tokenizer.json.
NO_SETTINGS = {
    *("auto_map", "clean_up_tokenization_spaces", "do_lower_case", "is_local", "local_files_only", "name_or_path"),
    *("processor_class", "strip_accents", "tokenize_chinese_chars"),
}
# Older files of a tokenizer, which transformers reads, too
OLDER_FILES = ("added_tokens.json", "special_tokens_map.json")


class PlainTokenizer:
    """
    A `LoTLIPTokenizer` over BERT's WordPiece, with the same ids.

    Args:
        folder (`Path`): Folder of the tokenizer.

    Raises:
        `OSError`: If a file cannot be read.
        `ValueError`: If the folder has another tokenizer, or if a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        settings = _read(folder / "tokenizer_config.json")
        given = {name: value for name, value in settings.items() if value is not None and name not in NO_SETTINGS}
        self.settings = given
        if any((folder / name).exists() for name in OLDER_FILES):
            raise ValueError("older files of a tokenizer")
        known = {*REQUIRED, *SWITCHES, *SPECIAL, "cleaning", "model_max_length"}
        is_known = given.keys() <= known and given.get("tokenizer_class") is not None
        if not is_known or any(given.get(name, value) != value for name, value in REQUIRED.items()):
            raise ValueError("another tokenizer")
        self.switches: list[bool] = [given.get(name, True) for name in SWITCHES]
        self.cleaning = given.get("cleaning", "official")
        self.max_length = given.get("model_max_length")
        if not all(isinstance(one, bool) for one in self.switches) or self.cleaning not in ("official", "sentences"):
            raise ValueError("other settings of the cleaning")
        if type(self.max_length) is not int or not 2 < self.max_length <= _positions(folder):
            raise ValueError("an unknown maximum length")
        saved = Tokenizer.from_buffer(read_regular(folder / "tokenizer.json"))
        added = {token.content: index for index, token in saved.get_added_tokens_decoder().items() if token.special}
        if any(given.get(name) not in (added if name in NEEDED else (None, *added)) for name in SPECIAL):
            raise ValueError("special tokens that are not in tokenizer.json")
        self.cls_token_id, self.sep_token_id, self.pad_token_id = (added[given[name]] for name in NEEDED)
        self.backend = without_cleaning(saved)
        if not is_local_to_words(self.backend) or not adds_ends(self.backend, self.cls_token_id, self.sep_token_id):
            raise ValueError("another kind of tokenizer than BERT's")
        self.backend.encode_special_tokens = self.switches[2]

    def __call__(self, texts: list[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
        """Returns the ids of each text, with special tokens and without padding, and whether it was cut."""
        sentences = [sentences_of(text, *self.switches[:2], self.cleaning) for text in texts]
        return encode_words(self.backend, sentences, max_length, self.cls_token_id, self.sep_token_id)


class ImageInputs:
    """Prepares images by an image processor, over the colour of `background`."""

    image_processor: Any
    background: Background

    def open(self, image: ImageSource, name: str) -> Image.Image:
        """Loads an image in memory as RGB, in the size that `pixels` needs, or raises an `ImageError`."""
        return load_image(image, name, image_processor=self.image_processor, background=self.background)

    def pixels(self, image: ImageSource, name: str | None = None) -> dict[str, np.ndarray]:
        """Prepares the model's inputs [1, ...] for one image. Raises an `ImageError` if it cannot be read."""
        pixels = load_pixels(image, name, image_processor=self.image_processor, background=self.background)
        return {key: np.asarray(values) for key, values in pixels.items()}


class PlainInputs(ImageInputs):
    """
    Prepares texts by a [`PlainTokenizer`] and images by a [`~lotlip_hf.images.PlainImageProcessor`].

    Args:
        folder (`Path`): Folder of an exported model.
        towers (`Collection[str]`): The towers of the folder, `"text"` and `"vision"`, which need inputs.

    Raises:
        `OSError`: If a file cannot be read.
        `ValueError`: If the folder needs the tokenizer or the image processor of transformers, or a file is damaged.
    """

    pads_to_full_length = False

    def __init__(self, folder: Path, towers: Collection[str]) -> None:
        if not str(_read(folder / "config.json").get("model_type")).startswith("lotlip"):
            raise ValueError("not a LoTLIP checkpoint")
        processor = _read(folder / "processor_config.json") if (folder / "processor_config.json").exists() else {}
        self.background = processor.get("background", WHITE)
        checked_background(self.background)
        unknown = processor.keys() - {"auto_map", "background", "image_processor", "processor_class"}
        if unknown or processor.get("processor_class", "LoTLIPProcessor") != "LoTLIPProcessor":
            raise ValueError("another processor")
        if "text" in towers:
            self.tokenizer = PlainTokenizer(folder)
            self.max_text_length: int = self.tokenizer.max_length
        if "vision" in towers:
            self.image_processor = PlainImageProcessor(
                processor.get("image_processor") or _read(folder / "preprocessor_config.json")
            )

    def tokenize(self, texts: list[str], max_length: int) -> tuple[dict[str, list[list[int]]], list[bool]]:
        """Tokenises texts without padding. Returns the model's inputs as lists, and whether each text was cut."""
        input_ids, was_cut = self.tokenizer(texts, max_length)
        return {"input_ids": input_ids}, was_cut

    def pad(self, encoded: dict[str, list[list[int]]]) -> dict[str, np.ndarray]:
        """Pads the tokens of B texts to the longest, as int64 [B, L]."""
        rows = encoded["input_ids"]
        input_ids = np.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id, np.int64)
        attention_mask = np.zeros_like(input_ids)
        for index, ids in enumerate(rows):
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def settings(self, modality: Modality) -> dict[str, Any]:
        """Everything apart from the weights that determines a modality's features."""
        if modality == "image":
            settings = {**self.image_processor.settings, "background": checked_background(self.background)}
        else:
            settings = {**self.tokenizer.settings, "backend_tokenizer": self.tokenizer.backend.to_str()}
        return {"config": {}, "preparation": settings}


def _read(file: Path) -> dict[str, Any]:
    """Reads a JSON object."""
    value = parse_json(read_regular(file))
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(file)}: it contains a {type(value).__name__}, not a JSON object.")
    return value


def _positions(folder: Path) -> int:
    """Maximum number of tokens of a text tower with BERT, special tokens included; 0 for other towers."""
    config = _read(folder / "config.json")
    text = config if config.get("model_type") == "lotlip_text_model" else config.get("text_config")
    backbone = text.get("backbone_config") if isinstance(text, dict) else None
    if not isinstance(text, dict) or not isinstance(backbone, dict) or backbone.get("model_type") != "bert":
        return 0
    positions, corners = backbone.get("max_position_embeddings"), text.get("num_corner_tokens")
    return positions - corners if isinstance(positions, int) and isinstance(corners, int) else 0
