"""LoTLIP, a dual encoder of images and long texts for transformers. Importing it makes the Auto classes know it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .auto import register_auto_classes

if TYPE_CHECKING:
    from .encoding import encode_images, encode_texts
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

# Public name -> where it lives. Imported when first asked for: torch and transformers take seconds.
_HOME = {
    "LoTLIPConfig": ".modeling.configuration_lotlip",
    "LoTLIPModel": ".modeling.modeling_lotlip",
    "LoTLIPPreTrainedModel": ".modeling.modeling_lotlip",
    "LoTLIPProcessor": ".modeling.processing_lotlip",
    "LoTLIPTextConfig": ".modeling.configuration_lotlip",
    "LoTLIPTextModel": ".modeling.modeling_lotlip",
    "LoTLIPTextModelWithProjection": ".modeling.modeling_lotlip",
    "LoTLIPTokenizer": ".modeling.tokenization_lotlip",
    "LoTLIPVisionConfig": ".modeling.configuration_lotlip",
    "LoTLIPVisionModel": ".modeling.modeling_lotlip",
    "LoTLIPVisionModelWithProjection": ".modeling.modeling_lotlip",
    "encode_images": ".encoding",
    "encode_texts": ".encoding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


__all__ = [
    "LoTLIPConfig",
    "LoTLIPModel",
    "LoTLIPPreTrainedModel",
    "LoTLIPProcessor",
    "LoTLIPTextConfig",
    "LoTLIPTextModel",
    "LoTLIPTextModelWithProjection",
    "LoTLIPTokenizer",
    "LoTLIPVisionConfig",
    "LoTLIPVisionModel",
    "LoTLIPVisionModelWithProjection",
    "encode_images",
    "encode_texts",
]

register_auto_classes()
