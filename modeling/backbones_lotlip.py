"""
Adapters of the families of backbones: all code that depends on a `model_type`. To add a family, write a class and set
`TEXT_BACKBONES["model_type"] = MyBackbone()`. To add a pooling, write a function and an entry of `POOLINGS`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, CLIPTextModel, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .fast_paths_lotlip import Extension, PooledLayer, PooledViTLayer, extend, take


def one_token(states: Tensor, mask: Tensor | None, index: Tensor | None) -> Tensor:
    """The state at `index`."""
    return states[:, 0] if index is None else states[torch.arange(states.shape[0], device=states.device), index]


def mean(states: Tensor, mask: Tensor | None, index: Tensor | None) -> Tensor:
    """The mean over a text or over the patches of an image."""
    if mask is None:
        return states.mean(1)
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def weighted_mean(states: Tensor, mask: Tensor | None, index: Tensor | None) -> Tensor:
    """The mean over a text with the weights 1, 2, ..., for causal encoders (SGPT, https://arxiv.org/abs/2202.08904)."""
    mask = states.new_ones(states.shape[:2]) if mask is None else mask
    return mean(states, mask.long().cumsum(-1) * mask.bool(), index)


# Functions (states [N, L, hidden_size], mask [N, L] or None for all tokens, index [N] of the pooled token or None for
# the first) -> [N, hidden_size]. A corner token is pooled as a text of one token. In text towers, "pooler" adds the
# backbone's layer on the pooled token. In image towers, "pooler" is the backbone's own pooling. "eos" is CLIP's [EOT],
# "last" the last token of a decoder's text.
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

    default_pooling: str
    excluded_poolings: tuple[str, ...] = ()  # names in `POOLINGS` that the family does not support
    has_optional_pooler = False  # whether `pooling="pooler"` adds a layer; without it, the layer would stay untrained
    pooled_layer: type[PooledLayer] | None = None  # extends the last layer to compute pooled tokens only

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)

    def check_pooling(self, config: PreTrainedConfig, pooling: str) -> None:
        taken = [name for name in POOLINGS if name not in self.excluded_poolings]
        if pooling not in taken:
            raise ValueError(f"`pooling={pooling!r}` does not fit {config.model_type}. Use one of {', '.join(taken)}.")

    def pooling_layer(self, pooling: str) -> dict[str, bool]:
        return {"add_pooling_layer": pooling == "pooler"} if self.has_optional_pooler else {}

    def build(self, config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
        backbone = AutoModel.from_config(config, trust_remote_code=False, **self.pooling_layer(pooling))
        last_layer = self.last_layer(backbone)
        if self.pooled_layer is not None and last_layer is not None:
            extend(backbone, last_layer, self.pooled_layer)
        return backbone

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
    takes_rows = False  # whether `row_index` reaches the attention functions, so that texts can share a row
    takes_positions = True  # whether the encoder accepts `position_ids`
    has_segments = False  # whether the encoder accepts `token_type_ids`
    corners_have_positions = True  # otherwise they have the position of the first token, and words keep their own
    corners_first = False  # whether corner tokens precede the text in memory, for relative positions
    layer_masks = False  # whether the encoder accepts a dictionary of masks by type of layer
    starts_after_padding = False  # whether the first position is `pad_token_id + 1`

    def position_offset(self, config: PreTrainedConfig) -> int:
        return config.pad_token_id + 1 if self.starts_after_padding else 0

    def max_length(self, config: PreTrainedConfig, num_corner_tokens: int) -> int:
        taken = num_corner_tokens if self.corners_have_positions else 0
        return config.max_position_embeddings - self.position_offset(config) - taken

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
        elif not self.is_causal:
            position_ids = position_ids + (position_ids > 0).long() * num_corner_tokens
        parts = [corner_ids, position_ids] if self.corners_first else [position_ids, corner_ids]
        return {**embeds, "position_ids": torch.cat(parts, dim=1) + self.position_offset(backbone.config)}

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        """More arguments of the backbone's `forward`."""
        return {}

    def create_masks(
        self, config: PreTrainedConfig, inputs_embeds: Tensor, rule: Callable, is_corner: Callable
    ) -> Any:
        """The mask of a rule, or masks by type of layer. In sliding windows, corner tokens see the whole text."""
        options = {"config": config, "inputs_embeds": inputs_embeds, "attention_mask": None, "past_key_values": None}
        options["and_mask_function"] = rule
        create, slide = create_bidirectional_mask, create_bidirectional_sliding_window_mask
        if self.is_causal:  # with `config.is_causal=False`, these functions are bidirectional, too
            create, slide = create_causal_mask, create_sliding_window_causal_mask
        if not self.layer_masks:
            return create(**options)
        masks = {"full_attention": create(**options)}
        if "sliding_attention" in config.layer_types:
            masks["sliding_attention"] = slide(**options, or_mask_function=is_corner)
        return masks


class BertBackbone(TextBackbone):
    """BERT and RoBERTa."""

    default_pooling = "pooler"
    excluded_poolings = ("eos", "last", "weighted_mean")
    has_optional_pooler = has_segments = takes_rows = True
    pooled_layer = PooledLayer


class CLIPTextBackbone(TextBackbone):
    """CLIP's text tower. The pooled token is [EOT]. Corner tokens have no positions."""

    default_pooling = "eos"
    excluded_poolings = ("pooler", "cls", "mean", "last", "weighted_mean")
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
    is_causal = True

    def options(self, config: PreTrainedConfig) -> dict[str, Any]:
        # Without a mask, `sdpa` would use the default of the attention module.
        return {"use_cache": False} if is_causal(config) else {"use_cache": False, "is_causal": False}


class VisionBackbone(_Backbone):
    """An image encoder. Its `embeddings` return the class token, if there is one, and the patches."""

    default_pooling = "cls"
    excluded_poolings = ("eos", "last", "weighted_mean")
    num_prefix_tokens = 1
    takes_interpolation = True  # whether other image sizes need `interpolate_pos_encoding`

    def build(self, config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
        backbone = super().build(config, pooling)
        extend(backbone, backbone.embeddings, PassingEmbeddings)
        return backbone

    def num_patches(self, config: PreTrainedConfig) -> int:
        sides = zip(pair(config.image_size), pair(config.patch_size), strict=True)
        return math.prod(size // patch_size for size, patch_size in sides)

    def check_pooling(self, config: PreTrainedConfig, pooling: str) -> None:
        super().check_pooling(config, pooling)
        if pooling == "pooler" and not getattr(config, "vision_use_head", True):
            raise ValueError("`pooling='pooler'` needs SigLIP's head. Set `vision_use_head=True` or another pooling.")

    def keep(self, backbone: PreTrainedModel, pixel_values: Tensor, kept_patches: Tensor, **options: Any) -> Tensor:
        """Embeds images and selects patches [B, K]: an input [B, prefix + K, hidden_size] of the backbone."""
        states = backbone.embeddings(pixel_values.to(backbone.dtype), **options)
        prefix, patches = states[:, : self.num_prefix_tokens], states[:, self.num_prefix_tokens :]
        is_index = kept_patches.dim() == 2 and kept_patches.dtype == torch.int64 and 0 not in kept_patches.shape
        if is_index and is_eager_on_cpu(kept_patches):
            is_index = bool(((kept_patches >= 0) & (kept_patches < patches.shape[1])).all())
        if not is_index or len(kept_patches) != len(states):
            raise ValueError(f"`kept_patches` must be int64 [B, K] with indices in [0, {patches.shape[1]}).")
        return torch.cat([prefix, take(patches, kept_patches.to(patches.device))], dim=1)


TEXT_BACKBONES: dict[str, TextBackbone] = {
    "bert": BertBackbone(),
    "roberta": BertBackbone(starts_after_padding=True),
    "xlm-roberta": BertBackbone(starts_after_padding=True),
    "clip_text_model": CLIPTextBackbone(),
    "modernbert": TextBackbone(default_pooling="cls", corners_have_positions=False, layer_masks=True),
    "llama": DecoderBackbone(),
    "qwen3": DecoderBackbone(layer_masks=True),
}
# CLIP's pooler normalises the class token. SigLIP has no class token; its pooler attends to the patches.
OWN_POOLER: dict[str, Any] = {
    "default_pooling": "pooler",
    "excluded_poolings": ("eos", "last", "weighted_mean", "cls"),
}
VISION_BACKBONES: dict[str, VisionBackbone] = {
    "vit": VisionBackbone(has_optional_pooler=True, pooled_layer=PooledViTLayer),
    "dinov2": VisionBackbone(takes_interpolation=False),
    "siglip_vision_model": VisionBackbone(**OWN_POOLER, num_prefix_tokens=0),
    "clip_vision_model": VisionBackbone(**OWN_POOLER),
}


class PassingEmbeddings(Extension):
    """Embeds images. Returns embedded inputs [B, tokens, hidden_size] unchanged."""

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return pixel_values if pixel_values.dim() == 3 else super().forward(pixel_values, *args, **kwargs)


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
