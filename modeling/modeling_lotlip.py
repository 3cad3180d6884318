"""PyTorch LoTLIP: two stock transformers backbones with corner tokens, pooling, projections and the loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput, CLIPTextModelOutput, CLIPVisionModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .backbones_lotlip import POOLINGS, is_eager_on_cpu, one_token
from .configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig
from .fast_paths_lotlip import PooledLayer, fast_options, run_texts
from .loss_lotlip import LoTLIPLoss, lotlip_loss
from .masking_lotlip import create_corner_mask
from .medoids_lotlip import Kept
from .prepending_lotlip import prepend_in, prepending_sources
from .projection_lotlip import ResidualMLP

# Shapes: B is the batch size, I the number of images, T the number of texts per image (ids may lack this dimension),
# N = B T, L the length, m the number of corner tokens, P the number of patches, D the width of the shared space.


@dataclass
class BaseModelOutputWithPoolingAndCorners(BaseModelOutputWithPooling):
    """
    Output of [`LoTLIPTextModel`]: `last_hidden_state` and `hidden_states` [B, (T,) L, hidden_size] and `attentions`
    [B, (T,) heads, L, L] without corner tokens, and the pooled states `pooler_output` [B, (T,) hidden_size] of the
    texts and `corner_embeds` [B, (T,) m, hidden_size] of the corner tokens. With `output_token_embeds`, `token_embeds`
    [B, (T,) L, hidden_size] are the pooled states of texts of one token each. `corner_attentions`
    [B, (T,) heads, m, L] are what the corner tokens attend to.
    """

    corner_embeds: Tensor | None = None
    token_embeds: Tensor | None = None
    corner_attentions: tuple[Tensor, ...] | None = None


@dataclass
class BaseModelOutputWithPoolingAndPatches(BaseModelOutputWithPooling):
    """
    Output of [`LoTLIPVisionModel`]: `last_hidden_state`, `hidden_states` and `attentions` of the backbone, and the
    pooled states `pooler_output` [I, pooled_size]. With `output_patch_embeds`, `patch_embeds` [I, P, pooled_size] are
    the pooled states of images of one patch each.
    """

    patch_embeds: Tensor | None = None


@dataclass
class LoTLIPTextModelOutput(CLIPTextModelOutput):
    """
    The features `text_embeds` [B, (T,) D], `corner_embeds` [B, (T,) m, D] and `token_embeds` [B, (T,) L, D], and all
    states of the text tower.
    """

    corner_embeds: Tensor | None = None
    token_embeds: Tensor | None = None
    corner_attentions: tuple[Tensor, ...] | None = None


@dataclass
class LoTLIPVisionModelOutput(CLIPVisionModelOutput):
    """The features `image_embeds` [I, D] and `patch_embeds` [I, P, D], and all states of the image tower."""

    patch_embeds: Tensor | None = None


@dataclass
class LoTLIPOutput(CLIPOutput):
    """
    Output of [`LoTLIPModel`]: the scalars `loss` and its parts `loss_short` and `loss_long`; `logits_per_image`
    [I, B (, T)] and `logits_per_text` [B, (T,) I]; the embeddings `text_embeds` [B, (T,) D], `image_embeds` [I, D] and
    `corner_embeds` [B, (T,) m, D] (of all texts) or [B, T - 1, m, D] (of the long texts in `long_input_ids`); and the
    towers' outputs `text_model_output` (for `input_ids`) and `vision_model_output`. With `output_patch_embeds` and
    `output_token_embeds` also the normalised features `patch_embeds` [I, P, D], `token_embeds` [B, (T,) L, D] of
    `input_ids`, and `long_token_embeds` [B, T - 1, L', D] of `long_input_ids`.
    """

    corner_embeds: Tensor | None = None
    patch_embeds: Tensor | None = None
    token_embeds: Tensor | None = None
    long_token_embeds: Tensor | None = None
    loss_short: Tensor | None = None
    loss_long: Tensor | None = None


class LoTLIPPreTrainedModel(PreTrainedModel):
    """Base class of the LoTLIP models. It initialises, loads and saves weights."""

    config: LoTLIPConfig
    _auto_class = "AutoModel"  # saves the code of the model with the weights
    base_model_prefix = "lotlip"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _embedding_module = "text_model"  # the submodule with the input embeddings

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "LoTLIPPreTrainedModel":
        """Same as the stock method, but `use_safetensors` defaults to `True`, because pickled weights can run code."""
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        return super().from_pretrained(*args, **kwargs)

    def post_init(self) -> None:
        super().post_init()
        # Drop the patterns of submodules: without the submodule's prefix, they would match tensors of this model.
        self._keys_to_ignore_on_load_unexpected = set(type(self)._keys_to_ignore_on_load_unexpected or ())

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self, self._embedding_module).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        getattr(self, self._embedding_module).set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LoTLIPTextModel) and module.corner_embeds is not None:
            init.normal_(module.corner_embeds, std=getattr(module.config, "initializer_range", 0.02))
        elif isinstance(module, LoTLIPModel):
            init.constant_(module.logit_scale, module.config.logit_scale_init_value)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Also accepts the names in saved files, which differ from a ViT's names and which `Trainer` passes."""
        names = list(self.state_dict())
        if state_dict.keys() <= set(
            names
        ):  # the names of merged weights, as of experts, cannot be reverted one by one
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        saved = revert_weight_conversion(self, {name: torch.tensor(index) for index, name in enumerate(names)})
        own = {name: names[int(index)] for name, index in saved.items()} | {name: name for name in names}
        renamed = {own.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(renamed, strict=strict, assign=assign)


class _LoTLIPTower(LoTLIPPreTrainedModel):
    """Base class of both towers. The backbone's modules are also attributes, such as CLIP's `vision_model.encoder`."""

    _embedding_module = "backbone"

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name not in modules and name in getattr(modules.get("backbone"), "_modules", ()):
            return modules["backbone"]._modules[name]
        return super().__getattr__(name)

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Adds defaults of the tower's configuration to `kwargs`, because the backbone reads only its own."""
        names = ("output_attentions", "output_hidden_states")
        return {**{name: getattr(self.config, name) for name in names}, **kwargs, "return_dict": True}

    def _can_pool_only(self, options: dict[str, Any]) -> bool:
        return (
            not (options["output_attentions"] or options["output_hidden_states"])
            and POOLINGS.get(self.config.pooling) is one_token
            and self.backbone.config._attn_implementation in ("sdpa", "unpadded")
            and isinstance(self.config.family.last_layer(self.backbone), PooledLayer)
        )


class LoTLIPTextModel(_LoTLIPTower):
    """
    LoTLIP's text tower without projection: a stock text encoder and m learnable corner tokens.

    Text tokens do not attend to corner tokens, which are computed only if needed. Where corner tokens are depends on
    the encoder. With learned positions, they have those between the first token and the words. With rotary positions,
    they have that of the first token. In decoders, they have those that follow the text. With relative positions, they
    precede the text in memory, where they follow it otherwise. In CLIP, they have no positions.

    ```python
    >>> from lotlip_hf import LoTLIPTextModel, LoTLIPTokenizer
    >>> inputs = LoTLIPTokenizer.from_pretrained("checkpoint")(["a cat", "a dog"], return_tensors="pt")
    >>> pooled = LoTLIPTextModel.from_pretrained("checkpoint")(**inputs).pooler_output  # [2, hidden_size]
    ```
    """

    config: LoTLIPTextConfig
    base_model_prefix = "text_model"
    input_modalities = ["text"]
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^(text|visual)_projection\.", r"^logit_scale$"]

    def __init__(self, config: LoTLIPTextConfig) -> None:
        super().__init__(config)
        self.backbone = config.family.build(config.backbone_config, config.pooling)
        if config.token_prepending is not None:
            prepend_in(self.backbone, *config.token_prepending)
        self.corner_embeds = None
        if config.num_corner_tokens:
            size = self.backbone.get_input_embeddings().embedding_dim  # ALBERT's is not the hidden size
            self.corner_embeds = nn.Parameter(torch.empty(config.num_corner_tokens, size))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_corner_embeds: bool | None = None,
        pooled_only: bool = False,
        output_token_embeds: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCorners:
        r"""
        Args:
            input_ids (`torch.Tensor`, *optional*): Token ids [B, (T,) L] without corner tokens, padded on either side.
            attention_mask (`torch.Tensor`, *optional*): 1 for text and 0 for padding, in the shape of `input_ids`.
                Defaults to `input_ids != pad_token_id`, and to ones for CLIP, which pads with its [EOT].
            position_ids (`torch.Tensor`, *optional*): Positions in the text, [L] or in the shape of `input_ids`,
                without the offsets of backbone and corner tokens. By default, text tokens are counted from 0.
            inputs_embeds (`torch.Tensor`, *optional*): Word embeddings [B, (T,) L, hidden_size], to replace
                `input_ids`.
            token_type_ids (`torch.Tensor`, *optional*): Segment ids, in the shape of `input_ids`. Defaults to zeros.
            output_corner_embeds (`bool`, *optional*): Whether to compute the corner tokens. Defaults to
                `model.training`. Not supported by flash attention.
            pooled_only (`bool`, *optional*, defaults to `False`): Whether only the pooled states are needed. BERT and
                RoBERTa with `sdpa` or `unpadded` attention and no mean pooling then save time and return `None` for
                `last_hidden_state`.
            output_token_embeds (`bool`, *optional*, defaults to `False`): Whether to return `token_embeds`.
        """
        family, config = self.config.family, self.config.backbone_config
        shape = _text_shape(input_ids, inputs_embeds)
        words = self._embed_words(input_ids) if inputs_embeds is None else inputs_embeds
        words = words.flatten(0, -3)  # from here on, texts are [N, L], and [N, L + m] with corner tokens
        input_ids, attention_mask, token_type_ids = _flatten(
            shape, input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        if attention_mask is None and input_ids is not None:
            attention_mask = family.text_mask(config, input_ids)
        is_text = words.new_ones(words.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask
        pooled_index = family.pooled_index(config, is_text, input_ids)
        position_ids = self._position_ids(position_ids, is_text)

        if output_corner_embeds is None:
            output_corner_embeds = self.training
        has_corners = output_corner_embeds and self.corner_embeds is not None
        corners = self.corner_embeds.to(words.dtype) if has_corners else words.new_empty(0, words.shape[-1])
        inputs = family.embed(self.backbone, words, position_ids, self.config.num_corner_tokens, corners)
        del words  # frees memory before the backbone runs
        if token_type_ids is not None and family.has_segments:
            beside = (len(corners), 0) if family.corners_first else (0, len(corners))
            inputs["token_type_ids"] = nn.functional.pad(token_type_ids, beside)
        elif token_type_ids is not None and is_eager_on_cpu(token_type_ids) and token_type_ids.any():
            raise ValueError("`token_type_ids` must be 0: this text encoder has no segments. Leave the argument out.")

        options = {**self._options(kwargs), **family.options(config)}
        pooled_only = pooled_only and not output_token_embeds and self._can_pool_only(options)
        options |= fast_options(family, config, is_text, len(corners), pooled_index if pooled_only else None)
        if self.config.token_prepending is not None:
            if input_ids is None:
                raise ValueError("`token_prepending` needs `input_ids` to find the placeholder.")
            options.pop("row", None)
            is_placeholder = input_ids == self.config.placeholder_token_id
            options["sources"] = prepending_sources(is_placeholder, pooled_index, shape[-1] + len(corners))
        mask, row = attention_mask, options.get("row")
        if len(corners) or row is not None:
            mask = create_corner_mask(family, config, inputs["inputs_embeds"], is_text, pooled_index, row)
        outputs = run_texts(self.backbone, inputs, mask, **options)

        states = outputs.last_hidden_state  # [N, L + m, hidden_size], or [N, 1 + m, hidden_size] if `pooled_only`
        length, pooled_index = (1, None) if pooled_only else (shape[-1], pooled_index)
        first = len(corners) if family.corners_first else 0  # index of the first token of the text
        text_states = states[:, first : first + length]
        corners_at = slice(0, first) if family.corners_first else slice(length, None)
        pooled = self._pool(text_states, is_text, pooled_index)
        rows = tuple(one[:, :, corners_at] for one in outputs.attentions or ()) if len(corners) else ()
        return BaseModelOutputWithPoolingAndCorners(
            last_hidden_state=None if pooled_only else _line_up(states, shape, 1, first=first),
            pooler_output=_line_up(pooled, shape),
            hidden_states=_line_up(outputs.hidden_states, shape, 1, first=first),
            attentions=_line_up(outputs.attentions, shape, 2, 3, first=first),
            corner_embeds=_line_up(self._pool_each(states[:, corners_at]), shape) if len(corners) else None,
            token_embeds=_line_up(self._pool_each(text_states), shape) if output_token_embeds else None,
            corner_attentions=_line_up(rows, shape, 3, first=first) or None,
        )

    def _embed_words(self, input_ids: Tensor) -> Tensor:
        """[..., L] -> [..., L, hidden_size]"""
        size = self.config.vocab_size
        if is_eager_on_cpu(input_ids) and not ((input_ids >= 0) & (input_ids < size)).all():
            raise ValueError(f"`input_ids` must be in [0, {size}). Use the tokenizer of this checkpoint.")
        return self.get_input_embeddings()(input_ids)

    def _position_ids(self, position_ids: Tensor | None, is_text: Tensor) -> Tensor:
        """Positions in the text, [N, L]. Checks the limit if the padded length or `position_ids` may exceed it."""
        limit, length = self.config.max_position_embeddings, is_text.shape[-1]
        may_exceed = position_ids is not None or length > limit
        if position_ids is None:
            position_ids = self.config.family.count_positions(self.config.backbone_config, is_text)
        position_ids = position_ids.reshape(-1, length).expand(is_text.shape[0], -1)
        if may_exceed and is_eager_on_cpu(position_ids) and position_ids.max() >= limit:
            longest = int(position_ids.max()) + 1
            raise ValueError(f"A text has {longest} tokens, more than the {limit} of the model: pass truncation=True.")
        return position_ids

    def _pool(self, states: Tensor, is_text: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """[N, L, hidden_size] -> [N, hidden_size]"""
        pooled = POOLINGS[self.config.pooling](states, is_text, index)
        return self.backbone.pooler(pooled.unsqueeze(1)) if self.config.pooling == "pooler" else pooled

    def _pool_each(self, states: Tensor) -> Tensor:
        """[N, L, hidden_size] -> [N, L, hidden_size]: each state as a text of length 1"""
        return self._pool(states.flatten(0, 1).unsqueeze(1)).unflatten(0, states.shape[:2])


class LoTLIPVisionModel(_LoTLIPTower):
    """
    LoTLIP's image tower without projection: a stock image encoder and its pooling.

    ```python
    >>> from lotlip_hf import LoTLIPProcessor, LoTLIPVisionModel
    >>> inputs = LoTLIPProcessor.from_pretrained("checkpoint")(images="photos/cat.png", return_tensors="pt")
    >>> pooled = LoTLIPVisionModel.from_pretrained("checkpoint")(**inputs).pooler_output  # [1, pooled_size]
    ```
    """

    config: LoTLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^(text|visual)_projection\.", r"^logit_scale$"]

    def __init__(self, config: LoTLIPVisionConfig) -> None:
        super().__init__(config)
        self.backbone = config.family.build(config.backbone_config, config.pooling)
        if config.image_token_centers is not None:
            config.family.use_medoids(self.backbone, config.image_token_centers, config.image_token_layer)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        kept_patches: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        output_patch_embeds: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndPatches:
        r"""
        Args:
            pixel_values (`torch.Tensor`): Images [B, channels, height, width], normalised by the image processor. For
                SigLIP 2 NaFlex, flattened patches [B, P, channels * patch_size * patch_size].
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`): Whether to accept images that do not
                have the size of the model's images, for ViT, CLIP and SigLIP. DINOv2, DINOv3 and ConvNeXt accept all
                sizes, and a model of timm only those that it was created for.
            pooled_only (`bool`, *optional*, defaults to `False`): Whether only the pooled states are needed. A ViT
                with `sdpa` attention and no mean pooling then returns `None` for `last_hidden_state`.
            kept_patches (`torch.Tensor`, *optional*): Indices [B, K] in [0, P) of the patches to compute, at their
                positions in the whole image. Defaults to all patches. A class token and registers are always kept.
                ConvNeXt and models of timm do not support it.
            pixel_attention_mask (`torch.Tensor`, *optional*): For SigLIP 2 NaFlex: 1 for patches and 0 for padding,
                [B, P].
            spatial_shapes (`torch.Tensor`, *optional*): For SigLIP 2 NaFlex: height and width of each image in
                patches, [B, 2].
            output_patch_embeds (`bool`, *optional*, defaults to `False`): Whether to return `patch_embeds`, row by
                row from the top left. An attention pooling, such as SigLIP's head, is left out.
        """
        family = self.config.family
        others = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        inputs = family.inputs(self.backbone, pixel_values, interpolate_pos_encoding, **others)
        options = self._options(kwargs)
        if self.config.image_token_centers is not None:
            if output_patch_embeds:
                raise ValueError("`output_patch_embeds` needs all patches. Set `image_token_centers` to None.")
            options["kept"] = Kept()
        has_hidden_states, layers = options["output_hidden_states"], self.config.pooled_layers
        options["output_hidden_states"] = has_hidden_states or layers > 1
        pooled_only = pooled_only and not output_patch_embeds and self._can_pool_only(options)
        if pooled_only:
            images = inputs["pixel_values"]
            options["pooled_tokens"] = images.new_zeros(images.shape[0], 1, dtype=torch.int64)  # [CLS]
        if kept_patches is not None:
            inputs = family.keep(self.backbone, inputs, kept_patches)
        outputs = family.run(self.backbone, inputs, **options)
        mask = inputs.get("pixel_attention_mask")
        states = [outputs.last_hidden_state]
        if layers > 1:
            norm = self.backbone.get_submodule(family.final_norm)
            states = [*map(norm, outputs.hidden_states[-layers:-1]), *states]
        poolings = self.config.pooling.split("+")
        pooled = [self._pool(name, outputs, one, mask) for one in states for name in poolings]
        patches = None
        if output_patch_embeds:
            each = [family.pool_each(self.backbone, one, name) for one in states for name in poolings]
            patches = torch.cat(each, dim=-1)
        return BaseModelOutputWithPoolingAndPatches(
            last_hidden_state=None if pooled_only else outputs.last_hidden_state,
            pooler_output=torch.cat(pooled, dim=-1),
            hidden_states=outputs.hidden_states if has_hidden_states else None,
            attentions=outputs.get("attentions"),
            patch_embeds=patches,
        )

    def _pool(self, pooling: str, outputs: Any, states: Tensor, mask: Tensor | None) -> Tensor:
        """Outputs, states of a layer after the final norm, and a mask [B, P] or `None` -> [B, hidden_size]"""
        pool = POOLINGS[pooling]
        if pooling == "pooler":
            return outputs.pooler_output
        if pool is one_token:
            return pool(states, None, None)
        return pool(self.config.family.patches(self.backbone, states), mask, None)


class LoTLIPTextModelWithProjection(LoTLIPPreTrainedModel):
    """
    LoTLIP's text tower with its projection to the shared space.

    ```python
    >>> from lotlip_hf import LoTLIPTextModelWithProjection, LoTLIPTokenizer
    >>> inputs = LoTLIPTokenizer.from_pretrained("checkpoint")(["a cat", "a dog"], return_tensors="pt")
    >>> features = LoTLIPTextModelWithProjection.from_pretrained("checkpoint")(**inputs).text_embeds  # [2, D]
    ```
    """

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
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> LoTLIPTextModelOutput:
        r"""Accepts the arguments of [`LoTLIPTextModel`]. Returns features: `text_embeds` are not normalised."""
        outputs = dict(_project(self.text_model, self.text_projection, input_ids, attention_mask, **kwargs))
        return LoTLIPTextModelOutput(text_embeds=outputs.pop("pooler_output"), **outputs)


class LoTLIPVisionModelWithProjection(LoTLIPPreTrainedModel):
    """
    LoTLIP's image tower with its projection to the shared space, if the configuration has one.

    ```python
    >>> from lotlip_hf import LoTLIPProcessor, LoTLIPVisionModelWithProjection
    >>> inputs = LoTLIPProcessor.from_pretrained("checkpoint")(images="photos/cat.png", return_tensors="pt")
    >>> features = LoTLIPVisionModelWithProjection.from_pretrained("checkpoint")(**inputs).image_embeds  # [1, D]
    ```
    """

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
    def forward(self, pixel_values: Tensor | None = None, *args: Any, **kwargs: Any) -> LoTLIPVisionModelOutput:
        r"""Accepts the arguments of [`LoTLIPVisionModel`]. Returns features: `image_embeds` are not normalised."""
        outputs = dict(_project(self.vision_model, self.visual_projection, pixel_values, *args, **kwargs))
        return LoTLIPVisionModelOutput(image_embeds=outputs.pop("pooler_output"), **outputs)


class LoTLIPModel(LoTLIPPreTrainedModel):
    """
    LoTLIP (https://arxiv.org/abs/2410.05249): a dual encoder of images and short or long texts, used like `CLIPModel`.

    ```python
    >>> from lotlip_hf import LoTLIPModel, LoTLIPProcessor
    >>> model, processor = LoTLIPModel.from_pretrained("checkpoint"), LoTLIPProcessor.from_pretrained("checkpoint")
    >>> inputs = processor(text=["a cat", "a dog"], images="photos/cat.png", return_tensors="pt")
    >>> probabilities = model(**inputs).logits_per_image.softmax(dim=1)  # [1, 2]
    ```
    """

    def __init__(self, config: LoTLIPConfig) -> None:
        super().__init__(config)
        self.projection_dim = config.projection_dim
        self.text_embed_dim, self.vision_embed_dim = config.text_config.pooled_size, config.vision_config.pooled_size
        self.text_model = LoTLIPTextModel._from_config(config.text_config)
        self.vision_model = LoTLIPVisionModel._from_config(config.vision_config)
        self.text_projection = _projection(config.text_config)
        self.visual_projection = _projection(config.vision_config)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_corner_embeds: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCorners:
        r"""Returns the output of [`LoTLIPTextModel`] with features instead of pooled states."""
        kwargs.update(position_ids=position_ids, inputs_embeds=inputs_embeds, token_type_ids=token_type_ids)
        kwargs["output_corner_embeds"] = output_corner_embeds
        return _project(self.text_model, self.text_projection, input_ids, attention_mask, **kwargs)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndPatches:
        r"""Returns the output of [`LoTLIPVisionModel`] with features instead of pooled states."""
        kwargs.update(pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes)
        return _project(self.vision_model, self.visual_projection, pixel_values, interpolate_pos_encoding, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_corner_embeds: bool | None = None,
        long_input_ids: Tensor | None = None,
        long_attention_mask: Tensor | None = None,
        kept_patches: Tensor | None = None,
        pooled_only: bool = False,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_states: Tensor | None = None,
        text_states: Tensor | None = None,
        output_patch_embeds: bool = False,
        output_token_embeds: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LoTLIPOutput:
        r"""
        Accepts the arguments of both towers and those below. Texts without images, or images without texts, return
        their embeddings only, as in transformers' feature extraction pipelines.

        Args:
            return_loss (`bool`, *optional*): Whether to return the loss: LoTLIP's for texts [B, T, L] or with
                `long_input_ids`, CLIP's for texts [B, L]. Image i belongs to the texts of row i.
            output_corner_embeds (`bool`, *optional*): Whether to compute the corner tokens. Defaults to `True` in
                training mode and for LoTLIP's loss.
            long_input_ids (`torch.Tensor`, *optional*): Token ids [B, T - 1, L'] of the long texts. `input_ids` [B, L]
                are then the short texts and get no corner tokens. `text_embeds` has the short text first.
            long_attention_mask (`torch.Tensor`, *optional*): Mask of `long_input_ids`, like `attention_mask`.
            pooled_only (`bool`, *optional*, defaults to `False`): Whether only the embeddings and the loss are needed.
                The logits are then `None`, and `last_hidden_state` of the towers may be `None`, too.
            image_states (`torch.Tensor`, *optional*): Pooled states [I, pooled_size] of the image tower, to replace
                `pixel_values`.
            text_states (`torch.Tensor`, *optional*): Pooled states [B, (T,) hidden_size] of the text tower, to replace
                the texts. Without corner tokens.
            output_patch_embeds, output_token_embeds (`bool`, *optional*, defaults to `False`): Whether to return
                `patch_embeds` and `token_embeds`. They are not known from pooled states.
        """
        if (output_patch_embeds and image_states is not None) or (output_token_embeds and text_states is not None):
            raise ValueError(
                "`output_patch_embeds` needs `pixel_values`, and `output_token_embeds` needs `input_ids`. Pass them "
                "instead of `image_states` or `text_states`."
            )
        kwargs.update(pooled_only=pooled_only, return_dict=True)
        texts = (input_ids, attention_mask, position_ids, inputs_embeds, token_type_ids)
        long_texts = (long_input_ids, long_attention_mask)
        has_texts = any(one is not None for one in (*texts, *long_texts, text_states))
        vision_outputs = text_outputs = image_embeds = text_embeds = patch_embeds = logits_per_text = None
        of_texts: dict[str, Tensor | None] = {}
        loss = LoTLIPLoss(None, None, None)

        # The image tower runs first: its backward pass is then last and overlaps with the all-reduce of gradients.
        if image_states is not None:
            image_embeds = nn.functional.normalize(_apply(self.visual_projection, image_states), dim=-1)
        elif pixel_values is not None or return_loss:
            options = {"interpolate_pos_encoding": interpolate_pos_encoding, "kept_patches": kept_patches, **kwargs}
            options |= {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
            options["output_patch_embeds"] = output_patch_embeds
            vision_outputs = self.get_image_features(pixel_values, **options)
            image_embeds = nn.functional.normalize(vision_outputs.pooler_output, dim=-1)
            patch_embeds = _normalize(vision_outputs.patch_embeds)
        if text_states is not None:
            text_embeds = nn.functional.normalize(_apply(self.text_projection, text_states), dim=-1)
        elif has_texts or return_loss or image_embeds is None:
            if output_corner_embeds is None:
                has_long = long_input_ids is not None or len(_text_shape(input_ids, inputs_embeds)) == 3
                output_corner_embeds = self.training or bool(return_loss and has_long)
            kwargs.update(output_token_embeds=output_token_embeds)
            text_outputs, of_texts = self._embed_texts(texts, long_texts, output_corner_embeds, **kwargs)
            text_embeds = of_texts.pop("text_embeds")

        if image_embeds is not None and text_embeds is not None:
            image_embeds = image_embeds.to(text_embeds.device)
            logit_scale = self.logit_scale.exp().to(text_embeds.device)
            if not pooled_only:
                logits_per_text = logit_scale * text_embeds @ image_embeds.t()  # [B, (T,) I]
            if return_loss:
                loss = self._loss(image_embeds, text_embeds, of_texts["corner_embeds"], logit_scale)
        return LoTLIPOutput(
            **loss._asdict(),
            logits_per_image=None if logits_per_text is None else logits_per_text.movedim(-1, 0),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
            patch_embeds=patch_embeds,
            **of_texts,
        )

    def _embed_texts(
        self, texts: tuple, long_texts: tuple, output_corner_embeds: bool, **kwargs: Any
    ) -> tuple[BaseModelOutputWithPoolingAndCorners, dict[str, Tensor | None]]:
        """Returns the output for `input_ids`, and the normalised embeddings of all texts by name."""
        if all(one is None for one in long_texts):
            outputs = long_outputs = self.get_text_features(*texts, output_corner_embeds, **kwargs)
            text_embeds, long_token_embeds = outputs.pooler_output, None
        else:
            short, long = ([] if ids is None else list(ids.shape) for ids in (texts[0], long_texts[0]))
            if len(short) != 2 or len(long) != 3 or short[0] != long[0]:
                raise ValueError(f"`long_input_ids` {long} must be [B, T - 1, L'] and `input_ids` {short} [B, L].")
            outputs = self.get_text_features(*texts, output_corner_embeds=False, **kwargs)
            long_outputs = self.get_text_features(*long_texts, output_corner_embeds=output_corner_embeds, **kwargs)
            text_embeds = torch.cat([outputs.pooler_output.unsqueeze(1), long_outputs.pooler_output], dim=1)
            long_token_embeds = long_outputs.token_embeds
        embeds = {"text_embeds": text_embeds, "corner_embeds": long_outputs.corner_embeds}
        embeds |= {"token_embeds": outputs.token_embeds, "long_token_embeds": long_token_embeds}
        return outputs, {name: _normalize(value) for name, value in embeds.items()}

    def _loss(
        self, image_embeds: Tensor, text_embeds: Tensor, corner_embeds: Tensor | None, logit_scale: Tensor
    ) -> LoTLIPLoss:
        if text_embeds.dim() == 2:
            text_embeds, corner_embeds = text_embeds.unsqueeze(1), None
        elif corner_embeds is not None:  # drop the short text's from [B, T, m, D]
            corner_embeds = corner_embeds[:, corner_embeds.shape[1] - text_embeds.shape[1] + 1 :]
        weights = (self.config.short_loss_weight, self.config.long_loss_weight)
        return lotlip_loss(image_embeds, text_embeds, corner_embeds, logit_scale, *weights)


def _projection(config: LoTLIPTextConfig | LoTLIPVisionConfig) -> nn.Module:
    if isinstance(config, LoTLIPTextConfig) and config.projection == "residual_mlp":
        sizes = (config.hidden_size, config.output_size, config.projection_layers, config.projection_expansion)
        return ResidualMLP(*sizes)
    if config.projection_dim is None:
        return nn.Identity()
    return nn.Linear(config.pooled_size, config.projection_dim, bias=False)


def _project(tower: nn.Module, projection: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A tower's output with projected features instead of pooled states."""
    outputs = tower(*args, **{**kwargs, "return_dict": True})
    for name in ("pooler_output", "corner_embeds", "token_embeds", "patch_embeds"):
        if outputs.get(name) is not None:
            outputs[name] = _apply(projection, outputs[name])
    return outputs


def _normalize(features: Tensor | None) -> Tensor | None:
    return None if features is None else nn.functional.normalize(features, dim=-1)


def _apply(projection: nn.Module, states: Tensor) -> Tensor:
    """Projects states in the dtype of the projection. A frozen tower may have a smaller one."""
    weight = next(projection.parameters(), states)
    return projection(states.to(weight.dtype) if weight.is_floating_point() else states)  # 4-bit weights are integers


def _text_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> torch.Size:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
    shape = inputs_embeds.shape[:-1] if input_ids is None else input_ids.shape
    if len(shape) not in (2, 3):
        raise ValueError(f"`input_ids` or `inputs_embeds` have text shape {list(shape)}. Use [B, L] or [B, T, L].")
    return shape


def _flatten(shape: torch.Size, **arguments: Tensor | None) -> list[Tensor | None]:
    """Each [B, (T,) L] -> [N, L]"""
    for name, value in arguments.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"`{name}` has shape {list(value.shape)}, the texts have {list(shape)}.")
    return [None if value is None else value.reshape(-1, shape[-1]) for value in arguments.values()]


def _line_up(states: Any, shape: torch.Size, *length_dims: int, first: int = 0) -> Any:
    """Drops the corner tokens, before or behind the text, which starts at `first`. Restores the shape [B, (T,) L]."""
    if states is None or isinstance(states, tuple):
        return states and tuple(_line_up(one, shape, *length_dims, first=first) for one in states)
    for dim in length_dims:
        if states.shape[dim] != shape[-1]:
            states = states.narrow(dim, first, shape[-1])
    return states.unflatten(0, shape[:-1]) if len(shape) == 3 else states
