"""Tiny random configurations and inputs, shared by the tests."""

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    PreTrainedConfig,
    RobertaConfig,
    SiglipVisionConfig,
    ViTConfig,
    XLMRobertaConfig,
    masking_utils,
)

from lotlip_hf import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig

# What is saved beside a model, and beside the processor and tokenizer that go with it over BERT and over CLIP.
MODEL_CODE = {
    f"{name}_lotlip.py"
    for name in (
        *("backbones", "configuration", "fast_paths", "loss", "masking", "medoids"),
        *("modeling", "prepending", "projection"),
    )
}
CLIP_CODE = MODEL_CODE | {"processing_lotlip.py", "calls_lotlip.py"}
CODE = CLIP_CODE | {"tokenization_lotlip.py", "cleaning_lotlip.py", "sentences_lotlip.py"}

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
TEXT_SIZE = {**SIZE, "vocab_size": 99, "max_position_embeddings": 40}
IMAGE_SIZE = {**SIZE, "image_size": 32, "patch_size": 8}

TEXT_BACKBONES: dict[str, type[PreTrainedConfig]] = {
    "bert": BertConfig,
    "roberta": RobertaConfig,
    "xlm-roberta": XLMRobertaConfig,
    "clip": CLIPTextConfig,
}
VISION_BACKBONES: dict[str, tuple[type[PreTrainedConfig], str]] = {
    "vit": (ViTConfig, "cls"),
    "dinov2": (Dinov2Config, "cls"),
    "siglip": (SiglipVisionConfig, "pooler"),
    "clip": (CLIPVisionConfig, "pooler"),
}


def text_config(backbone: str = "bert", num_hidden_layers: int = 2, **kwargs: Any) -> LoTLIPTextConfig:
    """A text tower's configuration; no dropout, so that training mode is deterministic."""
    own = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if backbone == "clip":
        own = {"bos_token_id": 5, "eos_token_id": 6}  # as `input_ids` has them; no dropout is its default
    backbone_config = TEXT_BACKBONES[backbone](**{**TEXT_SIZE, **own, "num_hidden_layers": num_hidden_layers})
    return LoTLIPTextConfig(backbone_config=backbone_config, **{"projection_dim": 24, **kwargs})


def vision_config(backbone: str = "vit", num_hidden_layers: int = 2, **kwargs: Any) -> LoTLIPVisionConfig:
    """An image tower's configuration with the pooling that suits the backbone."""
    config_class, pooling = VISION_BACKBONES[backbone]
    backbone_config = config_class(**{**IMAGE_SIZE, "num_hidden_layers": num_hidden_layers})
    return LoTLIPVisionConfig(backbone_config=backbone_config, **{"pooling": pooling, **kwargs})


def config(
    text_backbone: str = "bert", vision_backbone: str = "vit", num_hidden_layers: int = 2, **kwargs: Any
) -> LoTLIPConfig:
    """Both towers, projected to 24 dimensions."""
    return LoTLIPConfig(
        text_config=text_config(text_backbone, num_hidden_layers, **kwargs),
        vision_config=vision_config(vision_backbone, num_hidden_layers),
        projection_dim=24,
    )


def leave_flex_attention_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has flex attention and its block masks computed as they are written: compiling takes a quarter of a minute."""
    monkeypatch.setattr("transformers.integrations.flex_attention.is_torchdynamo_compiling", lambda: True)
    create_block_mask = masking_utils.create_block_mask
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda **options: create_block_mask(**{**options, "_compile": False})
    )


def input_ids(*shape: int, pad_token_id: int = 0) -> torch.Tensor:
    """Random ids [..., L] of texts without padding: [CLS] is 5, [SEP] is 6, words are above."""
    ids = torch.randint(7, TEXT_SIZE["vocab_size"], shape)
    ids[..., 0], ids[..., -1] = 5, 6
    return ids


def pixel_values(batch_size: int = 3) -> torch.Tensor:
    """Random images [B, 3, 32, 32]."""
    return torch.randn(batch_size, 3, IMAGE_SIZE["image_size"], IMAGE_SIZE["image_size"])
