"""A dual encoder of transformers, as an [`~lotlip_hf.encoder.Encoder`] uses it."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel

from ..images import ImageSource, background_of, checked_background, load_image, load_pixels
from ..loading import max_text_length
from ..modeling.calls_lotlip import for_one_call
from ..modeling.modeling_lotlip import LoTLIPModel
from ..modeling.tokenization_lotlip import LoTLIPTokenizer
from .texts import encode_unpadded

Modality = Literal["image", "text"]

# SigLIP's text tower reads the last position and takes no mask: texts are always padded to the full length.
FULL_LENGTH_MODEL_TYPES = ("siglip", "siglip2")
# Prefixes of an image tower's weights; all others but those of the similarities are the text tower's.
IMAGE_WEIGHTS = ("vision_model.", "visual_projection.")
SIMILARITY_WEIGHTS = ("logit_scale", "logit_bias")


class TorchEngine:
    """
    Features by a model with CLIP's `get_text_features` and `get_image_features`.

    Args:
        model (`PreTrainedModel`): the dual encoder, or one tower of it.
        processor (`ProcessorMixin`): its processor, or its tokenizer or image processor alone.
    """

    libraries: tuple[str, ...] = ()  # whose versions are part of a result, beside torch and transformers

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.image_processor = getattr(processor, "image_processor", processor)
        self.background = background_of(processor)
        self.pads_to_full_length = model.config.model_type in FULL_LENGTH_MODEL_TYPES

    @property
    def name(self) -> str:
        """The folder or Hub id that the model was loaded from, or its class."""
        return str(getattr(self.model, "name_or_path", "") or type(self.model).__name__)

    @property
    def revision(self) -> str | None:
        """The commit on the Hub that the model was loaded from, if it is known."""
        return getattr(self.model.config, "_commit_hash", None)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.model.dtype

    @property
    def max_text_length(self) -> int:
        """The longest text that the model takes, in tokens, special ones included."""
        return max_text_length(self.model, self.tokenizer)

    def tokenize(self, texts: list[str], max_length: int) -> tuple[dict[str, list[list[int]]], list[bool]]:
        """The tokens of each text, not padded, and whether the text was cut at `max_length`."""
        if isinstance(self.tokenizer, LoTLIPTokenizer) and "token_type_ids" not in self.tokenizer.model_input_names:
            input_ids, was_cut = encode_unpadded(self.tokenizer, texts, max_length)
            return {"input_ids": input_ids}, was_cut  # `pad` adds the masks
        encoded = for_one_call(self.tokenizer)(texts, truncation=True, max_length=max_length, verbose=False)
        if encoded.encodings is not None:
            return dict(encoded), [bool(encoding.overflowing) for encoding in encoded.encodings]
        # Tokenizers without the Rust backend do not tell what they cut: the full texts do.
        was_cut = [False] * len(texts)
        full = [index for index, ids in enumerate(encoded["input_ids"]) if len(ids) >= max_length]
        if full:
            whole = self.tokenizer([texts[index] for index in full], truncation=False, verbose=False)["input_ids"]
            for index, ids in zip(full, whole, strict=True):
                was_cut[index] = len(ids) > max_length
        return dict(encoded), was_cut

    def pad(self, encoded: dict[str, list[list[int]]]) -> dict[str, torch.Tensor]:
        """Tokens of B texts as tensors [B, L], padded to the longest, or to the full length."""
        padding: dict[str, Any] = {"padding": "longest"}
        if self.pads_to_full_length:
            padding = {"padding": "max_length", "max_length": self.max_text_length}
        # `pad` advises calling the tokenizer instead, which cannot sort by length first.
        warned = self.tokenizer.deprecation_warnings.get("Asking-to-pad-a-fast-tokenizer", False)
        self.tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
        try:
            padded = self.tokenizer.pad(encoded, **padding)
        finally:
            self.tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = warned
        # NumPy reads lists several times as fast as `return_tensors="pt"`.
        return {key: torch.from_numpy(np.asarray(rows, dtype=np.int64)) for key, rows in padded.items()}

    def open(self, image: ImageSource, name: str) -> Image.Image:
        """An image in memory as RGB, reduced to what the pixels are made from; an `ImageError` if it is damaged."""
        return load_image(image, name, image_processor=self.image_processor, background=self.background)

    def pixels(self, image: ImageSource, name: str | None = None) -> dict[str, torch.Tensor]:
        """The model's inputs [1, ...] for one image; an `ImageError` if it cannot be read."""
        return load_pixels(image, name, image_processor=self.image_processor, background=self.background)

    def text_features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features [B, P] of texts, not normalised."""
        return self._features("get_text_features", inputs)

    def image_features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features [B, P] of images, not normalised."""
        return self._features("get_image_features", inputs)

    def _features(self, function: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """In inference mode; the modules' modes are left as they were."""
        inputs = {
            key: values.to(self.device, self.dtype if values.is_floating_point() else None)
            for key, values in inputs.items()
        }
        # Stock models compute every token's state, though only the pooled one is used.
        options = {"pooled_only": True} if isinstance(self.model, LoTLIPModel) else {}
        in_training = [module for module in self.model.modules() if module.training]
        try:
            for module in in_training:
                module.training = False
            with torch.inference_mode():
                output = getattr(self.model, function)(**inputs, **options)
                return output if isinstance(output, torch.Tensor) else output.pooler_output
        finally:
            for module in in_training:
                module.training = True

    def settings(self, modality: Modality) -> dict[str, Any]:
        """All that decides on a modality's features beside the weights."""
        tower = "vision_config" if modality == "image" else "text_config"
        config = getattr(self.model.config, tower, self.model.config)
        if modality == "image":
            preparation = {**self.image_processor.to_dict(), "background": checked_background(self.background)}
        else:
            preparation = {**tokenizer_settings(self.tokenizer), "max_length": self.max_text_length}
        return {
            "config": _architecture(config.to_dict()),
            "preparation": {name: value for name, value in preparation.items() if value is not None},
        }

    def weights(self, modality: Modality) -> Iterator[tuple[str, torch.Tensor]]:
        """A tower's weights by name, sorted; all but the similarities' if the image tower's have other names."""
        weights = {name: one for name, one in self.model.state_dict().items() if name not in SIMILARITY_WEIGHTS}
        of_images = {name for name in weights if name.startswith(IMAGE_WEIGHTS)}
        for name in sorted(weights):
            if not of_images or (name in of_images) == (modality == "image"):
                yield name, weights[name]


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """Everything that decides on the token ids of a text."""
    origin = {"name_or_path", "is_local", "local_files_only", "processor_class", "backend"}
    settings = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if isinstance(value, bool | int | str) and name not in origin and not name.endswith("_file")
    }
    if hasattr(tokenizer, "backend_tokenizer"):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # These two change with each call.
        settings["backend_tokenizer"] = {**backend, "truncation": None, "padding": None}
    else:
        settings["vocabulary"] = tokenizer.get_vocab()
    return settings


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says beyond the settings of every configuration, which come and go with transformers."""
    general = PreTrainedConfig().to_dict().keys() | {"transformers_version", "_name_or_path", "architectures", "dtype"}
    return {
        name: _architecture(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if (name not in general or name == "model_type") and not name.startswith("_") and value is not None
    }
