"""
LoTLIP, a dual encoder of images and long texts for transformers. After `import lotlip_hf` the Auto classes know it.
Nothing else is imported until it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .auto import register_when_used

if TYPE_CHECKING:
    from .diffusion.text_encoder import LoTLIPTextEncoder, LoTLIPTextEncoderConfig
    from .encoder import encode_images, encode_texts
    from .lora import lora_targets
    from .modeling.configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig
    from .modeling.modeling_lotlip import (
        LoTLIPModel,
        LoTLIPPreTrainedModel,
        LoTLIPTextModel,
        LoTLIPTextModelWithProjection,
        LoTLIPVisionModel,
        LoTLIPVisionModelWithProjection,
    )
    from .modeling.processing_lotlip import LoTLIPProcessor
    from .modeling.tokenization_lotlip import LoTLIPTokenizer

__version__ = "0.1.0"

__all__ = [
    "LoTLIPConfig",
    "LoTLIPModel",
    "LoTLIPPreTrainedModel",
    "LoTLIPProcessor",
    "LoTLIPTextConfig",
    "LoTLIPTextEncoder",
    "LoTLIPTextEncoderConfig",
    "LoTLIPTextModel",
    "LoTLIPTextModelWithProjection",
    "LoTLIPTokenizer",
    "LoTLIPVisionConfig",
    "LoTLIPVisionModel",
    "LoTLIPVisionModelWithProjection",
    "encode_images",
    "encode_texts",
    "lora_targets",
]

# Where each public name is defined.
_MODULES = {
    "LoTLIPConfig": ".modeling.configuration_lotlip",
    "LoTLIPTextConfig": ".modeling.configuration_lotlip",
    "LoTLIPVisionConfig": ".modeling.configuration_lotlip",
    "LoTLIPModel": ".modeling.modeling_lotlip",
    "LoTLIPPreTrainedModel": ".modeling.modeling_lotlip",
    "LoTLIPTextModel": ".modeling.modeling_lotlip",
    "LoTLIPTextModelWithProjection": ".modeling.modeling_lotlip",
    "LoTLIPVisionModel": ".modeling.modeling_lotlip",
    "LoTLIPVisionModelWithProjection": ".modeling.modeling_lotlip",
    "LoTLIPProcessor": ".modeling.processing_lotlip",
    "LoTLIPTokenizer": ".modeling.tokenization_lotlip",
    "LoTLIPTextEncoder": ".diffusion.text_encoder",
    "LoTLIPTextEncoderConfig": ".diffusion.text_encoder",
    "encode_images": ".encoder",
    "encode_texts": ".encoder",
    "lora_targets": ".lora",
    # what a saved pipeline of diffusers names
    "CLIPPromptTokenizer": ".diffusion.tokenizers",
    "CLIPTextEncoder": ".diffusion.swap",
    "LoTLIPPromptTokenizer": ".diffusion.tokenizers",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    # diffusers looks here for the base classes of a saved pipeline's components
    if name in ("PreTrainedModel", "PreTrainedTokenizerFast"):
        return getattr(import_module("transformers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_used()
