"""Creates a LoTLIP model from two pretrained encoders, see [`from_backbones`]."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .modeling.configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig
from .modeling.modeling_lotlip import LoTLIPModel


def from_backbones(
    text: str | Path | PreTrainedModel,
    vision: str | Path | PreTrainedModel,
    num_corner_tokens: int = 2,
    *,
    text_pooling: str | None = None,
    vision_pooling: str | None = None,
    projection_dim: int | None = None,
    text_projection: Literal["linear", "residual_mlp"] = "linear",
    text_projection_layers: int = 4,
    **config_kwargs: Any,
) -> LoTLIPModel:
    """
    Creates a model whose towers start from two pretrained encoders, as in LiT (https://arxiv.org/abs/2111.07991). The
    corner tokens, the projections, the logit scale, and a pooler that an encoder lacks are new and must be trained.

    Args:
        text (`str` or `Path` or `PreTrainedModel`): Folder, Hub id or model of a BERT, RoBERTa, XLM-RoBERTa or CLIP
            text encoder. For a whole CLIP, its text tower is used without the projection; `lotlip convert clip`
            converts the whole CLIP.
        vision (`str` or `Path` or `PreTrainedModel`): Folder, Hub id or model of a ViT, DINOv2, CLIP or SigLIP image
            encoder. For a whole CLIP or SigLIP, its image tower is used.
        num_corner_tokens (`int`, *optional*, defaults to 2): Number of corner tokens.
        text_pooling (`str`, *optional*): Pooling of the text tower, see [`LoTLIPTextConfig`].
        vision_pooling (`str`, *optional*): Pooling of the image tower, see [`LoTLIPVisionConfig`].
        projection_dim (`int`, *optional*): Width of the shared space. Defaults to the width of the image encoder,
            which then has no projection.
        text_projection (`str`, *optional*, defaults to `"linear"`): Kind of the text projection, see
            [`LoTLIPTextConfig`].
        text_projection_layers (`int`, *optional*, defaults to 4): Number of blocks of a `"residual_mlp"`.
        **config_kwargs: More fields of [`LoTLIPConfig`].

    Returns:
        [`LoTLIPModel`]: The new model.

    Raises:
        `ValueError`: If an encoder is not supported, or if it lacks weights other than the pooler's.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel, ViTConfig, ViTModel
    >>> from lotlip_hf import from_backbones

    >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = from_backbones(BertModel(BertConfig(**size)), ViTModel(ViTConfig(**size)), num_corner_tokens=2)
    >>> model.config.projection_dim
    32
    ```
    """
    text_config = LoTLIPTextConfig(
        backbone_config=_backbone_config(text, "text"),
        num_corner_tokens=num_corner_tokens,
        pooling=text_pooling,
        projection=text_projection,
        projection_layers=text_projection_layers,
    )
    vision_config = LoTLIPVisionConfig(backbone_config=_backbone_config(vision, "vision"), pooling=vision_pooling)
    text_encoder = _load_backbone(text, "text", text_config)
    vision_encoder = _load_backbone(vision, "vision", vision_config)
    text_config.projection_dim = projection_dim or vision_config.hidden_size
    towers = {"text_config": text_config, "vision_config": vision_config}
    model = LoTLIPModel(LoTLIPConfig(**towers, projection_dim=text_config.projection_dim, **config_kwargs))
    for tower, encoder in ((model.text_model, text_encoder), (model.vision_model, vision_encoder)):
        keys = tower.backbone.load_state_dict(encoder.state_dict(), strict=False)
        missing, unexpected = _without_pooler(keys.missing_keys), _without_pooler(keys.unexpected_keys)
        if missing or unexpected:
            raise ValueError(
                f"The {type(encoder).__name__} does not fit the {tower.base_model_prefix}: missing {missing}, "
                f"unexpected {unexpected}. Pass an encoder with all weights."
            )
    return model


def _without_pooler(names: Iterable[str]) -> list[str]:
    """Drops the names of the pooler, which masked language models lack. Its weights are then new."""
    return sorted(name for name in names if not name.startswith("pooler."))


def _backbone_config(source: str | Path | PreTrainedModel, tower: str) -> PreTrainedConfig:
    """Configuration of an encoder, or of a tower of a whole CLIP, without the name of its folder."""
    config = (
        copy.deepcopy(source.config)
        if isinstance(source, PreTrainedModel)
        else AutoConfig.from_pretrained(source, trust_remote_code=False)
    )
    config = getattr(config, f"{tower}_config", config)
    config._name_or_path = ""
    return config


def _load_backbone(
    source: str | Path | PreTrainedModel, tower: str, config: LoTLIPTextConfig | LoTLIPVisionConfig
) -> PreTrainedModel:
    if isinstance(source, PreTrainedModel):
        # In classes with a projection, the encoder is an attribute with the tower's name.
        return getattr(source, f"{tower}_model", source)
    encoder, info = AutoModel.from_pretrained(
        source,
        config=copy.deepcopy(config.backbone_config),
        trust_remote_code=False,
        output_loading_info=True,
        **config.family.pooling_layer(config.pooling),
    )
    missing = _without_pooler(info["missing_keys"])
    if missing:
        raise ValueError(f"{source}: weights are missing: {', '.join(missing)}. Pass an encoder with all weights.")
    return encoder
