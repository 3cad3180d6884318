"""Engine for a dual encoder of transformers."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..images import background_of, checked_background
from ..loading import max_text_length
from ..modeling.calls_lotlip import for_one_call
from ..modeling.modeling_lotlip import LoTLIPModel
from ..modeling.tokenization_lotlip import LoTLIPTokenizer
from . import Modality
from .plain import ImageInputs
from .texts import encode_unpadded

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


class ProcessorInputs(ImageInputs):
    """
    Prepares texts and images by the processor of a model.

    Args:
        model (`PreTrainedModel`): Dual encoder, or one of its towers, of which only `config` is used.
        processor (`ProcessorMixin`): Processor of the model, or only a tokenizer or an image processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.image_processor = getattr(processor, "image_processor", processor)
        self.background = background_of(processor)
        self.pads_to_full_length = model.config.model_type in FULL_LENGTH_MODEL_TYPES

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

    def pad(self, encoded: dict[str, list[list[int]]]) -> dict[str, np.ndarray]:
        """Pads the tokens of B texts to the longest, or to the full length, as int64 [B, L]."""
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
        return {key: np.asarray(rows, dtype=np.int64) for key, rows in padded.items()}

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


class TorchEngine(ProcessorInputs):
    """
    Engine for a model with CLIP's `get_text_features` and `get_image_features`. Has the arguments of
    [`ProcessorInputs`].
    """

    libraries: tuple[str, ...] = ()  # saved with results: the versions of these, torch and transformers

    @property
    def name(self) -> str:
        """Folder or Hub id of the model, or its class."""
        return str(getattr(self.model, "name_or_path", "") or type(self.model).__name__)

    @property
    def revision(self) -> str | None:
        """Commit of the model on the Hub, if known."""
        return getattr(self.model.config, "_commit_hash", None)

    @property
    def device(self) -> str:
        """Device of the model."""
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        """Type of the weights."""
        return str(self.model.dtype).removeprefix("torch.")

    def embed(self, modality: Modality, inputs: Mapping[str, np.ndarray], pooled: bool = False) -> torch.Tensor:
        """
        Starts to compute the embeddings [B, P] of a batch, normalised, on the device of the model. With `pooled`, they
        are the pooled states [B, pooled_size] of a LoTLIP tower, before its projection, not normalised.
        """
        if pooled:
            return self._run(self.model.text_model if modality == "text" else self.model.vision_model, inputs)
        features = self._run(getattr(self.model, f"get_{modality}_features"), inputs)
        return torch.nn.functional.normalize(features, dim=-1)

    def fetch(self, batch: torch.Tensor) -> np.ndarray:
        """Waits for a batch that `embed` started, and copies it to the CPU."""
        return batch.cpu().numpy()

    def features(self, modality: Modality, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Computes features [B, P] of a batch, not normalised, in float32 on the CPU."""
        return self.fetch(self._run(getattr(self.model, f"get_{modality}_features"), inputs))

    def _run(self, function: Any, inputs: Mapping[str, np.ndarray]) -> torch.Tensor:
        """Runs in evaluation and inference mode. Returns [B, ...] in float32 on the device."""
        with evaluating(self.model), torch.inference_mode():
            return self._pooled(function, self.on_device(inputs))

    def text_embeds(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embeddings [B, P] of tokens on the device of the model, normalised, in float32, with gradients."""
        return torch.nn.functional.normalize(self._pooled(self.model.get_text_features, inputs), dim=-1)

    def _pooled(self, function: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The output [B, ...] for the pooled tokens in float32."""
        # Stock models have no option to compute only the pooled token.
        options = {"pooled_only": True} if isinstance(self.model, LoTLIPModel) else {}
        output = function(**inputs, **options)
        return (output if isinstance(output, torch.Tensor) else output.pooler_output).float()

    def on_device(self, inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """The inputs as tensors on the device of the model, and images in the dtype of the image tower."""
        # Only images are floats. The text tower may have another dtype.
        dtype = getattr(self.model, "vision_model", self.model).dtype
        tensors = {key: torch.from_numpy(values) for key, values in inputs.items()}
        return {
            key: values.to(self.model.device, dtype if values.is_floating_point() else None)
            for key, values in tensors.items()
        }

    def weights(self, modality: Modality) -> Iterator[tuple[str, np.ndarray]]:
        """
        Name, type and shape, and bytes of each weight of a tower, sorted by name, or of the whole model if no name has
        a prefix of the image tower.
        """
        weights = {name: one for name, one in self.model.state_dict().items() if name not in SIMILARITY_WEIGHTS}
        of_images = {name for name in weights if name.startswith(IMAGE_WEIGHTS)}
        for name in sorted(weights):
            if not of_images or (name in of_images) == (modality == "image"):
                yield described(name, weights[name])


def described(name: str, weight: torch.Tensor) -> tuple[str, np.ndarray]:
    """Name, type and shape of a weight, and its bytes."""
    content = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{name} {weight.dtype} {list(weight.shape)}", content


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
