"""Registers LoTLIP in transformers' Auto classes when it is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer

from .modeling.configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig
from .modeling.modeling_lotlip import LoTLIPModel, LoTLIPTextModel, LoTLIPVisionModel
from .modeling.processing_lotlip import LoTLIPProcessor
from .modeling.tokenization_lotlip import LoTLIPTokenizer

for config, model in (
    (LoTLIPConfig, LoTLIPModel),
    (LoTLIPTextConfig, LoTLIPTextModel),
    (LoTLIPVisionConfig, LoTLIPVisionModel),
):
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
AutoModelForZeroShotImageClassification.register(LoTLIPConfig, LoTLIPModel)
for config in (LoTLIPConfig, LoTLIPTextConfig):
    AutoTokenizer.register(config, fast_tokenizer_class=LoTLIPTokenizer)
AutoProcessor.register(LoTLIPConfig, LoTLIPProcessor)
