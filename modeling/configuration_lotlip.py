"""Configurations of LoTLIP: two stock transformers backbones and the fields that LoTLIP adds to them."""

import copy
import dataclasses
import math
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .backbones_lotlip import TEXT_BACKBONES, VISION_BACKBONES, DecoderBackbone, is_causal, text_family

# Version of the files that these classes write. Increase the version if older code would misread newer files.
FORMAT_VERSION = 1


class _LoTLIPBaseConfig(PreTrainedConfig):
    """Fields of all LoTLIP configurations: the version of the format and the `auto_map` of the published code."""

    _auto_class = "AutoConfig"
    auto_classes: ClassVar[dict[str, str]] = {}  # auto class -> model class; `AutoConfig` is added below

    format_version: int = FORMAT_VERSION

    def _check_version(self) -> None:
        """Runs before other checks, because a newer version may have changed any other field."""
        if self.format_version > FORMAT_VERSION:
            advice = "Upgrade lotlip-hf, or load the checkpoint's own code with `trust_remote_code=True`"
            raise ValueError(f"`format_version` {self.format_version} of {type(self).__name__} is too new. {advice}.")

    def __post_init__(self, **kwargs: Any) -> None:
        auto_map = {name: f"modeling_lotlip.{class_name}" for name, class_name in self.auto_classes.items()}
        auto_map["AutoConfig"] = f"configuration_lotlip.{type(self).__name__}"
        # Drop entries "repo--module.Class": they would run code of another repository.
        given = kwargs.pop("auto_map", None) or {}
        own = {name: ref for name, ref in given.items() if isinstance(ref, str) and "--" not in ref}
        self.auto_map = {**auto_map, **own}
        super().__post_init__(**kwargs)


