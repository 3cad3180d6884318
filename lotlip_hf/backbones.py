"""Creates a LoTLIP model from two pretrained encoders, see [`from_backbones`]."""

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .adapter_check import check_adapter
from .loading import checkpoint_name, naming_damage, quiet
from .modeling.backbones_lotlip import DecoderBackbone
from .modeling.configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig
from .modeling.modeling_lotlip import LoTLIPModel
from .sentence_folder import SentenceFolder, read_sentence_folder

logger = logging.getLogger(__name__)


def from_backbones(
    text: str | Path | PreTrainedModel,
    vision: str | Path | PreTrainedModel,
    num_corner_tokens: int = 2,
    *,
    text_pooling: str | None = None,
    text_attention: Literal["causal", "bidirectional"] | None = None,
    token_prepending: tuple[int, int] | None = None,
    placeholder_token_id: int | None = None,
    vision_pooling: str | None = None,
    pooled_layers: int = 1,
    vision_projection: bool = False,
    projection_dim: int | None = None,
    text_projection: Literal["linear", "residual_mlp"] = "linear",
    text_projection_layers: int = 4,
    text_projection_expansion: int = 2,
    **config_kwargs: Any,
) -> LoTLIPModel:
    """
    Creates a model whose towers start from two pretrained encoders, as in LiT (https://arxiv.org/abs/2111.07991). The
    corner tokens, the projections and the logit scale are new and must be trained.

    The text tower starts with the features of its encoder, for any number of corner tokens: learned positions of words
    move behind those of the corner tokens, so that no length is lost. A folder of sentence-transformers also sets the
    pooling, and its linear layers after pooling become the text projection if `projection_dim` is their width.

    Args:
        text (`str` or `Path` or `PreTrainedModel`): Folder, Hub id or model of a text encoder, see
            [`LoTLIPTextConfig`]. For a whole CLIP, its text tower is used without the projection; `lotlip convert
            clip` converts the whole CLIP. For the folder of a whole T5, its encoder is used.
        vision (`str` or `Path` or `PreTrainedModel`): Folder, Hub id or model of an image encoder: ViT, DINOv2,
            DINOv3, CLIP, SigLIP, SigLIP 2, ConvNeXt or a model of timm. For a whole CLIP or SigLIP, its image tower is
            used.
        num_corner_tokens (`int`, *optional*, defaults to 2): Number of corner tokens.
        text_pooling (`str`, *optional*): Pooling of the text tower, see [`LoTLIPTextConfig`]. Defaults to that of a
            sentence-transformers folder, else to that of the encoder's family. For a BERT or RoBERTa without the
            weights of a pooler, the default is `"cls"`, and `"pooler"` adds a new pooler.
        text_attention (`str`, *optional*): `"causal"` or `"bidirectional"` attention of a decoder. Defaults to that of
            its configuration.
        token_prepending (`tuple[int, int]`, *optional*): Layers of token prepending, see [`LoTLIPTextConfig`].
        placeholder_token_id (`int`, *optional*): Id of its placeholder, see [`LoTLIPTextConfig`].
        vision_pooling (`str`, *optional*): Pooling of the image tower, see [`LoTLIPVisionConfig`].
        pooled_layers (`int`, *optional*, defaults to 1): Number of last layers of the image tower whose pooled states
            are joined, see [`LoTLIPVisionConfig`].
        vision_projection (`bool`, *optional*, defaults to `False`): Whether the image tower has a projection also if
            its width is `projection_dim`, for a frozen image encoder.
        projection_dim (`int`, *optional*): Width of the shared space. Defaults to the width of the image encoder,
            which then has no projection if its pooled states have this width. With the width of the text encoder, the
            text tower has no projection and starts with the embeddings of its encoder.
        text_projection (`str`, *optional*, defaults to `"linear"`): Kind of the text projection, see
            [`LoTLIPTextConfig`].
        text_projection_layers (`int`, *optional*, defaults to 4): Number of blocks of a `"residual_mlp"`.
        text_projection_expansion (`int`, *optional*, defaults to 2): Inner width of its blocks, as a factor.
        **config_kwargs: More fields of [`LoTLIPConfig`].

    Returns:
        [`LoTLIPModel`]: The new model.

    Raises:
        `ValueError`: If an encoder or its pooling is not supported, if an encoder of a family without an adapter
            does not obey the masks of corner tokens, or if it lacks weights other than the pooler's.

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
    text_backbone, vision_backbone = _backbone_config(text, "text"), _backbone_config(vision, "vision")
    folder = None if isinstance(text, PreTrainedModel) else read_sentence_folder(text)
    pooling = folder.pooling if text_pooling is None and folder is not None else text_pooling
    text_config = LoTLIPTextConfig(
        backbone_config=text_backbone,
        num_corner_tokens=num_corner_tokens,
        pooling=pooling,
        attention=text_attention,
        projection=text_projection,
        projection_layers=text_projection_layers,
        projection_expansion=text_projection_expansion,
        token_prepending=token_prepending,
        placeholder_token_id=placeholder_token_id,
    )
    vision_config = LoTLIPVisionConfig(
        backbone_config=vision_backbone, pooling=vision_pooling, pooled_layers=pooled_layers
    )
    text_weights = _load_weights(text, "text", text_config)
    vision_weights = _load_weights(vision, "vision", vision_config)
    if pooling is None and text_config.pooling == "pooler" and not any(map(_is_of_pooler, text_weights)):
        text_config.pooling = "cls"
        logger.warning("%s has no pooler. `text_pooling` is 'cls': pass 'pooler' for a new one.", _name(text))
    text_weights = _make_room(text_weights, text_config)

    width = projection_dim or vision_config.hidden_size
    dense = _dense(folder, text_config, width)
    text_config.projection_dim = width
    if projection_dim == text_config.hidden_size and dense is None:
        text_config.projection_dim = None
    if vision_projection:
        vision_config.projection_dim = width
    towers = {"text_config": text_config, "vision_config": vision_config}
    model = LoTLIPModel(LoTLIPConfig(**towers, projection_dim=width, **config_kwargs))
    for tower, source, weights in (
        (model.text_model, text, text_weights),
        (model.vision_model, vision, vision_weights),
    ):
        keys = tower.backbone.load_state_dict(weights, strict=False)
        missing, unexpected = _without_pooler(keys.missing_keys), _without_pooler(keys.unexpected_keys)
        if missing or unexpected:
            raise ValueError(
                f"{_name(source)} does not fit the {tower.base_model_prefix}: missing {missing}, unexpected "
                f"{unexpected}. Pass an encoder with all weights."
            )
    if dense is not None:
        with torch.no_grad():
            model.text_projection.weight.copy_(dense)
    check_adapter(model.text_model)
    return model


def _make_room(weights: dict[str, Tensor], config: LoTLIPTextConfig) -> dict[str, Tensor]:
    """
    Moves the learned positions of words behind those of the corner tokens. The positions of corner tokens start as
    copies, so that both are as in a tower whose words move instead.
    """
    family, backbone, number = config.family, config.backbone_config, config.num_corner_tokens
    table = weights.get(family.position_table)
    if table is None or not number or not family.words_skip_corners:
        return weights
    first = family.position_offset(backbone) + 1
    backbone.max_position_embeddings += number
    return {**weights, family.position_table: torch.cat([table[: first + number], table[first:]])}


def _dense(folder: SentenceFolder | None, config: LoTLIPTextConfig, width: int) -> Tensor | None:
    """The linear layers of a sentence-transformers folder, if they fit the text projection."""
    if folder is None:
        return None
    dense, left_out = folder.dense, list(folder.left_out)
    if dense is not None and config.projection != "linear":
        left_out.append(f"Dense does not fit the text projection {config.projection!r}")
        dense = None
    elif dense is not None and dense.shape != (width, config.hidden_size):
        left_out.append(f"Dense has the shape {list(dense.shape)}: pass its width as `projection_dim`")
        dense = None
    if left_out:
        logger.warning("%s: the new model differs. %s.", folder.source, "; ".join(left_out))
    return dense


def _is_of_pooler(name: str) -> bool:
    return name.startswith("pooler.")


def _without_pooler(names: Iterable[str]) -> list[str]:
    """Drops the names of the pooler, which masked language models lack. Its weights are then new."""
    return sorted(name for name in names if not _is_of_pooler(name))


def _backbone_config(source: str | Path | PreTrainedModel, tower: str) -> PreTrainedConfig:
    """Configuration of an encoder, or of a tower of a whole CLIP, without the name of its folder."""
    if isinstance(source, PreTrainedModel):
        config = copy.deepcopy(source.config)
    else:
        name = checkpoint_name(source)
        with naming_damage(name):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    config = getattr(config, f"{tower}_config", config)
    config._name_or_path = ""
    return config


def _load_weights(
    source: str | Path | PreTrainedModel, tower: str, config: LoTLIPTextConfig | LoTLIPVisionConfig
) -> dict[str, Tensor]:
    """Weights of an encoder, without the names of new ones."""
    if isinstance(source, PreTrainedModel):
        return _encoder(source, tower).state_dict()
    whole = AutoConfig.from_pretrained(source, trust_remote_code=False)
    is_inside = isinstance(config.family, DecoderBackbone) and hasattr(whole, "text_config")
    with quiet():
        encoder, info = config.family.auto_class.from_pretrained(
            source,
            config=whole if is_inside else copy.deepcopy(config.backbone_config),
            trust_remote_code=False,
            output_loading_info=True,
            **config.family.pooling_layer(config.pooling),
        )
    missing = _without_pooler(info["missing_keys"])
    if missing:
        raise ValueError(f"{source}: weights are missing: {', '.join(missing)}. Pass an encoder with all weights.")
    weights = _encoder(encoder, tower).state_dict()
    return {name: tensor for name, tensor in weights.items() if name not in info["missing_keys"]}


def _name(source: str | Path | PreTrainedModel) -> str:
    return f"The {type(source).__name__}" if isinstance(source, PreTrainedModel) else str(source)


def _encoder(model: PreTrainedModel, tower: str) -> PreTrainedModel:
    """The encoder in a model with a head or a projection, in a whole CLIP, or in a language model that sees images."""
    encoder: Any = getattr(model, f"{tower}_model", model)
    if encoder is model and tower == "text" and model.can_generate():
        encoder = model.base_model
    return getattr(encoder, "language_model", encoder) if tower == "text" else encoder
