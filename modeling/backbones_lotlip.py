"""
Adapters of the families of backbones: all code that depends on a `model_type`. To add a family, write a class and set
`TEXT_BACKBONES["model_type"] = MyBackbone()`. To add a pooling, write a function and an entry of `POOLINGS`.
"""

import copy
import inspect
import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    CLIPTextModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import is_timm_available
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .fast_paths_lotlip import Extension, PooledLayer, PooledViTLayer, extend, take
from .medoids_lotlip import choose_medoids


def one_token(states: Tensor, mask: Tensor | None, index: Tensor | None) -> Tensor:
    """The state at `index`."""
    return states[:, 0] if index is None else states[torch.arange(states.shape[0], device=states.device), index]


def mean(states: Tensor, mask: Tensor | None, index: Tensor | None) -> Tensor:
    """The mean over a text or over the patches of an image. Sums are in float32 or more, as float16 would overflow."""
    if mask is None:
        return states.mean(1)
    weights = mask.to(torch.promote_types(states.dtype, torch.float32)).unsqueeze(-1)
    return ((states * weights).sum(1) / weights.sum(1).clamp(min=1)).to(states.dtype)


def weighted_mean(states: Tensor, mask: Tensor | None, index: Tensor | None) -> Tensor:
    """The mean over a text with the weights 1, 2, ..., for causal encoders (SGPT, https://arxiv.org/abs/2202.08904)."""
    mask = states.new_ones(states.shape[:2]) if mask is None else mask
    return mean(states, mask.long().cumsum(-1) * mask.bool(), index)


