"""PyTorch LoTLIP: two stock transformers backbones, and what LoTLIP adds to them: corner tokens, pooling, projection,
loss."""

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput, CLIPTextModelOutput, CLIPVisionModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested

from .backbones_lotlip import POOLINGS, is_eager_on_cpu, one_token
from .configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig
from .fast_paths_lotlip import PooledLayer, TextPath
from .loss_lotlip import LoTLIPLoss, lotlip_loss
from .masking_lotlip import create_corner_mask

# In the shapes below, B is the batch size, I the number of images, T (if the ids have it) the number of texts an
# image, N = B T, L the length, m the number of corner tokens.


@dataclass
class BaseModelOutputWithPoolingAndCorners(BaseModelOutputWithPooling):
    """
    Output of a text tower.

    Args:
        last_hidden_state: [B, (T,) L, hidden_size], lined up with `input_ids`: the corner tokens are not in it.
        pooler_output: [B, (T,) hidden_size], the pooled state (projected by `get_text_features`).
        hidden_states: as `last_hidden_state`, one for the embeddings and one a layer, with
            `output_hidden_states=True`.
        attentions: [B, (T,) heads, L, L], one a layer, with `output_attentions=True`.
        corner_embeds: [B, (T,) m, hidden_size], the pooled states of the corner tokens, where they were computed.
    """

    corner_embeds: torch.Tensor | None = None


@dataclass
class LoTLIPTextModelOutput(CLIPTextModelOutput):
    """
    Output of [`LoTLIPTextModelWithProjection`]: CLIP's, and `corner_embeds` [B, (T,) m, projection_dim], not
    normalised, where they were computed.
    """

    corner_embeds: torch.Tensor | None = None


@dataclass
class LoTLIPOutput(CLIPOutput):
    """
    Output of [`LoTLIPModel`]: CLIP's fields in CLIP's order, then LoTLIP's own.

    Args:
        loss: scalar, with `return_loss=True`.
        logits_per_image: [I, B] or [I, B, T], scaled cosine similarities.
        logits_per_text: [B, I] or [B, T, I].
        text_embeds: [B, (T,) projection_dim], normalised.
        image_embeds: [I, projection_dim], normalised.
        text_model_output: [`BaseModelOutputWithPoolingAndCorners`] of the text tower, for `input_ids` (without
            `long_input_ids`).
        vision_model_output: `BaseModelOutputWithPooling` of the image tower.
        corner_embeds: [B, (T,) m, projection_dim], normalised, where they were computed; with `long_input_ids`
            [B, T - 1, m, projection_dim], of the long texts alone.
        loss_short: scalar, the short texts' share of the loss.
        loss_long: scalar, the long texts' share of the loss.
    """

    corner_embeds: torch.Tensor | None = None
    loss_short: torch.Tensor | None = None
    loss_long: torch.Tensor | None = None


