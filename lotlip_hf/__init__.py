"""LoTLIP, a dual encoder of images and long texts for transformers. Importing it registers the Auto classes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)

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
from .text_encoder import LoTLIPTextEncoder, LoTLIPTextEncoderConfig

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from .encoding import encode_images, encode_texts

__version__ = "0.1.0"

for _config, _model in (
    (LoTLIPConfig, LoTLIPModel),
    (LoTLIPTextConfig, LoTLIPTextModel),
    (LoTLIPVisionConfig, LoTLIPVisionModel),
    (LoTLIPTextEncoderConfig, LoTLIPTextEncoder),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
AutoModelForZeroShotImageClassification.register(LoTLIPConfig, LoTLIPModel)
AutoTokenizer.register(LoTLIPConfig, fast_tokenizer_class=LoTLIPTokenizer)
AutoTokenizer.register(LoTLIPTextConfig, fast_tokenizer_class=LoTLIPTokenizer)
AutoTokenizer.register(LoTLIPTextEncoderConfig, fast_tokenizer_class=LoTLIPTokenizer)
AutoProcessor.register(LoTLIPConfig, LoTLIPProcessor)


def _push_to_hub(model: LoTLIPModel, repo_id: str, **kwargs: Any) -> "CommitInfo":
    """The whole checkpoint, with processor and model card; see [`~lotlip_hf.hub.push`]."""
    from .hub import push

    return push(model, repo_id, **kwargs)


LoTLIPModel.push_to_hub = _push_to_hub  # the stock method publishes the weights alone


def __getattr__(name: str) -> Any:
    if name in ("encode_images", "encode_texts"):
        return getattr(import_module(".encoding", __name__), name)
    if name in ("CLIPPromptTokenizer", "CLIPTextEncoder", "LoTLIPPromptTokenizer"):
        return getattr(import_module(".diffusion", __name__), name)
    # diffusers looks here for the base classes of a saved pipeline's components
    if name in ("PreTrainedModel", "PreTrainedTokenizerFast"):
        return getattr(import_module("transformers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
]