# Functions (states [N, L, hidden_size], mask [N, L] or None for all tokens, index [N] of the pooled token or None for
# the first) -> [N, hidden_size]. A corner token is pooled as a text of one token. In text towers, "pooler" adds the
# backbone's layer on the pooled token. In image towers, "pooler" is the backbone's own pooling, and "cls+mean" joins
# two results. "eos" is CLIP's [EOT], "last" the last token of a decoder's text.
POOLINGS: dict[str, Callable[[Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "pooler": one_token,
    "cls": one_token,
    "eos": one_token,
    "last": one_token,
    "mean": mean,
    "weighted_mean": weighted_mean,
}


class _Backbone:
    """Base class of text and image families. In all methods, `config` is the configuration of the backbone."""

    auto_class: Any = AutoModel  # builds and loads the backbone
    default_pooling: str
    excluded_poolings: tuple[str, ...] = ()  # names in `POOLINGS` that the family does not support
    has_optional_pooler = False  # whether `pooling="pooler"` adds a layer; without it, the layer would stay untrained
    pooled_layer: type[PooledLayer] | None = None  # extends the last layer to compute pooled tokens only
    stock_poolings: tuple[str, ...] = ()  # poolings whose states are the `pooler_output` of the stock class
    no_onnx = ""  # reason why the family cannot be exported to ONNX
    # Modules that come after the layers in `named_parameters`, but are used by all layers; `None` if they are unknown
    used_by_layers: tuple[str, ...] | None = ()

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)

    def choose_pooling(self, config: PreTrainedConfig) -> str:
        """Default pooling."""
        return self.default_pooling

    def poolings(self) -> list[str]:
        """Poolings that the family supports."""
        return [name for name in POOLINGS if name not in self.excluded_poolings]

    def check_pooling(self, config: PreTrainedConfig, pooling: str) -> None:
        taken = self.poolings()
        if pooling not in taken:
            raise ValueError(f"`pooling={pooling!r}` does not fit {config.model_type}. Use one of {', '.join(taken)}.")

    def hidden_size(self, config: PreTrainedConfig) -> int:
        return config.hidden_size

    def pooling_layer(self, pooling: str) -> dict[str, bool]:
        return {"add_pooling_layer": pooling == "pooler"} if self.has_optional_pooler else {}

    def build(self, config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
        backbone = self.auto_class.from_config(config, trust_remote_code=False, **self.pooling_layer(pooling))
        last_layer = self.last_layer(backbone)
        if self.pooled_layer is not None and last_layer is not None:
            extend(backbone, last_layer, self.pooled_layer)
        return backbone

    def layers(self, backbone: PreTrainedModel) -> list[nn.Module]:
        """The layers, from the first to the last."""
        return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]

    def last_layer(self, backbone: PreTrainedModel) -> nn.Module | None:
        layers = getattr(backbone, "layers", None) or getattr(getattr(backbone, "encoder", None), "layer", None)
        return layers[-1] if layers else None


class TextBackbone(_Backbone):
    """
    A text encoder that accepts `inputs_embeds` and `position_ids`. The pooled token is the first token, and corner
    tokens have the positions after it. In a causal encoder, they are the last token and the positions after the text.
    """

    default_pooling = "mean"
    excluded_poolings = ("pooler", "eos", "last", "weighted_mean")
    is_causal = False
    takes_rows = False  # whether a `row` reaches the attention functions, so that texts can share a row
    takes_positions = True  # whether the encoder accepts `position_ids`
    has_segments = False  # whether the encoder accepts `token_type_ids`
    corners_have_positions = True  # otherwise they have the position of the first token, and words keep their own
    corners_first = False  # whether corner tokens precede the text in memory, for relative positions
    layer_masks = False  # whether the encoder accepts a dictionary of masks by type of layer
    starts_after_padding = False  # whether the first position is `pad_token_id + 1`
    checkpointed_layers = ""  # name of the layers that need an extension for gradient checkpointing
    position_table = "embeddings.position_embeddings.weight"  # name of the learned positions, if the encoder has them

    def build(self, config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
        backbone = super().build(config, pooling)
        if self.checkpointed_layers:
            for layer in backbone.get_submodule(self.checkpointed_layers).children():
                extend(backbone, layer, CheckpointedLayer)
        return backbone

    @property
    def words_skip_corners(self) -> bool:
        """Whether the positions of the words, except the first, follow those of the corner tokens."""
        return self.corners_have_positions and not self.is_causal

    def position_offset(self, config: PreTrainedConfig) -> int:
        return config.pad_token_id + 1 if self.starts_after_padding else 0

    def max_length(self, config: PreTrainedConfig, num_corner_tokens: int) -> int:
        taken = num_corner_tokens if self.corners_have_positions or not self.takes_positions else 0
        return getattr(config, "max_position_embeddings", UNLIMITED) - self.position_offset(config) - taken

    def text_mask(self, config: PreTrainedConfig, input_ids: Tensor) -> Tensor | None:
        """Default mask [N, L], 1 for text, or `None` if all tokens are text."""
        return None if config.pad_token_id is None else input_ids != config.pad_token_id

    def count_positions(self, config: PreTrainedConfig, is_text: Tensor) -> Tensor:
        """Positions in the text [N, L], from 0."""
        return (is_text.long().cumsum(-1) - 1).clamp(min=0)

    def pooled_index(self, config: PreTrainedConfig, is_text: Tensor, input_ids: Tensor | None) -> Tensor:
        """Index [N] of the pooled token."""
        if self.is_causal:
            return is_text.shape[-1] - 1 - is_text.int().flip(-1).argmax(-1)
        return is_text.int().argmax(-1)

    def embed(
        self, backbone: PreTrainedModel, words: Tensor, position_ids: Tensor, num_corner_tokens: int, corners: Tensor
    ) -> dict[str, Tensor]:
        """
        Arguments of the backbone [N, L + c, ...] for `words` [N, L, hidden_size], `position_ids` [N, L] from 0 and
        `corners` [c, hidden_size]. c is m, or 0 without corner tokens. In both cases, the words skip m positions.
        """
        embeds = {"inputs_embeds": _join(words, corners, self.corners_first)}
        if not self.takes_positions:
            return embeds
        first = position_ids.amax(-1, keepdim=True) + 1 if self.is_causal else torch.ones_like(position_ids[:, :1])
        corner_ids = first + torch.arange(len(corners), device=words.device)
        if not self.corners_have_positions:
            corner_ids = torch.zeros_like(corner_ids)
        if self.words_skip_corners:
            position_ids = position_ids + (position_ids > 0).long() * num_corner_tokens
        parts = [corner_ids, position_ids] if self.corners_first else [position_ids, corner_ids]
        return {**embeds, "position_ids": torch.cat(parts, dim=1) + self.position_offset(backbone.config)}

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        """More arguments of the backbone's `forward`."""
        return {}

    def window(self, config: PreTrainedConfig) -> int | None:
        """Width of the sliding windows of some layers, or `None`."""
        layer_types = getattr(config, "layer_types", None) or ("sliding_attention",)
        has_windows = self.layer_masks and "sliding_attention" in layer_types
        return getattr(config, "sliding_window", None) if has_windows else None

    def create_masks(
        self, config: PreTrainedConfig, inputs_embeds: Tensor, rule: Callable, is_corner: Callable
    ) -> Any:
        """The mask of a rule, or masks by type of layer. In sliding windows, corner tokens see the whole text."""
        options = {"config": config, "inputs_embeds": inputs_embeds, "attention_mask": None, "past_key_values": None}
        options["and_mask_function"] = rule
        create, slide = create_bidirectional_mask, create_bidirectional_sliding_window_mask
        if self.is_causal:  # with `config.is_causal=False`, these functions are bidirectional, too
            create, slide = create_causal_mask, create_sliding_window_causal_mask
        sliding = {**options, "or_mask_function": is_corner}
        layer_types = getattr(config, "layer_types", None) or ()
        if self.layer_masks and "sliding_attention" in layer_types:
            return {"full_attention": create(**options), "sliding_attention": slide(**sliding)}
        is_sliding = self.layer_masks and not layer_types and getattr(config, "sliding_window", None)
        return slide(**sliding) if is_sliding else create(**options)


class BertBackbone(TextBackbone):
    """BERT and RoBERTa."""

    default_pooling = "pooler"
    excluded_poolings = ("eos", "last", "weighted_mean")
    has_optional_pooler = has_segments = takes_rows = True
    stock_poolings = ("pooler",)
    pooled_layer = PooledLayer


class ModernBertBackbone(TextBackbone):
    """ModernBERT. The default pooling is that of its classifiers."""

    default_pooling = "cls"
    corners_have_positions = False
    layer_masks = takes_rows = True

    def choose_pooling(self, config: PreTrainedConfig) -> str:
        return config.classifier_pooling


class DebertaBackbone(TextBackbone):
    """DeBERTa. Relative positions are those in memory. Its attention needs a boolean mask."""

    default_pooling = "cls"
    has_segments = corners_first = True
    corners_have_positions = False
    used_by_layers = ("encoder.rel_embeddings.", "encoder.LayerNorm.")

    def build(self, config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
        if getattr(config, "conv_kernel_size", 0):
            raise ValueError("`conv_kernel_size` must be 0: a convolution would mix words and corner tokens.")
        backbone = super().build(config, pooling)
        extend(backbone, backbone.embeddings, UnmaskedEmbeddings)
        return backbone

    def create_masks(
        self, config: PreTrainedConfig, inputs_embeds: Tensor, rule: Callable, is_corner: Callable
    ) -> Tensor:
        return super().create_masks(config, inputs_embeds, rule, is_corner) == 0


class CLIPTextBackbone(TextBackbone):
    """CLIP's text tower. The pooled token is [EOT]. Corner tokens have no positions."""

    default_pooling = "eos"
    excluded_poolings = ("pooler", "cls", "mean", "last", "weighted_mean")
    stock_poolings = ("eos",)
    is_causal = takes_rows = True
    corners_have_positions = False

    def build(self, config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
        return CLIPTextEncoder._from_config(config)

    def text_mask(self, config: PreTrainedConfig, input_ids: Tensor) -> Tensor | None:
        return None  # CLIP pads with [EOT], which no text token attends to

    def count_positions(self, config: PreTrainedConfig, is_text: Tensor) -> Tensor:
        # As in CLIPTextModel, padding after the text has the next positions. Padding before the text has position 0.
        counted = torch.arange(is_text.shape[-1], device=is_text.device).expand_as(is_text)
        counted = (counted - is_text.int().argmax(-1, keepdim=True)).clamp(min=0)
        return torch.where(is_text.bool(), counted, counted.clamp(max=config.max_position_embeddings - 1))

    def pooled_index(self, config: PreTrainedConfig, is_text: Tensor, input_ids: Tensor | None) -> Tensor:
        if input_ids is None:
            return super().pooled_index(config, is_text, input_ids)
        input_ids = input_ids.masked_fill(~is_text.bool(), -1)  # [EOT] may be the padding token, too
        # As in CLIPTextModel, 2 is the wrong id of old configurations. [EOT] is then the highest id.
        is_end = input_ids if config.eos_token_id == 2 else input_ids == config.eos_token_id
        return is_end.int().argmax(-1)

    def embed(
        self, backbone: PreTrainedModel, words: Tensor, position_ids: Tensor, num_corner_tokens: int, corners: Tensor
    ) -> dict[str, Tensor]:
        return {"inputs_embeds": _join(words + backbone.embeddings.position_embedding(position_ids), corners)}


class CLIPTextEncoder(CLIPTextModel):
    """`CLIPTextModel` for `inputs_embeds` that include position embeddings. Weights and states are the same."""

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """[N, L, hidden_size] and a mask [N, L] or of `create_corner_mask` -> states [N, L, hidden_size]."""
        embeds = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "past_key_values": None}
        mask = create_causal_mask(config=self.config, **embeds)
        outputs = self.encoder(inputs_embeds=inputs_embeds, attention_mask=mask, is_causal=True, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=self.final_layer_norm(outputs.last_hidden_state))


class DecoderBackbone(TextBackbone):
    """A decoder with rotary positions. Its attention is causal, or bidirectional with `config.is_causal=False`."""

    default_pooling = "last"
    excluded_poolings = ("pooler", "cls", "eos")
    is_causal = takes_rows = True

    def set_attention(self, config: PreTrainedConfig, attention: str) -> None:
        """Makes transformers' functions for causal masks bidirectional, if `attention` is."""
        if (attention == "causal") != getattr(config, "is_causal", True):
            config.is_causal = attention == "causal"

    def text_mask(self, config: PreTrainedConfig, input_ids: Tensor) -> Tensor | None:
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if config.pad_token_id in ends or (config.pad_token_id is None and len(input_ids) > 1):
            raise ValueError(
                "Pass `attention_mask`: `pad_token_id` is None or an end token, which texts contain, too."
            )
        return super().text_mask(config, input_ids)

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        # Without a mask, `sdpa` would use the default of the attention module.
        return {"use_cache": False} if getattr(config, "is_causal", True) else {"use_cache": False, "is_causal": False}


class Gemma3Backbone(DecoderBackbone):
    """Gemma 3. With `use_bidirectional_attention`, as in EmbeddingGemma, sliding windows have exclusive bounds."""

    layer_masks = True

    def choose_pooling(self, config: PreTrainedConfig) -> str:
        return "mean" if config.use_bidirectional_attention else "last"

    def set_attention(self, config: PreTrainedConfig, attention: str) -> None:
        if not config.use_bidirectional_attention:
            super().set_attention(config, attention)

    def create_masks(
        self, config: PreTrainedConfig, inputs_embeds: Tensor, rule: Callable, is_corner: Callable
    ) -> Any:
        if config.use_bidirectional_attention:
            config = copy.copy(config)
            config.is_causal, config.sliding_window = False, config.sliding_window - 1
        return super().create_masks(config, inputs_embeds, rule, is_corner)


NOT_OF_IMAGES = ("eos", "last", "weighted_mean")


class PassingEmbeddings(Extension):
    """Embeds images. Returns embedded inputs [B, tokens, hidden_size] unchanged."""

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return pixel_values if pixel_values.dim() == 3 else super().forward(pixel_values, *args, **kwargs)


class PassingNaFlexEmbeddings(Extension):
    """Embeds images with `spatial_shapes`. Returns embedded inputs, which come without, unchanged."""

    def forward(self, pixel_values: Tensor, spatial_shapes: Tensor | None) -> Tensor:
        return pixel_values if spatial_shapes is None else super().forward(pixel_values, spatial_shapes)


class CheckpointedLayer(Extension, GradientCheckpointingLayer):
    """Adds gradient checkpointing to a layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


class CheckpointedTimmModel(Extension):
    """Adds transformers' switch of gradient checkpointing to a model of timm."""

    @property
    def gradient_checkpointing(self) -> bool:
        return any(getattr(module, "grad_checkpointing", False) for module in self.modules())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.set_grad_checkpointing(enable)


class VisionBackbone(_Backbone):
    """
    An image encoder. Its `embeddings` return the prefix tokens (class token and registers), if there are any, and the
    patches. `inputs`, `keep`, `run` and `patches` are the steps of [`LoTLIPVisionModel`].
    """

    default_pooling = "cls"
    excluded_poolings = NOT_OF_IMAGES
    stock_poolings = ("cls", "pooler")
    in_dual_encoder = True  # whether `VisionTextDualEncoderModel` passes all inputs
    has_class_token = True
    pooler_modules: tuple[str, ...] = ()  # modules that only `pooling="pooler"` uses
    patch_pooler = ""  # module of `pooling="pooler"` that fits a patch alone, [N, 1, hidden_size]
    final_norm = ""  # module after the last layer, which fits the states of earlier layers too
    takes_interpolation = True  # whether other image sizes need `interpolate_pos_encoding`
    any_size_in_onnx = False  # whether an exported graph accepts all image sizes
    passing_embeddings: type[Extension] | None = PassingEmbeddings  # without it, `kept_patches` is refused
    layers_know_positions = False  # whether layers get rotary positions of the patches
    no_medoids = ""  # reason why patches cannot be replaced by medoids between two layers

    def build(self, config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
        backbone = super().build(config, pooling)
        if self.passing_embeddings is not None:
            extend(backbone, backbone.embeddings, self.passing_embeddings)
        return backbone

    def image_shape(self, config: PreTrainedConfig) -> tuple[int, int, int]:
        """Channels, height and width of the images for which the encoder is built."""
        return (config.num_channels, *pair(config.image_size))

    def num_patches(self, config: PreTrainedConfig) -> int:
        sides = zip(pair(config.image_size), pair(config.patch_size), strict=True)
        return math.prod(size // patch_size for size, patch_size in sides)

    def num_prefix_tokens(self, backbone: PreTrainedModel) -> int:
        return self.has_class_token + getattr(backbone.config, "num_register_tokens", 0)

    def poolings(self) -> list[str]:
        names = super().poolings()
        return [*names, "cls+mean"] if "cls" in names else names

    def check_pooling(self, config: PreTrainedConfig, pooling: str) -> None:
        super().check_pooling(config, pooling)
        if pooling == "pooler" and not getattr(config, "vision_use_head", True):
            raise ValueError("`pooling='pooler'` needs SigLIP's head. Set `vision_use_head=True` or another pooling.")

    def check_medoids(self, config: PreTrainedConfig, num_centers: int | None, layer: int | None) -> None:
        """Checks the number of medoids and the layer that chooses them."""
        if num_centers is None and layer is None:
            return
        if self.no_medoids:
            raise ValueError(f"`image_token_centers` does not fit {config.model_type}: {self.no_medoids}. Remove it.")
        if num_centers is None or num_centers < 1:
            raise ValueError(
                f"`image_token_centers` is {num_centers}. Use 1 or more, or no `image_token_layer` either."
            )
        if layer is not None and not 0 <= layer < config.num_hidden_layers:
            raise ValueError(f"`image_token_layer` is {layer}. Use 0 to {config.num_hidden_layers - 1}.")

    def use_medoids(self, backbone: PreTrainedModel, num_centers: int, layer: int | None) -> None:
        """Makes the layers from `layer` on compute only medoids."""
        layers = self.layers(backbone)
        first = len(layers) // 2 if layer is None else layer
        choose_medoids(backbone, layers, num_centers, first, self.num_prefix_tokens(backbone))

    def inputs(
        self, backbone: PreTrainedModel, pixel_values: Tensor | None, interpolate: bool, **others: Tensor | None
    ) -> dict[str, Any]:
        """Checks the images. Returns the arguments of the backbone."""
        if pixel_values is None or pixel_values.dim() != 4 or not pixel_values.is_floating_point():
            got = None if pixel_values is None else (list(pixel_values.shape), pixel_values.dtype)
            raise ValueError(f"`pixel_values` must be floats [B, channels, height, width], got {got}.")
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"`{name}` does not fit {backbone.config.model_type}. Leave it out.")
        if not self.takes_interpolation:
            return {"pixel_values": pixel_values}
        size, expected = list(pixel_values.shape[-2:]), list(pair(backbone.config.image_size))
        if not interpolate and size != expected:
            raise ValueError(f"`pixel_values` are {size}, not {expected}. Pass interpolate_pos_encoding=True.")
        return {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate}

    def keep(self, backbone: PreTrainedModel, inputs: dict[str, Any], kept_patches: Tensor) -> dict[str, Any]:
        """Embeds images and selects patches [B, K]: inputs [B, prefix + K, hidden_size] of the backbone."""
        if self.passing_embeddings is None:
            raise ValueError(f"`kept_patches` does not fit {backbone.config.model_type}. Leave it out.")
        pixel_values = inputs["pixel_values"].to(backbone.dtype)
        states = backbone.embeddings(**{**inputs, "pixel_values": pixel_values})
        prefix = self.num_prefix_tokens(backbone)
        patches = select(states[:, prefix:], kept_patches)
        return {**inputs, "pixel_values": torch.cat([states[:, :prefix], patches], dim=1)}

    def run(self, backbone: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
        """The backbone's outputs for the arguments of `inputs` or `keep`."""
        return backbone(**inputs, **options)

    def patches(self, backbone: PreTrainedModel, states: Tensor) -> Tensor:
        """The patches [B, P, hidden_size] in the backbone's `last_hidden_state`."""
        return states[:, self.num_prefix_tokens(backbone) :]

    def pool_each(self, backbone: PreTrainedModel, states: Tensor, pooling: str) -> Tensor:
        """The patches [B, P, hidden_size] in `last_hidden_state`, each pooled alone, without an attention pooling."""
        patches = self.patches(backbone, states)
        if pooling != "pooler" or not self.patch_pooler:
            return patches
        pooler = backbone.get_submodule(self.patch_pooler)
        return pooler(patches.flatten(0, 1).unsqueeze(1)).reshape(patches.shape)


class DINOv3Backbone(VisionBackbone):
    """DINOv3's ViT. Its rotary positions are computed from the images."""

    final_norm = "norm"
    takes_interpolation = False
    layers_know_positions = True
    any_size_in_onnx = True

    def keep(self, backbone: PreTrainedModel, inputs: dict[str, Any], kept_patches: Tensor) -> dict[str, Any]:
        states = super().keep(backbone, inputs, kept_patches)["pixel_values"]
        positions = backbone.rope_embeddings(inputs["pixel_values"].to(backbone.dtype))  # cos and sin [P, head_dim]
        kept_patches = kept_patches.to(states.device)
        return {
            "hidden_states": states,
            "position_embeddings": tuple(one[kept_patches].unsqueeze(1) for one in positions),
        }

    def run(self, backbone: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
        if "position_embeddings" not in inputs:
            return super().run(backbone, inputs, **options)
        outputs = backbone.model(**inputs, **options)
        states = backbone.norm(outputs.last_hidden_state)
        return BaseModelOutputWithPooling(states, states[:, 0], outputs.hidden_states, outputs.attentions)


class NaFlexBackbone(VisionBackbone):
    """SigLIP 2 NaFlex: images of any aspect ratio as padded rows of flattened patches."""

    default_pooling = "pooler"
    excluded_poolings = (*NOT_OF_IMAGES, "cls")
    has_class_token = False
    pooler_modules = ("head",)
    passing_embeddings = PassingNaFlexEmbeddings
    in_dual_encoder = False
    no_medoids = "its rows of patches are padded"
    no_onnx = "its positions are interpolated for each image"

    def num_patches(self, config: PreTrainedConfig) -> int:
        return config.num_patches

    def inputs(
        self, backbone: PreTrainedModel, pixel_values: Tensor | None, interpolate: bool, **others: Tensor | None
    ) -> dict[str, Any]:
        inputs = {"pixel_values": pixel_values, **others}
        missing = ", ".join(f"`{name}`" for name, value in inputs.items() if value is None)
        if missing:
            raise ValueError(f"{missing} missing. Pass all outputs of the image processor (`Siglip2ImageProcessor`).")
        shapes = [list(value.shape) for value in inputs.values() if value is not None]
        size = shapes[0][:2]
        width = backbone.config.num_channels * math.prod(pair(backbone.config.patch_size))
        if shapes != [[*size, width], size, [*size[:1], 2]]:
            raise ValueError(
                f"`pixel_values`, `pixel_attention_mask` and `spatial_shapes` must be [B, P, {width}], [B, P] and "
                f"[B, 2], got {shapes}."
            )
        return inputs

    def keep(self, backbone: PreTrainedModel, inputs: dict[str, Any], kept_patches: Tensor) -> dict[str, Any]:
        states = backbone.embeddings(inputs["pixel_values"], inputs["spatial_shapes"])
        mask = inputs["pixel_attention_mask"]
        return {
            "pixel_values": select(states, kept_patches),
            "pixel_attention_mask": take(mask, kept_patches.to(mask.device)),
            "spatial_shapes": None,
        }


class ConvNextBackbone(VisionBackbone):
    """ConvNeXt and ConvNeXt V2. The pooled map is normalised, the map is not."""

    default_pooling = "pooler"
    patch_pooler = "layernorm"
    excluded_poolings = (*NOT_OF_IMAGES, "cls", "mean")
    has_class_token = takes_interpolation = False
    passing_embeddings = None
    no_medoids = "it has no tokens"

    def build(self, config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
        config._attn_implementation = "eager"  # there is no attention, and the text tower may have any
        backbone = super().build(config, pooling)
        for module in list(backbone.modules()):
            if hasattr(module, "drop_path"):
                extend(backbone, module, CheckpointedLayer)
        return backbone

    def hidden_size(self, config: PreTrainedConfig) -> int:
        return config.hidden_sizes[-1]

    def num_patches(self, config: PreTrainedConfig) -> int:
        halvings = 2 ** (len(config.hidden_sizes) - 1)
        sides = zip(pair(config.image_size), pair(getattr(config, "patch_size", 4)), strict=True)
        return math.prod(size // (patch_size * halvings) for size, patch_size in sides)

    def run(self, backbone: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
        return backbone(inputs["pixel_values"].to(backbone.dtype), **options)

    def patches(self, backbone: PreTrainedModel, states: Tensor) -> Tensor:
        return states.flatten(2).transpose(1, 2) if states.dim() == 4 else states[:, 1:]


class TimmBackbone(VisionBackbone):
    """Models of timm in a `TimmWrapperModel`. Tokens are pooled in all ways, maps only by the model's own pooling."""

    default_pooling = "pooler"
    pooler_modules = ("timm_model.attn_pool", "timm_model.fc_norm")
    stock_poolings = ("pooler",)
    takes_interpolation = False
    passing_embeddings = None
    no_medoids = "its layers are those of timm"

    def build(self, config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
        config._attn_implementation = "sdpa"  # timm chooses its attention, and the text tower may have any
        backbone = super().build(config, pooling)
        extend(backbone, backbone.timm_model, CheckpointedTimmModel)
        return backbone

    def layers(self, backbone: PreTrainedModel) -> list[nn.Module]:
        return list(getattr(backbone.timm_model, "blocks", ()))

    def hidden_size(self, config: PreTrainedConfig) -> int:
        return timm_model(config).head_hidden_size

    def image_shape(self, config: PreTrainedConfig) -> tuple[int, int, int]:
        model = timm_model(config)
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][1:]
        return (getattr(model, "in_chans", 3), *pair(size))

    def num_patches(self, config: PreTrainedConfig) -> int:
        return timm_model(config).patch_embed.num_patches

    def num_prefix_tokens(self, backbone: PreTrainedModel) -> int:
        model: Any = backbone.timm_model
        return model.num_prefix_tokens

    def pool_each(self, backbone: PreTrainedModel, states: Tensor, pooling: str) -> Tensor:
        model: Any = backbone.timm_model
        if states.dim() == 3:
            patches = self.patches(backbone, states)
            return model.fc_norm(patches) if pooling == "pooler" and hasattr(model, "fc_norm") else patches
        is_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        patches = states.flatten(1, 2) if is_last else states.flatten(2).transpose(1, 2)
        maps = patches.flatten(0, 1)[:, None, None] if is_last else patches.flatten(0, 1)[..., None, None]
        return model.forward_head(maps, pre_logits=True).unflatten(0, patches.shape[:2])

    def check_pooling(self, config: PreTrainedConfig, pooling: str) -> None:
        super().check_pooling(config, pooling)
        model = timm_model(config)
        if pooling != "pooler" and not hasattr(model, "num_prefix_tokens"):
            raise ValueError(f"`pooling={pooling!r}` does not fit {config.architecture}, a map. Use pooler.")
        if "cls" in pooling.split("+") and getattr(model, "cls_token", None) is None:
            raise ValueError(f"`pooling={pooling!r}` does not fit {config.architecture}, which has no class token.")

    def inputs(
        self, backbone: PreTrainedModel, pixel_values: Tensor | None, interpolate: bool, **others: Tensor | None
    ) -> dict[str, Any]:
        inputs = super().inputs(backbone, pixel_values, interpolate, **others)
        embeddings = getattr(backbone.timm_model, "patch_embed", None)
        size, expected = list(inputs["pixel_values"].shape[-2:]), getattr(embeddings, "img_size", None)
        if getattr(embeddings, "strict_img_size", False) and expected is not None and size != list(expected):
            raise ValueError(
                f"`pixel_values` are {size}, not {list(expected)}. For other sizes, set `dynamic_img_size` in the "
                "`model_args` of the backbone's configuration, if timm's model has this option."
            )
        return {**inputs, "do_pooling": True}


UNLIMITED = 1 << 20  # maximum length of encoders without one
# Settings of rotary encoders with BERT's embeddings, of RoBERTas that normalise before each part of a layer, and of
# encoders with relative positions in memory only.
ROTARY_BERT: dict[str, Any] = {
    "corners_have_positions": False,
    "has_segments": True,
    "has_optional_pooler": True,
    "takes_rows": True,
}
ROBERTA_WITH_NORM_FIRST: dict[str, Any] = {
    "starts_after_padding": True,
    "has_segments": True,
    "has_optional_pooler": True,
    "takes_rows": True,
}
T5_ENCODER: dict[str, Any] = {
    "auto_class": AutoModelForTextEncoding,
    "takes_positions": False,
    "corners_have_positions": False,
    "corners_first": True,
}
DECODERS = ("llama", "qwen3_vl_text", "gemma", "phi", "granite", "olmo2", "helium", "glm")
# These can have sliding windows. The others ignore `sliding_window` in a configuration.
WINDOWED_DECODERS = ("qwen2", "qwen3", "mistral", "ministral", "phi3", "smollm3", "exaone4", "starcoder2")
TEXT_BACKBONES: dict[str, TextBackbone] = {
    "bert": BertBackbone(),
    "roberta": BertBackbone(starts_after_padding=True),
    "xlm-roberta": BertBackbone(starts_after_padding=True),
    "camembert": BertBackbone(starts_after_padding=True),
    "data2vec-text": BertBackbone(starts_after_padding=True),
    "roberta-prelayernorm": TextBackbone(**ROBERTA_WITH_NORM_FIRST),
    "xlm-roberta-xl": TextBackbone(**ROBERTA_WITH_NORM_FIRST),
    "distilbert": TextBackbone(takes_rows=True),
    "mpnet": TextBackbone(
        starts_after_padding=True,
        has_optional_pooler=True,
        corners_first=True,
        checkpointed_layers="encoder.layer",
        used_by_layers=("encoder.relative_attention_bias.",),
    ),
    "electra": TextBackbone(default_pooling="cls", has_segments=True, takes_rows=True),
    "albert": TextBackbone(
        has_segments=True,
        has_optional_pooler=True,
        takes_rows=True,
        checkpointed_layers="encoder.albert_layer_groups",
    ),
    "modernbert": ModernBertBackbone(),
    "eurobert": TextBackbone(corners_have_positions=False, takes_rows=True),
    "nomic_bert": TextBackbone(**ROTARY_BERT),
    "gte": TextBackbone(**ROTARY_BERT, default_pooling="cls"),
    "jina_embeddings_v3": TextBackbone(**ROTARY_BERT),
    "deberta": DebertaBackbone(),
    "deberta-v2": DebertaBackbone(),
    "t5": TextBackbone(**T5_ENCODER),
    "mt5": TextBackbone(**T5_ENCODER),
    "umt5": TextBackbone(**T5_ENCODER),
    "clip_text_model": CLIPTextBackbone(),
    **dict.fromkeys(DECODERS, DecoderBackbone()),
    **dict.fromkeys(WINDOWED_DECODERS, DecoderBackbone(layer_masks=True)),
    "gemma2": DecoderBackbone(layer_masks=True, takes_rows=False),  # sdpa lacks its cap of attention scores
    "gemma3_text": Gemma3Backbone(),
}
REFUSED = {
    "big_bird": "its block-sparse attention accepts no mask of pairs of tokens",
    "canine": "it has no embeddings of tokens",
    "funnel": "it merges tokens between layers",
    "xlnet": "it masks pairs of tokens by permutations",
}


def text_family(config: PreTrainedConfig) -> TextBackbone:
    """The adapter of a text encoder, from `TEXT_BACKBONES` or from the signature of its class in transformers."""
    return TEXT_BACKBONES.get(config.model_type) or _adapter(type(config))


def unsupported(model_type: str, reason: str) -> ValueError:
    """The error of a text encoder without an adapter."""
    supported = ", ".join(TEXT_BACKBONES)
    return ValueError(f"Text encoders of model_type {model_type!r} are not supported: {reason}. Use {supported}.")


@cache
def _adapter(config_class: type[PreTrainedConfig]) -> TextBackbone:
    model_type, stock = config_class.model_type, MODEL_MAPPING.get(config_class, None)
    stock = stock[0] if isinstance(stock, tuple) else stock
    taken = inspect.signature(stock.forward).parameters if stock is not None else {}
    reason = REFUSED.get(model_type)
    if stock is None or not stock.__module__.startswith("transformers."):
        reason = "transformers has no encoder of this type"
    elif "decoder_input_ids" in taken:
        reason = "it is an encoder with a decoder"
    elif "pixel_values" in taken:
        reason = f"{stock.__name__} encodes images"
    elif missing := [name for name in ("inputs_embeds", "attention_mask") if name not in taken]:
        reason = f"{stock.__name__} takes no `{missing[0]}`"
    if reason is not None:
        raise unsupported(model_type, reason)
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return DecoderBackbone(layer_masks=True, takes_rows=False, used_by_layers=None)
    return TextBackbone(
        takes_positions="position_ids" in taken,
        has_segments="token_type_ids" in taken,
        has_optional_pooler="add_pooling_layer" in inspect.signature(stock.__init__).parameters,
        corners_have_positions=False,  # right for learned and for rotary positions
        corners_first="position_ids" not in taken,  # positions are then those in memory
        layer_masks=True,
        used_by_layers=None,
    )


# CLIP's pooler normalises the class token. SigLIP has no class token; its pooler attends to the patches.
OWN_POOLER: dict[str, Any] = {
    "default_pooling": "pooler",
    "excluded_poolings": (*NOT_OF_IMAGES, "cls"),
}
VISION_BACKBONES: dict[str, VisionBackbone] = {
    "vit": VisionBackbone(
        has_optional_pooler=True, final_norm="layernorm", patch_pooler="pooler", pooled_layer=PooledViTLayer
    ),
    "dinov2": VisionBackbone(final_norm="layernorm", takes_interpolation=False, any_size_in_onnx=True),
    "dinov2_with_registers": VisionBackbone(final_norm="layernorm", takes_interpolation=False),
    "dinov3_vit": DINOv3Backbone(),
    "siglip_vision_model": VisionBackbone(**OWN_POOLER, has_class_token=False, pooler_modules=("head",)),
    "siglip2_vision_model": NaFlexBackbone(),
    "clip_vision_model": VisionBackbone(
        **OWN_POOLER, pooler_modules=("post_layernorm",), patch_pooler="post_layernorm"
    ),
    "convnext": ConvNextBackbone(),
    "convnextv2": ConvNextBackbone(),
    "dinov3_convnext": ConvNextBackbone(
        excluded_poolings=(*NOT_OF_IMAGES, "cls"), patch_pooler=""
    ),  # its map is normalised, too
    "timm_wrapper": TimmBackbone(),
}


def select(patches: Tensor, kept_patches: Tensor) -> Tensor:
    """Selects patches [B, K] of [B, P, hidden_size] -> [B, K, hidden_size]."""
    is_index = kept_patches.dim() == 2 and kept_patches.dtype == torch.int64 and 0 not in kept_patches.shape
    if is_index and is_eager_on_cpu(kept_patches):
        is_index = bool(((kept_patches >= 0) & (kept_patches < patches.shape[1])).all())
    if not is_index or len(kept_patches) != len(patches):
        raise ValueError(f"`kept_patches` must be int64 [B, K] with indices in [0, {patches.shape[1]}).")
    return take(patches, kept_patches.to(patches.device))


def timm_model(config: PreTrainedConfig) -> Any:
    """A model of timm without memory for its weights, for what `TimmWrapperConfig` does not say."""
    return _timm_model(config.architecture, json.dumps(config.model_args))


@cache
def _timm_model(architecture: str, model_args: str) -> Any:
    if not is_timm_available():
        raise ImportError("`timm_wrapper` needs timm and a torchvision that fits torch: pip install timm")
    if ":" in architecture:
        raise ValueError(f"`architecture` {architecture!r} is an address. Use a name in timm.list_models().")
    settings = json.loads(model_args) or {}
    layers = settings.get("depths", settings.get("depth", 0))
    if sum(layers if isinstance(layers, list) else [layers]) > 1024:
        raise ValueError(f"`model_args` has {layers} layers. Use at most 1024.")
    config = AutoConfig.for_model("timm_wrapper", architecture=architecture, model_args=settings)
    with torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=False).timm_model


class UnmaskedEmbeddings(Extension):
    """Embeddings of DeBERTa, which multiplies them by a mask of tokens, but not by one of pairs of tokens."""

    def forward(self, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        return super().forward(*args, mask=None if mask is None or mask.dim() == 4 else mask, **kwargs)


def is_eager_on_cpu(tensor: Tensor) -> bool:
    """Whether values can be checked: on the CPU, and not while compiling, exporting or tracing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether the attention of a decoder is causal."""
    return getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", False)


def _join(words: Tensor, corners: Tensor, corners_first: bool = False) -> Tensor:
    """[N, L, hidden_size] and [c, hidden_size] -> [N, L + c, hidden_size]"""
    if not len(corners):
        return words
    corners = corners.to(words).expand(words.shape[0], -1, -1)
    return torch.cat([corners, words] if corners_first else [words, corners], dim=1)


def pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
