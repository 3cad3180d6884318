"""LoTLIP, a dual encoder of images and long texts for transformers. `import lotlip_hf` registers the Auto classes."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbones import from_backbones
    from .diffusion.text_encoder import LoTLIPTextEncoder, LoTLIPTextEncoderConfig
    from .encoder import Encoder, load_encoder
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
    from .training.trainer import LoTLIPTrainer

__version__ = "0.1.0"

__all__ = [
    "Encoder",
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
    "LoTLIPTrainer",
    "LoTLIPVisionConfig",
    "LoTLIPVisionModel",
    "LoTLIPVisionModelWithProjection",
    "from_backbones",
    "load_encoder",
    "lora_targets",
]

# Public name -> module that defines it.
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
    "LoTLIPTrainer": ".training.trainer",
    "LoTLIPTextEncoder": ".diffusion.text_encoder",
    "LoTLIPTextEncoderConfig": ".diffusion.text_encoder",
    "Encoder": ".encoder",
    "from_backbones": ".backbones",
    "load_encoder": ".encoder",
    "lora_targets": ".lora",
    # Class names that saved pipelines of diffusers contain.
    "CLIPPromptTokenizer": ".diffusion.tokenizers",
    "CLIPTextEncoder": ".diffusion.swap",
    "LoTLIPPromptTokenizer": ".diffusion.tokenizers",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    # diffusers looks up the base classes of a pipeline's components in this module.
    if name in ("PreTrainedModel", "PreTrainedTokenizerFast"):
        return getattr(import_module("transformers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# `lotlip --help` must not import PyTorch, so the command line registers the Auto classes later, in `loading`.
if [os.path.abspath(path) for path in sys.argv[:1]] != [os.path.join(os.path.dirname(sys.executable or ""), "lotlip")]:
    from . import auto as auto
    from .diffusion import text_encoder as text_encoder

    def _push_to_hub(model: "LoTLIPModel", repo_id: str, **kwargs: Any) -> Any:
        """Publishes the whole checkpoint with processor and model card, see [`~lotlip_hf.hub.push.push`]."""
        from .hub.push import push

        return push(model, repo_id, **kwargs)

    auto.LoTLIPModel.push_to_hub = _push_to_hub  # the stock method publishes only the weights