class LoTLIPPreTrainedModel(PreTrainedModel):
    """Base class of the LoTLIP models: weight initialisation, loading and saving."""

    config: LoTLIPConfig
    _auto_class = "AutoModel"  # so that this code is saved beside the weights
    base_model_prefix = "lotlip"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The module that holds the input embeddings.
    _embedding_module = "text_model"

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> "LoTLIPPreTrainedModel":
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], but `use_safetensors` defaults to `True`: pickled weights
        (`.bin`, `.pt`) can run code. Pass `use_safetensors=False` to load those of a source that you trust.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def post_init(self) -> None:
        super().post_init()
        # transformers adds what the submodules ignore, without their prefix: the image tower's "^text_model" would
        # hide tensors of a whole model's text tower that have no place in it.
        self._keys_to_ignore_on_load_unexpected = set(type(self)._keys_to_ignore_on_load_unexpected or ())

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self, self._embedding_module).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        getattr(self, self._embedding_module).set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LoTLIPTextModel) and module.corner_embeds is not None:
            init.normal_(module.corner_embeds, std=module.config.initializer_range)
        elif isinstance(module, LoTLIPModel):
            init.constant_(module.logit_scale, module.config.logit_scale_init_value)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """
        As `torch.nn.Module.load_state_dict`, and takes the names of `save_pretrained` as well: it writes a ViT's under
        older names than the module has, and `Trainer` resumes from its file by this function.
        """
        names = list(self.state_dict())
        saved = revert_weight_conversion(self, {name: torch.tensor(index) for index, name in enumerate(names)})
        own = {name: names[int(index)] for name, index in saved.items()}
        own.update({name: name for name in names})
        renamed = {own.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(renamed, strict=strict, assign=assign)


class _LoTLIPTower(LoTLIPPreTrainedModel):
    """
    What both towers share: the backbone's modules are found under its own names too, such as
    `vision_model.encoder.layers` over CLIP's image tower. In `named_modules` and in what is saved they are the
    backbone's all the same.
    """

    _embedding_module = "backbone"

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        backbone = modules.get("backbone")
        if backbone is not None and name not in modules and name in backbone._modules:
            return backbone._modules[name]
        return super().__getattr__(name)

    def _options(self, kwargs: dict[str, Any], pooled_only: bool) -> tuple[dict[str, Any], bool]:
        """
        The backbone's options, which has a configuration of its own; and whether it computes the last layer for pooled
        tokens alone: not if all states or attentions are returned, or the pooling reads them.
        """
        defaults = {name: getattr(self.config, name) for name in ("output_attentions", "output_hidden_states")}
        options = {**defaults, **kwargs, "return_dict": True}
        pooled_only = (
            pooled_only
            and not any(options[name] for name in defaults)
            and POOLINGS[self.config.pooling] is one_token
            and self.backbone.config._attn_implementation in ("sdpa", "unpadded")
            and isinstance(self.config.family.last_layer(self.backbone), PooledLayer)
        )
        return options, pooled_only


class LoTLIPTextModel(_LoTLIPTower):
    """
    LoTLIP's text tower, without projection: a stock encoder and m learnable corner tokens.

    The corner tokens stand between [CLS] and the words as far as positions go, and behind the text in memory; no text
    token sees them. They are therefore left out where they are not asked for, and every other output stays the same.
    Over CLIP's causal text tower they have no positions, [EOT] has the role of [CLS], and what they do not change is
    `CLIPTextModel`'s.
    """

    config: LoTLIPTextConfig
    base_model_prefix = "text_model"
    input_modalities = ["text"]
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^(text|visual)_projection\.", r"^logit_scale$"]

    def __init__(self, config: LoTLIPTextConfig) -> None:
        super().__init__(config)
        self.backbone = config.family.build(config.backbone_config, config.pooling)
        self.corner_embeds = None
        if config.num_corner_tokens:
            self.corner_embeds = nn.Parameter(torch.empty(config.num_corner_tokens, config.hidden_size))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        output_corner_embeds: bool | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCorners:
        r"""
        Args:
            input_ids: [B, L] or [B, T, L], plain [CLS] words [SEP] without corner tokens, padded on either side.
            attention_mask: shape of `input_ids`, 1 for text and 0 for padding. By default what is not `pad_token_id`;
                over CLIP, which pads with its [EOT] and sees nothing behind it, everything.
            position_ids: [L] or shape of `input_ids`, positions in the text, 0 for [CLS]; those of the corner tokens
                and the backbone's own offset are added here. By default counted along `attention_mask`.
            inputs_embeds: [B, L, hidden_size] or [B, T, L, hidden_size], word embeddings in place of `input_ids`.
            token_type_ids: shape of `input_ids`; by default zeros.
            output_corner_embeds: Whether to compute the corner tokens. By default in training mode only.
            pooled_only: Whether only the pooled states are needed: where that saves time (BERT, RoBERTa and
                XLM-RoBERTa, not pooled by the mean, with `sdpa` or `unpadded`), `last_hidden_state` is `None`.

        Raises:
            ValueError: on ids beyond the vocabulary and on texts longer than the positions (both where looking is
                cheap), on shapes that do not fit, and on corner tokens under flash attention, which cannot mask them.

        Example:

        ```python
        >>> from transformers import AutoTokenizer
        >>> from lotlip_hf import LoTLIPTextModel

        >>> model = LoTLIPTextModel.from_pretrained("checkpoint")
        >>> tokenizer = AutoTokenizer.from_pretrained("checkpoint")

        >>> inputs = tokenizer(["a photo of a cat", "a dog"], padding=True, return_tensors="pt")
        >>> pooled = model(**inputs).pooler_output
        ```"""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self._embed_words(input_ids)
        shape, family, config = inputs_embeds.shape[:-1], self.config.family, self.config.backbone_config
        _check_shapes(shape, attention_mask=attention_mask, token_type_ids=token_type_ids)
        # from here on, texts are [N, L]
        inputs_embeds = inputs_embeds.reshape(-1, shape[-1], inputs_embeds.shape[-1])
        input_ids, attention_mask, token_type_ids = (
            None if value is None else value.reshape(-1, shape[-1])
            for value in (input_ids, attention_mask, token_type_ids)
        )
        if attention_mask is None and input_ids is not None:
            attention_mask = family.text_mask(config, input_ids)
        is_text = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.bool)
        is_text = is_text if attention_mask is None else attention_mask
        corners = (
            self.corner_embeds if (self.training if output_corner_embeds is None else output_corner_embeds) else None
        )
        num_corner_tokens = 0 if corners is None else len(corners)

        position_ids = self._position_ids(position_ids, is_text)
        inputs = family.embed(self.backbone, inputs_embeds, position_ids, self.config.num_corner_tokens, corners)
        inputs.update(self._segments(token_type_ids, num_corner_tokens))
        pooled_index = family.pooled_index(config, is_text, input_ids)
        options, pooled_only = self._options(kwargs, pooled_only)
        path = TextPath.choose(config, is_text, num_corner_tokens, pooled_index, pooled_only)
        if num_corner_tokens or path.row_index is not None:
            attention_mask = self._corner_mask(inputs["inputs_embeds"], is_text, num_corner_tokens, pooled_index, path)
        outputs = path.run(self.backbone, attention_mask, inputs, **options)

        if pooled_only:
            text, is_text, pooled_index = outputs.last_hidden_state[:, :1], None, None
        else:
            text = outputs.last_hidden_state[:, : shape[-1]]
        corner_embeds = None
        if num_corner_tokens:
            states = outputs.last_hidden_state[:, -num_corner_tokens:].flatten(0, 1).unsqueeze(1)
            corner_embeds = self._pool(states).unflatten(0, (-1, num_corner_tokens))
        return BaseModelOutputWithPoolingAndCorners(
            last_hidden_state=None if pooled_only else _line_up(outputs.last_hidden_state, shape, 1),
            pooler_output=_line_up(self._pool(text, is_text, pooled_index), shape),
            hidden_states=_line_up(outputs.hidden_states, shape, 1),
            attentions=_line_up(outputs.attentions, shape, 2, 3),
            corner_embeds=_line_up(corner_embeds, shape),
        )

    def _embed_words(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[..., L] -> [..., L, hidden_size]"""
        if is_eager_on_cpu(input_ids):
            low, high = input_ids.min().item(), input_ids.max().item()
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"`input_ids` must lie in [0, {self.config.vocab_size}), the model's vocabulary; got ids from "
                    f"{low} to {high}. Was the text tokenised with another model's tokenizer?"
                )
        return self.get_input_embeddings()(input_ids)

    def _position_ids(self, position_ids: torch.Tensor | None, is_text: torch.Tensor) -> torch.Tensor:
        """[N, L]: positions in the text"""
        limit = self.config.max_position_embeddings
        # padding may reach beyond the positions, text may not
        may_exceed = position_ids is not None or is_text.shape[-1] > limit
        if position_ids is None:
            position_ids = self.config.family.count_positions(self.config.backbone_config, is_text)
        else:
            position_ids = position_ids.reshape(-1, is_text.shape[-1]).expand(len(is_text), -1)
        if may_exceed and is_eager_on_cpu(position_ids) and position_ids.max() >= limit:
            raise ValueError(
                f"The longest text has {int(position_ids.max()) + 1} tokens; this model takes {limit}, the first and "
                "last token included. Tokenise with truncation=True."
            )
        return position_ids

    def _segments(self, token_type_ids: torch.Tensor | None, num_corner_tokens: int) -> dict[str, torch.Tensor]:
        """The backbone's `token_type_ids` [N, L + m], if it takes such."""
        if token_type_ids is None:
            return {}
        if self.config.family.has_segments:
            return {"token_type_ids": nn.functional.pad(token_type_ids, (0, num_corner_tokens))}
        if is_eager_on_cpu(token_type_ids) and token_type_ids.any():
            raise ValueError("`token_type_ids` must be 0 or left out: this text encoder has no segments.")
        return {}

    def _corner_mask(
        self,
        inputs_embeds: torch.Tensor,
        is_text: torch.Tensor,
        num_corner_tokens: int,
        pooled_index: torch.Tensor,
        path: TextPath,
    ) -> Any:
        family, config = self.config.family, self.config.backbone_config
        if is_flash_attention_requested(config):
            raise ValueError(
                "Flash attention cannot apply the corner tokens' mask. Load the model with attn_implementation='sdpa' "
                "or 'flex_attention' for training, or pass output_corner_embeds=False to leave the corner tokens out."
            )
        return create_corner_mask(
            family, config, inputs_embeds, is_text, num_corner_tokens, pooled_index, path.row_index
        )

    def _pool(
        self, states: torch.Tensor, is_text: torch.Tensor | None = None, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[N, L, hidden_size], by default of texts of one token -> [N, hidden_size]"""
        pooled = POOLINGS[self.config.pooling](states, is_text, index)
        return self.backbone.pooler(pooled.unsqueeze(1)) if self.config.pooling == "pooler" else pooled


class LoTLIPVisionModel(_LoTLIPTower):
    """LoTLIP's image tower, without projection: a stock encoder and its pooling."""

    config: LoTLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^(text|visual)_projection\.", r"^logit_scale$"]

    def __init__(self, config: LoTLIPVisionConfig) -> None:
        super().__init__(config)
        self.backbone = config.family.build(config.backbone_config, config.pooling)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        kept_patches: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values: [B, channels, height, width], normalised by the image processor.
            interpolate_pos_encoding: Whether to interpolate the position encodings for images of another size than the
                model's (DINOv2 always does).
            pooled_only: Whether only the pooled states are needed: where that saves time (ViT, not pooled by the mean,
                with `sdpa`), `last_hidden_state` is `None`.
            kept_patches: [B, K], indices in [0, P) of the patches that the tower computes; by default all. They have
                their positions in the whole image, and prefix tokens such as [CLS] always stay.

        Raises:
            ValueError: on images that are missing, or of another size or type than the model takes, and on indices
                beyond the patches (where looking is cheap).

        Example:

        ```python
        >>> from PIL import Image
        >>> from transformers import AutoProcessor
        >>> from lotlip_hf import LoTLIPVisionModel

        >>> model = LoTLIPVisionModel.from_pretrained("checkpoint")
        >>> processor = AutoProcessor.from_pretrained("checkpoint")

        >>> inputs = processor(images=Image.new("RGB", (640, 480)), return_tensors="pt")
        >>> pooled = model(**inputs).pooler_output
        ```"""
        if pixel_values is None:
            raise ValueError("`pixel_values` is missing.")
        if pixel_values.dim() != 4 or not pixel_values.is_floating_point():
            raise ValueError(
                "`pixel_values` must be floating point [batch, channels, height, width], got "
                f"{list(pixel_values.shape)} of {pixel_values.dtype}: pass images through the processor."
            )
        family, backbone, size = self.config.family, self.backbone, self.config.image_size
        options, pooled_only = self._options(kwargs, pooled_only)
        embedding_options = {}
        if family.takes_interpolation:
            embedding_options = {"interpolate_pos_encoding": interpolate_pos_encoding}
            size = (size, size) if isinstance(size, int) else tuple(size)
            if not interpolate_pos_encoding and pixel_values.shape[-2:] != size:
                raise ValueError(
                    f"`pixel_values` are {list(pixel_values.shape[-2:])}, the model is for {list(size)}: resize the "
                    "images with the processor, or pass interpolate_pos_encoding=True."
                )
        if kept_patches is not None:
            pixel_values = family.keep(backbone, pixel_values, kept_patches, **embedding_options)
        if pooled_only:
            options["pooled_tokens"] = pixel_values.new_zeros(len(pixel_values), 1, dtype=torch.int64)  # [CLS]
        outputs = backbone(pixel_values, **embedding_options, **options)
        states, pooling = outputs.last_hidden_state, POOLINGS[self.config.pooling]
        if self.config.pooling == "pooler":
            pooled = outputs.pooler_output
        else:
            pooled = pooling(states if pooling is one_token else states[:, family.num_prefix_tokens :], None, None)
        return BaseModelOutputWithPooling(
            last_hidden_state=None if pooled_only else states,
            pooler_output=pooled,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LoTLIPTextModelWithProjection(LoTLIPPreTrainedModel):
    """LoTLIP's text tower with its projection to the space that it shares with the images."""

    config: LoTLIPTextConfig
    base_model_prefix = "text_model"
    input_modalities = ["text"]
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", r"^logit_scale$"]

    def __init__(self, config: LoTLIPTextConfig) -> None:
        super().__init__(config)
        self.text_model = LoTLIPTextModel._from_config(config)
        self.text_projection = _projection(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        output_corner_embeds: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LoTLIPTextModelOutput:
        r"""Arguments and errors are those of [`LoTLIPTextModel`]."""
        outputs = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            token_type_ids,
            output_corner_embeds,
            **{**kwargs, "return_dict": True},
        )
        corner_embeds = outputs.corner_embeds
        return LoTLIPTextModelOutput(
            text_embeds=self.text_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            corner_embeds=None if corner_embeds is None else self.text_projection(corner_embeds),
        )


class LoTLIPVisionModelWithProjection(LoTLIPPreTrainedModel):
    """LoTLIP's image tower with its projection (the identity where the configuration has none)."""

    config: LoTLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _embedding_module = "vision_model"
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]

    def __init__(self, config: LoTLIPVisionConfig) -> None:
        super().__init__(config)
        self.vision_model = LoTLIPVisionModel._from_config(config)
        self.visual_projection = _projection(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLIPVisionModelOutput:
        r"""Arguments and errors are those of [`LoTLIPVisionModel`]; `image_embeds` are not normalised."""
        outputs = self.vision_model(pixel_values, interpolate_pos_encoding, **{**kwargs, "return_dict": True})
        return CLIPVisionModelOutput(
            image_embeds=self.visual_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LoTLIPModel(LoTLIPPreTrainedModel):
    """
    LoTLIP, a dual encoder of images and of short and long texts (https://arxiv.org/abs/2410.05249), with the interface
    of `CLIPModel`.
    """

    def __init__(self, config: LoTLIPConfig) -> None:
        super().__init__(config)
        # as CLIPModel has them
        self.projection_dim = config.projection_dim
        self.text_embed_dim = config.text_config.hidden_size
        self.vision_embed_dim = config.vision_config.hidden_size
        self.text_model = LoTLIPTextModel._from_config(config.text_config)
        self.vision_model = LoTLIPVisionModel._from_config(config.vision_config)
        self.text_projection = _projection(config.text_config)
        self.visual_projection = _projection(config.vision_config)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        output_corner_embeds: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCorners:
        r"""
        The text tower's output with `pooler_output` [B, (T,) projection_dim] and `corner_embeds` projected, not
        normalised. Arguments and errors are those of [`LoTLIPTextModel`].

        Example:

        ```python
        >>> import torch
        >>> from transformers import AutoModel, AutoTokenizer
        >>> import lotlip_hf

        >>> model = AutoModel.from_pretrained("checkpoint")
        >>> tokenizer = AutoTokenizer.from_pretrained("checkpoint")

        >>> inputs = tokenizer(["a photo of a cat", "a dog"], padding=True, return_tensors="pt")
        >>> with torch.inference_mode():
        ...     text_features = model.get_text_features(**inputs).pooler_output
        ```"""
        outputs = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            token_type_ids,
            output_corner_embeds,
            **{**kwargs, "return_dict": True},
        )
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        if outputs.corner_embeds is not None:
            outputs.corner_embeds = self.text_projection(outputs.corner_embeds)
        return outputs

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        kept_patches: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        The image tower's output with `pooler_output` [B, projection_dim] projected, not normalised. Arguments and
        errors are those of [`LoTLIPVisionModel`].

        Example:

        ```python
        >>> import torch
        >>> from PIL import Image
        >>> from transformers import AutoModel, AutoProcessor
        >>> import lotlip_hf

        >>> model = AutoModel.from_pretrained("checkpoint")
        >>> processor = AutoProcessor.from_pretrained("checkpoint")

        >>> inputs = processor(images=Image.new("RGB", (640, 480)), return_tensors="pt")
        >>> with torch.inference_mode():
        ...     image_features = model.get_image_features(**inputs).pooler_output
        ```"""
        outputs = self.vision_model(
            pixel_values, interpolate_pos_encoding, kept_patches=kept_patches, **{**kwargs, "return_dict": True}
        )
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        output_corner_embeds: bool | None = None,
        long_input_ids: torch.Tensor | None = None,
        long_attention_mask: torch.Tensor | None = None,
        kept_patches: torch.Tensor | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LoTLIPOutput:
        r"""
        Arguments and errors are those of [`LoTLIPTextModel`] and [`LoTLIPVisionModel`], and those below. Texts or
        images alone, as transformers' pipelines for feature extraction give them, are answered with their embeddings.

        Args:
            return_loss: Whether to return the loss; text i belongs to image i. For `input_ids` [B, T, L], and with
                `long_input_ids`, it is LoTLIP's (`loss_lotlip.lotlip_loss`), for [B, L] alone CLIP's, which no corner
                token takes part in.
            output_corner_embeds: Whether to compute the corner tokens. By default in training mode and where the loss
                needs them, so that it does not depend on the mode.
            long_input_ids: [B, T - 1, L'], the long texts, where `input_ids` [B, L] are the short ones: each padded to
                its own length, and the short texts, whose corner tokens the loss does not use, run without them. The
                answers have T texts, the short one first, as for [B, T, L].
            long_attention_mask: shape of `long_input_ids`; by default what is not `pad_token_id`.
            pooled_only: Whether only the embeddings and the loss are needed: `logits_per_image` and `logits_per_text`
                are `None`, and the towers' `last_hidden_state` may be.

        Example:

        ```python
        >>> import torch
        >>> from PIL import Image
        >>> from transformers import AutoModel, AutoProcessor
        >>> import lotlip_hf

        >>> model = AutoModel.from_pretrained("checkpoint")
        >>> processor = AutoProcessor.from_pretrained("checkpoint")

        >>> inputs = processor(text=["a cat", "a dog"], images=Image.new("RGB", (640, 480)), return_tensors="pt")
        >>> with torch.inference_mode():
        ...     outputs = model(**inputs)
        >>> probabilities = outputs.logits_per_image.softmax(dim=1)
        ```"""
        kwargs.update({"return_dict": True, "pooled_only": pooled_only})
        has_long_texts = long_input_ids is not None
        has_texts = has_long_texts or input_ids is not None or inputs_embeds is not None
        vision_outputs = text_outputs = image_embeds = text_embeds = corner_embeds = logits_per_text = None
        loss = LoTLIPLoss(None, None, None)

        # images come first: their backward pass then comes last, and what waits for their gradients has time
        if pixel_values is not None or return_loss:
            vision_outputs = self.get_image_features(pixel_values, interpolate_pos_encoding, kept_patches, **kwargs)
            image_embeds = nn.functional.normalize(vision_outputs.pooler_output, dim=-1)
        if has_texts or image_embeds is None or return_loss:
            has_many = has_long_texts or 3 in (getattr(input_ids, "ndim", 0), getattr(inputs_embeds, "ndim", 0) - 1)
            if output_corner_embeds is None:
                output_corner_embeds = self.training or bool(return_loss and has_many)
            of_short = output_corner_embeds and not has_long_texts
            text_outputs = self.get_text_features(
                input_ids, attention_mask, position_ids, inputs_embeds, token_type_ids, of_short, **kwargs
            )
            text_embeds, corner_embeds = text_outputs.pooler_output, text_outputs.corner_embeds
            if has_long_texts:
                long_outputs = self.get_text_features(
                    long_input_ids, long_attention_mask, output_corner_embeds=output_corner_embeds, **kwargs
                )
                text_embeds = torch.cat([text_embeds.unsqueeze(1), long_outputs.pooler_output], dim=1)
                corner_embeds = long_outputs.corner_embeds
            text_embeds = nn.functional.normalize(text_embeds, dim=-1)
            if corner_embeds is not None:
                corner_embeds = nn.functional.normalize(corner_embeds, dim=-1)

        if image_embeds is not None and text_embeds is not None:
            image_embeds, logit_scale = (
                image_embeds.to(text_embeds.device),
                self.logit_scale.exp().to(text_embeds.device),
            )
            if not pooled_only:
                logits_per_text = logit_scale * text_embeds @ image_embeds.t()  # [B, (T,) I]
            if return_loss:
                loss = self._loss(image_embeds, text_embeds, corner_embeds, logit_scale)
        return LoTLIPOutput(
            loss=loss.loss,
            logits_per_image=None if logits_per_text is None else logits_per_text.movedim(-1, 0),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
            corner_embeds=corner_embeds,
            loss_short=loss.loss_short,
            loss_long=loss.loss_long,
        )

    def _loss(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        corner_embeds: torch.Tensor | None,
        logit_scale: torch.Tensor,
    ) -> LoTLIPLoss:
        if text_embeds.dim() == 2:
            text_embeds, corner_embeds = text_embeds.unsqueeze(1), None
        elif corner_embeds is not None:  # of the long texts
            corner_embeds = corner_embeds[:, corner_embeds.shape[1] - text_embeds.shape[1] + 1 :]
        weights = self.config.short_loss_weight, self.config.long_loss_weight
        return lotlip_loss(image_embeds, text_embeds, corner_embeds, logit_scale, *weights)

    @classmethod
    def from_backbones(
        cls,
        text: str | Path | PreTrainedModel,
        vision: str | Path | PreTrainedModel,
        num_corner_tokens: int = 2,
        *,
        text_pooling: str | None = None,
        vision_pooling: str | None = None,
        projection_dim: int | None = None,
        **config_kwargs: Any,
    ) -> "LoTLIPModel":
        r"""
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
        >>> from lotlip_hf import LoTLIPModel

        >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> text, vision = BertModel(BertConfig(**size)), ViTModel(ViTConfig(**size))
        >>> model = LoTLIPModel.from_backbones(text, vision, num_corner_tokens=2)
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
        model = cls(LoTLIPConfig(**towers, projection_dim=text_config.projection_dim, **config_kwargs))
        for tower, encoder in ((model.text_model, text_encoder), (model.vision_model, vision_encoder)):
            keys = tower.backbone.load_state_dict(encoder.state_dict(), strict=False)
            missing, unexpected = _without_pooler(keys.missing_keys), _without_pooler(keys.unexpected_keys)
            if missing or unexpected:
                raise ValueError(
                    f"The encoder {type(encoder).__name__} does not fit the {tower.base_model_prefix}: missing "
                    f"{missing}, unexpected {unexpected}."
                )
        return model


def _projection(config: LoTLIPTextConfig | LoTLIPVisionConfig) -> nn.Module:
    if config.projection_dim is None:
        return nn.Identity()
    return nn.Linear(config.hidden_size, config.projection_dim, bias=False)


def _check_shapes(shape: torch.Size, **values: torch.Tensor | None) -> None:
    """Of arguments that `reshape` would take in silence."""
    if len(shape) not in (2, 3):
        raise ValueError(
            f"`input_ids` must have shape [batch, length] or [batch, texts, length] (`inputs_embeds` one dimension "
            f"more), got {list(shape)}."
        )
    for name, value in values.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"`{name}` must have the texts' shape {list(shape)}, got {list(value.shape)}.")


def _line_up(states: Any, shape: torch.Size, *length_dims: int) -> Any:
    """Drops the corner tokens and restores the texts' shape [B, (T,) L]; where neither is needed, nothing changes."""
    if states is None or isinstance(states, tuple):
        return states and tuple(_line_up(one, shape, *length_dims) for one in states)
    for dim in length_dims:
        if states.shape[dim] != shape[-1]:
            states = states.narrow(dim, 0, shape[-1])
    return states.unflatten(0, shape[:-1]) if len(shape) == 3 else states


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


__all__ = [
    "BaseModelOutputWithPoolingAndCorners",
    "LoTLIPModel",
    "LoTLIPOutput",
    "LoTLIPPreTrainedModel",
    "LoTLIPTextModel",
    "LoTLIPTextModelOutput",
    "LoTLIPTextModelWithProjection",
    "LoTLIPVisionModel",
    "LoTLIPVisionModelWithProjection",
]
