"""
The families of encoders: what a tower has to know of its backbone. This is the only file that asks for a `model_type`.
A new family is a class and a line `TEXT_BACKBONES["its model_type"] = ItsClass()`; a new pooling is a function and a
line in `POOLINGS`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, CLIPTextModel, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.models.vit.modeling_vit import ViTEmbeddings
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .fast_paths_lotlip import POOLED_LAYERS, take


def one_token(states: torch.Tensor, mask: torch.Tensor | None, index: torch.Tensor | None) -> torch.Tensor:
    """The state at `index`."""
    return states[:, 0] if index is None else states[torch.arange(len(states), device=states.device), index]


def mean(states: torch.Tensor, mask: torch.Tensor | None, index: torch.Tensor | None) -> torch.Tensor:
    """The mean over the tokens of the text, or over an image's patches."""
    if mask is None:
        return states.mean(1)
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


# (states [N, L, hidden_size], mask [N, L] or None for all tokens, index [N] of the pooled token or None for the first)
# -> [N, hidden_size]. A corner token is pooled as a text of one token. A text's "pooler" is its backbone's own layer
# on the pooled token; an image's is whatever its backbone pools.
POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]] = {
    "pooler": one_token,
    "cls": one_token,
    "eos": one_token,
    "mean": mean,
}


