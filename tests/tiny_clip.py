"""Tiny CLIP and SigLIP checkpoints of stock transformers classes with real tokenizers, shared by the tests."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

WORDS = ("a", "cat", "dog", "photo", "of", "the", "red", "car", "and", "house")
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
IMAGE_SIZE = {"image_size": 32, "patch_size": 8}
PROJECTION_DIM = 24


def clip_tokenizer(max_length: int = 77, **kwargs: Any) -> CLIPTokenizer:
    """
    CLIP's byte-level BPE with merges for `WORDS` alone, so that any text has tokens. As in CLIP, the special tokens
    are the last two of the vocabulary and padding is [EOT] (`pad_token=...` for another).
    """
    byte_tokens = list(bytes_to_unicode().values())
    vocabulary, merges = byte_tokens + [token + "</w>" for token in byte_tokens], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            parts[:2] = ["".join(parts[:2])]
            if merge not in merges:
                merges.append(merge)
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: place for place, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(
        vocab=ids, merges=[tuple(merge.split()) for merge in merges], model_max_length=max_length, **kwargs
    )


def clip_text_config(**kwargs: Any) -> CLIPTextConfig:
    """Configuration of a text tower for [`clip_tokenizer`]."""
    tokenizer = clip_tokenizer()
    settings = {
        **SIZE,
        "vocab_size": len(tokenizer),
        "projection_dim": PROJECTION_DIM,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**settings, **kwargs})


def clip_config(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> CLIPConfig:
    """Configuration of both towers; `text` and `vision` override single fields."""
    return CLIPConfig(
        text_config=clip_text_config(**(text or {})).to_dict(),
        vision_config={**SIZE, **IMAGE_SIZE, "projection_dim": PROJECTION_DIM, **(vision or {})},
        projection_dim=PROJECTION_DIM,
    )


def random_weights(model: nn.Module, seed: int = 0) -> None:
    """Gives every weight another random value, norms and biases included, so that no swapped tensor can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # a weight of norms is about 1; all others are about as large as keeps hidden states of the same size
            is_norm_weight = name.endswith("weight") and parameter.dim() == 1
            parameter.copy_(1 + 0.1 * noise if is_norm_weight else 0.2 * noise)
            if name.endswith("logit_scale"):
                parameter.fill_(3.0)


def clip_model(config: CLIPConfig | None = None, seed: int = 0) -> CLIPModel:
    """A random `CLIPModel` in evaluation mode."""
    model = CLIPModel(config or clip_config())
    random_weights(model, seed)
    return model.eval()


def clip_text_model(
    with_projection: bool = False, seed: int = 0, **kwargs: Any
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A random text tower in evaluation mode; `kwargs` are fields of its configuration."""
    model = (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(clip_text_config(**kwargs))
    random_weights(model, seed)
    return model.eval()


def image_processor() -> CLIPImageProcessorPil:
    """CLIP's own, for tiny images."""
    size = IMAGE_SIZE["image_size"]
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def save_clip(
    folder: str | Path, model: PreTrainedModel | None = None, tokenizer: CLIPTokenizer | None = None
) -> PreTrainedModel:
    """
    Writes a checkpoint folder: the model (by default `clip_model()`), its tokenizer and, for a whole CLIP, the image
    processor; returns the model.
    """
    model = model or clip_model()
    if tokenizer is None:
        tokenizer = clip_tokenizer(model.config.get_text_config().max_position_embeddings)
    model.save_pretrained(folder)
    if isinstance(model, CLIPModel):
        CLIPProcessor(image_processor(), tokenizer).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
    return model


def save_siglip(folder: str | Path, tokenizer: str | Path) -> None:
    """Writes a checkpoint folder of a SigLIP with BERT's tokenizer of another folder, for texts of 24 tokens."""
    torch.manual_seed(0)
    bert = BertTokenizer.from_pretrained(tokenizer, model_max_length=24)
    bert.model_input_names = ["input_ids"]
    text = {**SIZE, "vocab_size": len(bert), "max_position_embeddings": 24, "pad_token_id": 0}
    SiglipModel(SiglipConfig(text_config=text, vision_config={**SIZE, **IMAGE_SIZE})).save_pretrained(folder)
    SiglipProcessor(image_processor(), bert).save_pretrained(folder)


def texts(count: int = 8, longest: int = 100) -> list[str]:
    """Texts of 0 to `longest` words of one token each, in random order, beside some with bytes and punctuation."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(0, longest, count).int().tolist()
    drawn = [torch.randint(len(WORDS), (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(WORDS[place] for place in words) for words in drawn] + ["Ein Häuschen, 3 Katzen!", "<|x|> é 漢"]
