"""Engine for a dual encoder of transformers."""

import contextlib
import json
from collections.abc import Callable, Iterator
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

# SigLIP's text tower pools the last position and has no mask, so texts are always padded to the full length.
FULL_LENGTH_MODEL_TYPES = ("siglip", "siglip2")
# Prefixes of the image tower's weights. Other weights, except `SIMILARITY_WEIGHTS`, belong to the text tower.
IMAGE_WEIGHTS = ("vision_model.", "visual_projection.")
SIMILARITY_WEIGHTS = ("logit_scale", "logit_bias")
# Attributes of tokenizers that change the ids of a text.
CHANGEABLE = (
    "prompt_template",
    "clean_text",
    "split_sentences",
    "cleaning",
    "split_special_tokens",
    "truncation_side",
)


class TorchEngine:
    """
    Engine for a model with CLIP's `get_text_features` and `get_image_features`.

    Args:
        model (`PreTrainedModel`): Dual encoder, or one of its towers.
        processor (`ProcessorMixin`): Processor of the model, or only a tokenizer or an image processor.
    """

    libraries: tuple[str, ...] = ()  # saved with results: the versions of these, torch and transformers

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.image_processor = getattr(processor, "image_processor", processor)
        self.background = background_of(processor)
        self.pads_to_full_length = model.config.model_type in FULL_LENGTH_MODEL_TYPES

    @property
    def name(self) -> str:
        """Folder or Hub id of the model, or its class."""
        return str(getattr(self.model, "name_or_path", "") or type(self.model).__name__)

    @property
    def revision(self) -> str | None:
        """Commit of the model on the Hub, if known."""
        return getattr(self.model.config, "_commit_hash", None)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.model.dtype

    @property
    def max_text_length(self) -> int:
        """Maximum length of a text in tokens, special tokens included."""
        return max_text_length(self.model, self.tokenizer)

    def tokenize(self, texts: list[str], max_length: int) -> tuple[dict[str, list[list[int]]], list[bool]]:
        """Tokenises texts without padding. Returns the model's inputs as lists, and whether each text was cut."""
        if isinstance(self.tokenizer, LoTLIPTokenizer) and "token_type_ids" not in self.tokenizer.model_input_names:
            input_ids, was_cut = encode_unpadded(self.tokenizer, texts, max_length)
            return {"input_ids": input_ids}, was_cut  # `pad` adds the masks
        encoded = for_one_call(self.tokenizer)(texts, truncation=True, max_length=max_length, verbose=False)
        if encoded.encodings is not None:
            return dict(encoded), [bool(encoding.overflowing) for encoding in encoded.encodings]
        # Slow tokenizers do not report truncation. Tokenise long texts again without it.
        was_cut = [False] * len(texts)
        full = [index for index, ids in enumerate(encoded["input_ids"]) if len(ids) >= max_length]
        if full:
            whole = self.tokenizer([texts[index] for index in full], truncation=False, verbose=False)["input_ids"]
            for index, ids in zip(full, whole, strict=True):
                was_cut[index] = len(ids) > max_length
        return dict(encoded), was_cut

    def pad(self, encoded: dict[str, list[list[int]]]) -> dict[str, torch.Tensor]:
        """Pads the tokens of B texts to the longest, or to the full length, as tensors [B, L]."""
        padding: dict[str, Any] = {"padding": "longest"}
        if self.pads_to_full_length:
            padding = {"padding": "max_length", "max_length": self.max_text_length}
        # Silence the advice to pad in the call: texts are sorted by length first.
        warned = self.tokenizer.deprecation_warnings.get("Asking-to-pad-a-fast-tokenizer", False)
        self.tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
        try:
            padded = self.tokenizer.pad(encoded, **padding)
        finally:
            self.tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = warned
        # NumPy converts lists several times as fast as `return_tensors="pt"`.
        return {key: torch.from_numpy(np.asarray(rows, dtype=np.int64)) for key, rows in padded.items()}

    def open(self, image: ImageSource, name: str) -> Image.Image:
        """Loads an image in memory as RGB, in the size that `pixels` needs, or raises an `ImageError`."""
        return load_image(image, name, image_processor=self.image_processor, background=self.background)

    def pixels(self, image: ImageSource, name: str | None = None) -> dict[str, torch.Tensor]:
        """Prepares the model's inputs [1, ...] for one image. Raises an `ImageError` if it cannot be read."""
        return load_pixels(image, name, image_processor=self.image_processor, background=self.background)

    def text_features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Computes features [B, P] of texts."""
        return self._features(self.model.get_text_features, inputs)

    def image_features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Computes features [B, P] of images."""
        return self._features(self.model.get_image_features, inputs)

    def pooled_states(self, modality: Modality, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Computes the pooled states [B, pooled_size] of a LoTLIP tower, before its projection."""
        return self._features(self.model.text_model if modality == "text" else self.model.vision_model, inputs)

    def _features(self, function: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Runs in evaluation and inference mode."""
        inputs = self.on_device(inputs)
        # Stock models have no option to compute only the pooled token.
        options = {"pooled_only": True} if isinstance(self.model, LoTLIPModel) else {}
        with evaluating(self.model), torch.inference_mode():
            output = function(**inputs, **options)
            return output if isinstance(output, torch.Tensor) else output.pooler_output

    def on_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs on the device of the model, and images in the dtype of the image tower."""
        # Only images are floats. The text tower may have another dtype.
        dtype = getattr(self.model, "vision_model", self.model).dtype
        return {
            key: values.to(self.device, dtype if values.is_floating_point() else None)
            for key, values in inputs.items()
        }

    def settings(self, modality: Modality) -> dict[str, Any]:
        """Everything apart from the weights that determines a modality's features."""
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
        """Weights of a tower, sorted by name, or of the whole model if no name has a prefix of the image tower."""
        weights = {name: one for name, one in self.model.state_dict().items() if name not in SIMILARITY_WEIGHTS}
        of_images = {name for name in weights if name.startswith(IMAGE_WEIGHTS)}
        for name in sorted(weights):
            if not of_images or (name in of_images) == (modality == "image"):
                yield name, weights[name]


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Context in evaluation mode, which restores the training mode of all modules."""
    in_training = [module for module in model.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        yield
    finally:
        for module in in_training:
            module.training = True


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """Everything that determines the token ids of a text."""
    origin = {"name_or_path", "is_local", "local_files_only", "processor_class", "backend"}
    settings = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if isinstance(value, bool | int | str) and name not in origin and not name.endswith("_file")
    }
    # In `init_kwargs`, special tokens are texts or objects, which depends on the folder.
    settings |= {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    # `init_kwargs` has the values at the start.
    settings |= {name: getattr(tokenizer, name, value) for name, value in settings.items() if name in CHANGEABLE}
    if hasattr(tokenizer, "backend_tokenizer"):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Truncation and padding change with each call.
        settings["backend_tokenizer"] = {**backend, "truncation": None, "padding": None}
    else:
        settings["vocabulary"] = tokenizer.get_vocab()
    return settings


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """Removes settings that all configurations have, because they vary with the version of transformers."""
    general = PreTrainedConfig().to_dict().keys() | {"transformers_version", "_name_or_path", "architectures", "dtype"}
    return {
        name: _architecture(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if (name not in general or name == "model_type") and not name.startswith("_") and value is not None
    }
