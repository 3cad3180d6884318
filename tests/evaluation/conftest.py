"""Encoders that the tests of evaluation share."""

from pathlib import Path

import pytest
from transformers import ModernBertConfig, ViTConfig

import tiny_clip
from lotlip_hf import (
    Encoder,
    LoTLIPConfig,
    LoTLIPModel,
    LoTLIPProcessor,
    LoTLIPTextConfig,
    LoTLIPTokenizer,
    LoTLIPVisionConfig,
    load_encoder,
)


@pytest.fixture(scope="module")
def lotlip(official_checkpoint: Path) -> Encoder:
    return load_encoder(official_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip.save_clip(folder)
    return load_encoder(folder, device="cpu")


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Encoder:
    """A ModernBERT text tower with layers of global and of sliding attention, for 2,048 tokens."""
    folder = tmp_path_factory.mktemp("modernbert")
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    ids = {"pad_token_id": 0, "cls_token_id": 101, "bos_token_id": 101, "sep_token_id": 102, "eos_token_id": 102}
    text = ModernBertConfig(
        **size, **ids, vocab_size=30522, max_position_embeddings=2048, local_attention=16, global_attn_every_n_layers=2
    )
    vision = ViTConfig(**size, image_size=32, patch_size=16)
    model = LoTLIPModel(
        LoTLIPConfig(
            text_config=LoTLIPTextConfig(backbone_config=text),
            vision_config=LoTLIPVisionConfig(backbone_config=vision),
        )
    )
    model.save_pretrained(folder)
    tokenizer = LoTLIPTokenizer.from_pretrained(golden / "tokenizer", model_max_length=2048)
    LoTLIPProcessor(tiny_clip.image_processor(), tokenizer).save_pretrained(folder)
    return load_encoder(folder, device="cpu")