class _LoTLIPTowerConfig(_LoTLIPBaseConfig):
    """Fields of both towers. Other attributes are read from and written to `backbone_config`."""

    sub_configs: ClassVar[dict[str, type]] = {"backbone_config": AutoConfig}
    default_backbone: ClassVar[dict[str, Any]] = {}
    families: ClassVar[dict[str, Any]] = {}
    takes_others: ClassVar[bool] = False  # whether an adapter can be made for other families

    backbone_config: PreTrainedConfig | dict | None = None
    pooling: str | None = None
    projection_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_version()
        backbone = self.default_backbone if self.backbone_config is None else self.backbone_config
        if isinstance(backbone, dict):
            backbone = {"model_type": self.default_backbone["model_type"], **backbone}
        model_type = backbone["model_type"] if isinstance(backbone, dict) else backbone.model_type
        if str(model_type) not in self.families and not (self.takes_others and str(model_type) in CONFIG_MAPPING):
            supported = ", ".join(self.families)
            tower = "Text" if self.takes_others else "Image"
            raise ValueError(
                f"{tower} encoders of model_type {model_type!r} are not supported. Use one of {supported}."
            )
        # Copy, because the config may belong to a live model whose attention implementation would be reset.
        backbone = AutoConfig.for_model(**backbone) if isinstance(backbone, dict) else copy.deepcopy(backbone)
        for name in {field.name for field in dataclasses.fields(backbone)} & kwargs.keys():
            setattr(backbone, name, kwargs.pop(name))
        self.backbone_config = backbone
        if self.pooling is None:
            self.pooling = self.family.choose_pooling(self.backbone_config)
        super().__post_init__(**kwargs)

    def validate_pooling(self) -> None:
        self.family.check_pooling(self.backbone_config, self.pooling)

    def _is_of_backbone(self, name: str) -> bool:
        backbone = self.__dict__.get("backbone_config")
        if not isinstance(backbone, PreTrainedConfig) or hasattr(type(self), name):
            return False
        return name in backbone.attribute_map or name in backbone.__dataclass_fields__

    def __getattr__(self, name: str) -> Any:
        if self._is_of_backbone(name):
            return getattr(self.backbone_config, name)
        if name == "hidden_size" and isinstance(self.__dict__.get("backbone_config"), PreTrainedConfig):
            return self.family.hidden_size(self.backbone_config)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__ and self._is_of_backbone(name):
            setattr(self.backbone_config, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def family(self) -> Any:
        """Adapter of the backbone's family, see `backbones_lotlip`."""
        return self.families[self.backbone_config.model_type]

    @property
    def pooled_size(self) -> int:
        """Width of the pooled states: the backbone's hidden size for each pooling that a `+` joins."""
        return self.hidden_size * len(self.pooling.split("+"))

    @property
    def output_size(self) -> int:
        """Width of the tower's features: `projection_dim`, or that of the pooled states without a projection."""
        return self.pooled_size if self.projection_dim is None else self.projection_dim


@strict
class LoTLIPTextConfig(_LoTLIPTowerConfig):
    """
    Configuration of a LoTLIP text tower: a text encoder with learnable corner tokens.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*): Configuration of the text encoder: an encoder such
            as BERT, ModernBERT or T5, a decoder such as Qwen3, CLIP's text tower, or another class of transformers
            that accepts `inputs_embeds` and a mask. Defaults to BERT-base. Its fields are also arguments of this
            class.
        num_corner_tokens (`int`, *optional*, defaults to 2): Number m of corner tokens. They use m positions in
            decoders and in encoders with learned positions, and none in the others.
        pooling (`str`, *optional*): `"pooler"`: a layer of the backbone on the state of [CLS], as in the released
            models; `"cls"`: the state of [CLS]; `"mean"`: the mean over the text; `"eos"`: the state of CLIP's [EOT].
            `"last"`: the state of a decoder's last token; `"weighted_mean"`: a decoder's mean with the weights
            1, 2, ... Defaults to that of the family, such as `"pooler"` for BERT and RoBERTa.
        projection_dim (`int`, *optional*, defaults to 768): Width of the projection. `None` adds no linear projection.
        projection (`str`, *optional*, defaults to `"linear"`): `"linear"`, or `"residual_mlp"`: LLM2CLIP's residual
            MLP on the normalised pooled state, for frozen text towers.
        projection_layers (`int`, *optional*, defaults to 4): Number of blocks of the residual MLP.
        projection_expansion (`int`, *optional*, defaults to 2): Inner width of its blocks, as a factor of their width.
        token_prepending (`tuple[int, int]`, *optional*): First and last layer, counted from 0, in which a placeholder
            starts from the last token's state of the layer before (https://arxiv.org/abs/2412.11556). For decoders. To
            pool the states of an intermediate layer, load the decoder with fewer `num_hidden_layers`.
        placeholder_token_id (`int`, *optional*): Id of the placeholder, a token of the tokenizer's `prompt_template`
            before the text.
        attention (`str`, *optional*): `"causal"` or `"bidirectional"` attention of a decoder. Defaults to that of
            `backbone_config`.

    ```python
    >>> from lotlip_hf import LoTLIPTextConfig
    >>> LoTLIPTextConfig(num_corner_tokens=4).max_position_embeddings  # BERT has 512
    508
    ```
    """

    model_type = "lotlip_text_model"
    auto_classes = {"AutoModel": "LoTLIPTextModel"}
    base_config_key = "text_config"
    default_backbone = {"model_type": "bert"}
    families = TEXT_BACKBONES
    takes_others = True

    backbone_config: PreTrainedConfig | dict | None = None
    num_corner_tokens: int = 2
    pooling: str | None = None
    projection_dim: int | None = 768
    projection: Literal["linear", "residual_mlp"] = "linear"
    projection_layers: int = 4
    projection_expansion: int = 2
    attention: Literal["causal", "bidirectional"] | None = None
    token_prepending: tuple[int, int] | list[int] | None = None
    placeholder_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.token_prepending is not None:
            self.token_prepending = tuple(self.token_prepending)
        super().__post_init__(**kwargs)
        if not isinstance(self.family, DecoderBackbone):
            return
        if self.attention is None:
            self.attention = "causal" if is_causal(self.backbone_config) else "bidirectional"
        self.family.set_attention(self.backbone_config, self.attention)

    def validate_attention(self) -> None:
        if self.attention is not None and not isinstance(self.family, DecoderBackbone):
            name = self.backbone_config.model_type
            raise ValueError(f"`attention={self.attention!r}` does not fit {name}, which is no decoder. Leave it out.")
        if self.attention == "causal" and not is_causal(self.backbone_config):
            raise ValueError("`attention='causal'` contradicts `use_bidirectional_attention` of the backbone.")

    def validate_token_prepending(self) -> None:
        if self.token_prepending is None:
            return
        if not isinstance(self.family, DecoderBackbone) or self.placeholder_token_id is None:
            raise ValueError("`token_prepending` needs a decoder and `placeholder_token_id`.")
        if self.token_prepending[0] < 1:
            raise ValueError(f"`token_prepending`={self.token_prepending}: use the first, from 1, and the last layer.")

    def validate_corner_tokens(self) -> None:
        if self.num_corner_tokens < 0 or self.max_position_embeddings < 2:
            raise ValueError(f"`num_corner_tokens`={self.num_corner_tokens}: use 0 or more, and leave room for text.")

    @property
    def family(self) -> Any:
        """Adapter of the text encoder's family, see `backbones_lotlip`."""
        return text_family(self.backbone_config)

    @property
    def max_position_embeddings(self) -> int:
        """Maximum length in tokens, with [CLS] and [SEP]: the backbone's positions minus the corner tokens."""
        return self.family.max_length(self.backbone_config, self.num_corner_tokens)


@strict
class LoTLIPVisionConfig(_LoTLIPTowerConfig):
    """
    Configuration of a LoTLIP image tower.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*): Configuration of the image encoder: ViT, DINOv2
            (also with registers), DINOv3, CLIP, SigLIP, SigLIP 2, ConvNeXt, ConvNeXt V2 or a model of timm. Defaults
            to ViT-B/16 with timm's `layer_norm_eps`. Its fields are also arguments of this class.
        pooling (`str`, *optional*): `"cls"`: the class token after the final norm, the default of ViT, DINOv2 and
            DINOv3; `"pooler"`: the backbone's pooled output, the default of the others; `"mean"`: the mean of patches,
            without class token, registers and padding; `"cls+mean"`: both joined, twice as wide, for encoders with
            `"cls"`.
        pooled_layers (`int`, *optional*, defaults to 1): Number of last layers whose pooled states are joined, each
            after the final norm, as in DINOv2's linear evaluation. Values above 1 fit ViT, DINOv2 and DINOv3, and all
            poolings but `"pooler"`.
        projection_dim (`int`, *optional*): Width of the linear projection. `None` adds no projection.
        image_token_centers (`int`, *optional*): Number K of patches that the layers from `image_token_layer` compute:
            the medoids of K clusters. Class token and registers are kept. For ViT, DINOv2, DINOv3, CLIP and SigLIP.
        image_token_layer (`int`, *optional*): Layer, counted from 0, before which the patches are clustered. Defaults
            to the middle one.

    ```python
    >>> from lotlip_hf import LoTLIPVisionConfig
    >>> LoTLIPVisionConfig(image_size=384).num_patches
    576
    ```
    """

    model_type = "lotlip_vision_model"
    auto_classes = {"AutoModel": "LoTLIPVisionModel"}
    base_config_key = "vision_config"
    default_backbone = {"model_type": "vit", "layer_norm_eps": 1e-6}
    families = VISION_BACKBONES

    backbone_config: PreTrainedConfig | dict | None = None
    pooling: str | None = None
    pooled_layers: int = 1
    projection_dim: int | None = None
    image_token_centers: int | None = None
    image_token_layer: int | None = None

    @property
    def pooled_size(self) -> int:
        """Width of the pooled states: the backbone's hidden size for each joined pooling and layer."""
        return super().pooled_size * self.pooled_layers

    def validate_pooled_layers(self) -> None:
        number, backbone = self.pooled_layers, self.backbone_config
        if number != 1 and (not self.family.final_norm or self.pooling == "pooler"):
            fit = f"does not fit pooling {self.pooling!r} of {backbone.model_type}"
            raise ValueError(f"`pooled_layers`={number} {fit}. Use 1 (`--image-layers 1`).")
        if number != 1 and not 1 <= number <= backbone.num_hidden_layers:
            raise ValueError(f"`pooled_layers` must be 1 to {backbone.num_hidden_layers}, got {number}.")

    def validate_image_token_centers(self) -> None:
        self.family.check_medoids(self.backbone_config, self.image_token_centers, self.image_token_layer)

    @property
    def num_patches(self) -> int:
        """Number P of patches of an image of the configured size."""
        return self.family.num_patches(self.backbone_config)


@strict
class LoTLIPConfig(_LoTLIPBaseConfig):
    """
    Configuration of a [`LoTLIPModel`]. The defaults are those of the released LoTLIP ViT-B/16.

    Args:
        text_config (`LoTLIPTextConfig` or `dict`, *optional*): Configuration of the text tower.
        vision_config (`LoTLIPVisionConfig` or `dict`, *optional*): Configuration of the image tower.
        projection_dim (`int`, *optional*): Width D of the shared embedding space. Defaults to the text tower's width.
            A tower of another width gets a projection to D.
        logit_scale_init_value (`float`, *optional*, defaults to `ln(1 / 0.07)`): Initial value of `logit_scale`.
        short_loss_weight, long_loss_weight (`float`, *optional*, defaults to 1.0): Weights of the loss's two parts.

    ```python
    >>> from lotlip_hf import LoTLIPConfig
    >>> LoTLIPConfig(text_config={"num_corner_tokens": 4}, projection_dim=512).vision_config.projection_dim
    512
    ```
    """

    model_type = "lotlip"
    auto_classes = {"AutoModel": "LoTLIPModel", "AutoModelForZeroShotImageClassification": "LoTLIPModel"}
    sub_configs: ClassVar[dict[str, type]] = {"text_config": LoTLIPTextConfig, "vision_config": LoTLIPVisionConfig}

    text_config: LoTLIPTextConfig | dict | None = None
    vision_config: LoTLIPVisionConfig | dict | None = None
    projection_dim: int | None = None
    logit_scale_init_value: float = math.log(1 / 0.07)
    short_loss_weight: float = 1.0
    long_loss_weight: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_version()
        for key, config_class in self.sub_configs.items():
            given = getattr(self, key)
            is_config = isinstance(given, config_class)
            setattr(self, key, copy.deepcopy(given) if is_config else config_class(**(given or {})))
        if self.projection_dim is None:
            self.projection_dim = self.text_config.output_size
        for key in self.sub_configs:
            if getattr(self, key).output_size != self.projection_dim:
                getattr(self, key).projection_dim = self.projection_dim
        super().__post_init__(**kwargs)
