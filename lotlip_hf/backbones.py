"""A new LoTLIP model of two pretrained encoders: [`from_backbones`]."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    **config_kwargs: Any,
) -> LoTLIPModel:
    """
    A model whose towers start from two pretrained encoders, as in LiT (https://arxiv.org/abs/2111.07991). The
    corner tokens, the projections, the logit scale, and a pooler that an encoder comes without, are new and must
    be trained.

    Args:
        text: Folder, Hub id or model of a BERT, RoBERTa, XLM-RoBERTa or CLIP text encoder; of a whole CLIP its
            text tower, without the projection (a whole CLIP turned into LoTLIP is what `conversion.clip` makes).
        vision: Folder, Hub id or model of a ViT, DINOv2, CLIP or SigLIP encoder; of a whole CLIP or SigLIP its
            image tower.
        num_corner_tokens: Number of corner tokens.
        text_pooling: See [`LoTLIPTextConfig`].
        vision_pooling: See [`LoTLIPVisionConfig`].
        projection_dim: Width of the shared space; by default the image encoder's, which then has no projection.
        config_kwargs: More fields of [`LoTLIPConfig`].

    Raises:
        ValueError: if an encoder is of a type that is not supported, or lacks other weights that its tower needs.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel, ViTConfig, ViTModel
    >>> from lotlip_hf import from_backbones

    >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> text, vision = BertModel(BertConfig(**size)), ViTModel(ViTConfig(**size))
    >>> model = from_backbones(text, vision, num_corner_tokens=2)
    >>> model.config.projection_dim
    32
    ```
    """
    text_config = LoTLIPTextConfig(
        backbone_config=_backbone_config(text, "text"), num_corner_tokens=num_corner_tokens, pooling=text_pooling
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
                f"The encoder {type(encoder).__name__} does not fit the {tower.base_model_prefix}: missing "
                f"{missing}, unexpected {unexpected}."
            )
    return model


def _without_pooler(names: Iterable[str]) -> list[str]:
    """Masked language models come without a pooler: where a tower needs one it is new, as the corner tokens are."""
    return sorted(name for name in names if not name.startswith("pooler."))


def _backbone_config(source: str | Path | PreTrainedModel, tower: str) -> PreTrainedConfig:
    """Of an encoder, or of one tower of a whole CLIP; without the folder it lay in, which is nothing to publish."""
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
        # the classes with a projection hold the encoder under the tower's name, too
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
        raise ValueError(f"{source}: the encoder lacks weights that its tower needs: {', '.join(missing)}.")
    return encoder