class _Backbone:
    """What text and image families share. `config` is the backbone's own configuration throughout."""

    default_pooling: str
    # Of `POOLINGS`, those without a sense here.
    excluded_poolings: tuple[str, ...] = ()
    # Such a pooler is built only if it is used: an idle layer would never be trained.
    has_optional_pooler = False

    def pooling_layer(self, pooling: str) -> dict[str, bool]:
        """Arguments of `AutoModel` for the optional pooler."""
        return {"add_pooling_layer": pooling == "pooler"} if self.has_optional_pooler else {}

    def check_pooling(self, config: PreTrainedConfig, pooling: str) -> None:
        """Raises a `ValueError` for a pooling that the backbone does not take."""
        taken = [name for name in POOLINGS if name not in self.excluded_poolings]
        if pooling not in taken:
            raise ValueError(
                f"`pooling={pooling!r}` does not go with a {config.model_type} backbone: it takes {', '.join(taken)}."
            )

    def build(self, config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
        """The encoder, with new weights; its last layer can leave out what is not pooled if there is such a layer."""
        backbone = AutoModel.from_config(config, trust_remote_code=False, **self.pooling_layer(pooling))
        _extend(backbone, self.last_layer(backbone), POOLED_LAYERS)
        return backbone

    def last_layer(self, backbone: PreTrainedModel) -> nn.Module | None:
        """The layer that can be computed for pooled tokens alone; `None` if the family has none (the default)."""


class TextBackbone(_Backbone):
    """
    Texts. By default a bidirectional encoder without segments that takes `inputs_embeds` and `position_ids`, with
    absolute or rotary positions. The text's feature is read off its first token, or the last of a causal text. Corner
    tokens stand between the first token and the words by their positions; behind a causal text.
    """

    default_pooling = "mean"
    excluded_poolings = ("pooler", "eos")
    # Whether a token sees only those before it.
    is_causal = False
    has_segments = False

    def position_offset(self, config: PreTrainedConfig) -> int:
        """Position of the first token."""
        return 0

    def num_corner_positions(self, num_corner_tokens: int) -> int:
        """How many positions the corner tokens take."""
        return num_corner_tokens

    def max_length(self, config: PreTrainedConfig, num_corner_tokens: int) -> int:
        """Longest text in tokens."""
        positions = config.max_position_embeddings - self.position_offset(config)
        return positions - self.num_corner_positions(num_corner_tokens)

    def text_mask(self, config: PreTrainedConfig, input_ids: torch.Tensor) -> torch.Tensor | None:
        """[N, L]: True for text, where no mask is given; `None` for texts whose padding need not be known."""
        return None if config.pad_token_id is None else input_ids != config.pad_token_id

    def count_positions(self, config: PreTrainedConfig, mask: torch.Tensor) -> torch.Tensor:
        """[N, L]: positions in the text, from 0."""
        return (mask.long().cumsum(-1) - 1).clamp(min=0)

    def pooled_index(
        self, config: PreTrainedConfig, mask: torch.Tensor, input_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """[N]: index of the pooled token."""
        if self.is_causal:
            return mask.shape[-1] - 1 - mask.int().flip(-1).argmax(-1)
        return mask.int().argmax(-1)

    def embed(
        self,
        backbone: PreTrainedModel,
        words: torch.Tensor,
        position_ids: torch.Tensor,
        num_corner_tokens: int,
        corners: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            backbone: The encoder.
            words: [N, L, hidden_size], word embeddings.
            position_ids: [N, L], positions in the text, from 0.
            num_corner_tokens: How many corner tokens the tower has, here or not: the words' positions leave them room.
            corners: [m, hidden_size], to stand behind the words in memory; `None` to leave them out.

        Returns:
            The backbone's arguments, [N, L + m, ...] each, with `inputs_embeds` among them.
        """
        behind = position_ids.amax(-1, keepdim=True) if self.is_causal else torch.zeros_like(position_ids[:, :1])
        if not self.is_causal:
            position_ids = position_ids + (position_ids > 0).long() * self.num_corner_positions(num_corner_tokens)
        if corners is not None:
            new = behind + torch.arange(1, len(corners) + 1, device=words.device)
            position_ids = torch.cat([position_ids, new], dim=1)
        offset = self.position_offset(backbone.config)
        return {"inputs_embeds": _with_corners(words, corners), "position_ids": position_ids + offset}

    def create_masks(
        self, config: PreTrainedConfig, inputs_embeds: torch.Tensor, rule: Callable, is_corner: Callable
    ) -> Any:
        """
        The backbone's mask of a rule (batch, head, query, key) -> bool; or a dictionary by layer type, such as
        `full_attention` and `sliding_attention`. `is_corner` of the same arguments says whether the query is a corner
        token: the `or_mask_function` of a sliding window, for it sees every word.
        """
        create = create_causal_mask if self.is_causal else create_bidirectional_mask
        return create(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=None,
            past_key_values=None,
            and_mask_function=rule,
        )


class BertBackbone(TextBackbone):
    """BERT."""

    default_pooling = "pooler"
    excluded_poolings = ("eos",)
    has_optional_pooler = has_segments = True

    def last_layer(self, backbone: PreTrainedModel) -> nn.Module | None:
        return backbone.encoder.layer[-1]


class RobertaBackbone(BertBackbone):
    """RoBERTa and XLM-RoBERTa, whose positions start behind the padding id."""

    def position_offset(self, config: PreTrainedConfig) -> int:
        return config.pad_token_id + 1


class CLIPTextBackbone(CLIPTextModel):
    """CLIP's text tower for texts that are embedded already, positions included. Weights and states are the same."""

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """[N, L, hidden_size] and [N, L], or a mask of `create_corner_mask` -> [N, L, hidden_size], nothing pooled"""
        attention_mask = create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=None
        )
        outputs = self.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, is_causal=True, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=self.final_layer_norm(outputs.last_hidden_state))


class CLIPText(TextBackbone):
    """CLIP: causal, pooled at [EOT], and the corner tokens have no positions."""

    default_pooling = "eos"
    excluded_poolings = ("pooler", "cls", "mean")
    is_causal = True

    def build(self, config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
        return CLIPTextBackbone._from_config(config)

    def num_corner_positions(self, num_corner_tokens: int) -> int:
        return 0

    def text_mask(self, config: PreTrainedConfig, input_ids: torch.Tensor) -> torch.Tensor | None:
        return None  # CLIP pads with its [EOT] and sees nothing behind it

    def count_positions(self, config: PreTrainedConfig, mask: torch.Tensor) -> torch.Tensor:
        # padding behind the text counts on, as in CLIPTextModel, and padding before it does not
        counted = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
        counted = (counted - mask.int().argmax(-1, keepdim=True)).clamp(min=0)
        return torch.where(mask.bool(), counted, counted.clamp(max=config.max_position_embeddings - 1))

    def pooled_index(
        self, config: PreTrainedConfig, mask: torch.Tensor, input_ids: torch.Tensor | None
    ) -> torch.Tensor:
        if input_ids is None:
            return super().pooled_index(config, mask, input_ids)
        input_ids = input_ids.masked_fill(~mask.bool(), -1)  # [EOT] may be the padding, too
        if config.eos_token_id == 2:
            # Configurations from before transformers 4.31 hold a wrong id: as in CLIPTextModel, [EOT] has the highest.
            return input_ids.int().argmax(-1)
        return (input_ids == config.eos_token_id).int().argmax(-1)

    def embed(
        self,
        backbone: PreTrainedModel,
        words: torch.Tensor,
        position_ids: torch.Tensor,
        num_corner_tokens: int,
        corners: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        words = words + backbone.embeddings.position_embedding(position_ids)
        return {"inputs_embeds": _with_corners(words, corners)}


class VisionBackbone(_Backbone):
    """Images. By default square patches behind a class token that is normalised at the end."""

    default_pooling = "cls"
    excluded_poolings = ("eos",)
    num_prefix_tokens = 1
    # Whether the backbone takes `interpolate_pos_encoding`; one that does not takes images of every size.
    takes_interpolation = True

    def num_patches(self, config: PreTrainedConfig) -> int:
        """Number of patches of an image of the configured size."""
        (height, width), (patch_height, patch_width) = _pair(config.image_size), _pair(config.patch_size)
        return (height // patch_height) * (width // patch_width)

    def build(self, config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
        backbone = super().build(config, pooling)
        _extend(backbone, getattr(backbone, "embeddings", None), PASSING_EMBEDDINGS)
        return backbone

    def keep(
        self, backbone: PreTrainedModel, pixel_values: torch.Tensor, kept_patches: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """[B, channels, height, width] and [B, K] -> [B, prefix + K, hidden_size], for the backbone in place of the
        image: the embeddings of the kept patches, with their positions in the whole image."""
        states = backbone.embeddings(pixel_values.to(backbone.dtype), **options)
        prefix, patches = states[:, : self.num_prefix_tokens], states[:, self.num_prefix_tokens :]
        if is_eager_on_cpu(kept_patches) and not 0 <= kept_patches.min() <= kept_patches.max() < patches.shape[1]:
            raise ValueError(f"`kept_patches` must lie in [0, {patches.shape[1]}), the patches of an image.")
        return torch.cat([prefix, take(patches, kept_patches.to(states.device))], dim=1)


class ViT(VisionBackbone):
    """ViT."""

    has_optional_pooler = True

    def check_pooling(self, config: PreTrainedConfig, pooling: str) -> None:
        super().check_pooling(config, pooling)
        if pooling == "pooler" and config.pooler_output_size != config.hidden_size:
            raise ValueError(f"`pooler_output_size` must be the hidden size {config.hidden_size}.")

    def last_layer(self, backbone: PreTrainedModel) -> nn.Module | None:
        return (getattr(backbone, "layers", None) or backbone.encoder.layer)[-1]


class DINOv2(VisionBackbone):
    """DINOv2."""

    takes_interpolation = False


class CLIPVision(VisionBackbone):
    """CLIP, whose pooler is the norm of the class token."""

    default_pooling = "pooler"
    excluded_poolings = ("eos", "cls")


class SigLIPVision(CLIPVision):
    """SigLIP, which has no class token and pools by attention."""

    num_prefix_tokens = 0

    def check_pooling(self, config: PreTrainedConfig, pooling: str) -> None:
        super().check_pooling(config, pooling)
        if pooling == "pooler" and not config.vision_use_head:
            raise ValueError("`pooling='pooler'` needs SigLIP's head, which `vision_use_head=False` leaves out.")


TEXT_BACKBONES: dict[str, TextBackbone] = {
    "bert": BertBackbone(),
    "roberta": RobertaBackbone(),
    "xlm-roberta": RobertaBackbone(),
    "clip_text_model": CLIPText(),
}
VISION_BACKBONES: dict[str, VisionBackbone] = {
    "vit": ViT(),
    "dinov2": DINOv2(),
    "siglip_vision_model": SigLIPVision(),
    "clip_vision_model": CLIPVision(),
}


class PassingEmbeddings(nn.Module):
    """Stock embeddings of images, second among the bases, that return what is embedded already as it is."""

    def forward(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[B, channels, height, width], or [B, tokens, hidden_size] -> [B, tokens, hidden_size]"""
        return pixel_values if pixel_values.dim() == 3 else super().forward(pixel_values, *args, **kwargs)


PassingViTEmbeddings = type("PassingViTEmbeddings", (PassingEmbeddings, ViTEmbeddings), {})
PassingDinov2Embeddings = type("PassingDinov2Embeddings", (PassingEmbeddings, Dinov2Embeddings), {})
PassingSiglipEmbeddings = type("PassingSiglipEmbeddings", (PassingEmbeddings, SiglipVisionEmbeddings), {})
PassingCLIPEmbeddings = type("PassingCLIPEmbeddings", (PassingEmbeddings, CLIPVisionEmbeddings), {})
PASSING_EMBEDDINGS: dict[type, type] = {
    ViTEmbeddings: PassingViTEmbeddings,
    Dinov2Embeddings: PassingDinov2Embeddings,
    SiglipVisionEmbeddings: PassingSiglipEmbeddings,
    CLIPVisionEmbeddings: PassingCLIPEmbeddings,
}


def _extend(backbone: PreTrainedModel, module: nn.Module | None, classes: dict[type, type]) -> None:
    """Makes a module of the backbone one of the class that extends its own."""
    if type(module) in classes:
        module.__class__ = classes[type(module)]
        backbone._no_split_modules = {*(backbone._no_split_modules or ()), type(module).__name__}


def is_eager_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether looking at values is cheap and allowed: not while compiling, exporting or tracing, nor on a device."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _with_corners(words: torch.Tensor, corners: torch.Tensor | None) -> torch.Tensor:
    """[N, L, hidden_size] and [m, hidden_size] -> [N, L + m, hidden_size]"""
    return words if corners is None else torch.cat([words, corners.to(words).expand(len(words), -1, -1)], dim=1)


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
