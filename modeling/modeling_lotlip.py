"""PyTorch LoTLIP: two stock transformers backbones, and corner tokens, pooling, projections and loss."""

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

from .backbones_lotlip import POOLINGS, is_eager_on_cpu, one_token, pair
from .configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig
from .fast_paths_lotlip import PooledLayer, fast_options, run_texts
from .loss_lotlip import LoTLIPLoss, lotlip_loss
from .masking_lotlip import create_corner_mask

# Shapes: B is the batch size, I the number of images, T that of texts an image (if the ids have it), N = B T, L the
# length, m the number of corner tokens, P that of patches, D the width of the shared space.


@dataclass
class BaseModelOutputWithPoolingAndCorners(BaseModelOutputWithPooling):
    """
    Output of a text tower, lined up with `input_ids` [B, (T,) L] and without corner tokens; and, if they are computed,
    the corner tokens' pooled states `corner_embeds` [B, (T,) m, hidden_size].
    """

    corner_embeds: Tensor | None = None


@dataclass
class LoTLIPTextModelOutput(CLIPTextModelOutput):
    """CLIP's output and, if they are computed, `corner_embeds` [B, (T,) m, projection_dim], not normalised."""

    corner_embeds: Tensor | None = None


@dataclass
class LoTLIPOutput(CLIPOutput):
    """
    CLIP's output (`logits_per_image` [I, B (, T)], `logits_per_text` [B, (T,) I], `text_embeds` [B, (T,) D] and
    `image_embeds` [I, D] normalised, `text_model_output` of `input_ids`); then the corner tokens' normalised
    `corner_embeds` [B, (T,) m, D] if they are computed (with `long_input_ids` of the long texts alone, [B, T - 1, m,
    D]), and the short and the long texts' shares of the loss.
    """

    corner_embeds: Tensor | None = None
    loss_short: Tensor | None = None
    loss_long: Tensor | None = None


class LoTLIPPreTrainedModel(PreTrainedModel):
    """Base class of the LoTLIP models: weight initialisation, loading and saving."""

    config: LoTLIPConfig
    _auto_class = "AutoModel"  # so that this code is saved beside the weights
    base_model_prefix = "lotlip"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _embedding_module = "text_model"  # which holds the input embeddings

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "LoTLIPPreTrainedModel":
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], but `use_safetensors` defaults to `True`: pickled weights
        (`.bin`, `.pt`) can run code. Pass `use_safetensors=False` to load those of a source that you trust.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        return super().from_pretrained(*args, **kwargs)

    def post_init(self) -> None:
        super().post_init()
        # transformers adds those of submodules without a prefix: the image tower's would hide a whole model's tensors
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
        """Takes the names of `save_pretrained`, older ones for a ViT, as well: `Trainer` resumes from its file so."""
        names = list(self.state_dict())
        saved = revert_weight_conversion(self, {name: torch.tensor(index) for index, name in enumerate(names)})
        own = {name: names[int(index)] for name, index in saved.items()} | {name: name for name in names}
        renamed = {own.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(renamed, strict=strict, assign=assign)


class _LoTLIPTower(LoTLIPPreTrainedModel):
    """What both towers share. A backbone's modules are found as the tower's too: `vision_model.encoder` over CLIP."""

    _embedding_module = "backbone"

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name not in modules and name in getattr(modules.get("backbone"), "_modules", ()):
            return modules["backbone"]._modules[name]
        return super().__getattr__(name)

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The tower's settings of what to return, for the backbone, which has a configuration of its own."""
        names = ("output_attentions", "output_hidden_states")
        return {**{name: getattr(self.config, name) for name in names}, **kwargs, "return_dict": True}

    def _pools_alone(self, options: dict[str, Any]) -> bool:
        """Whether the last layer can be computed for the pooled tokens alone."""
        return (
            not (options["output_attentions"] or options["output_hidden_states"])
            and POOLINGS[self.config.pooling] is one_token
            and self.backbone.config._attn_implementation in ("sdpa", "unpadded")
            and isinstance(self.config.family.last_layer(self.backbone), PooledLayer)
        )


class LoTLIPTextModel(_LoTLIPTower):
    """
    LoTLIP's text tower, without projection: a stock encoder and m learnable corner tokens.

    By position, the corner tokens stand between [CLS] and the words; in memory, behind the text. No text token sees
    them, so they are left out unless they are needed. Over CLIP's causal text tower they have no positions, [EOT] has
    the role of [CLS], and all else is `CLIPTextModel`'s.
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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_corner_embeds: bool | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCorners:
        r"""
        Args:
            input_ids: [B, (T,) L], plain [CLS] words [SEP] without corner tokens, padded on either side.
            attention_mask: shape of `input_ids`, 1 for text. By default what is not `pad_token_id`; everything over
                CLIP, which pads with its [EOT] and sees nothing behind it.
            position_ids: [L] or shape of `input_ids`, 0 for [CLS], without the offsets of the corner tokens and of the
                backbone. By default counted along `attention_mask`.
            inputs_embeds: [B, (T,) L, hidden_size], word embeddings in place of `input_ids`.
            token_type_ids: shape of `input_ids`; by default zeros.
            output_corner_embeds: Whether to compute the corner tokens (not with flash attention). By default in
                training mode only.
            pooled_only: Whether only the pooled states are needed: `last_hidden_state` is `None` if that saves time
                (BERT and RoBERTa, not pooled by the mean, with `sdpa` or `unpadded`).
        """
        family, config = self.config.family, self.config.backbone_config
        shape = _text_shape(input_ids, inputs_embeds)
        words = self._embed_words(input_ids) if inputs_embeds is None else inputs_embeds
        words = words.flatten(0, -3)  # texts are [N, L] from here on, with the corner tokens behind them [N, L + m]
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
        corners = self.corner_embeds if has_corners else words.new_empty(0, words.shape[-1])
        inputs = family.embed(self.backbone, words, position_ids, self.config.num_corner_tokens, corners)
        del words  # as large as what the backbone gets
        if token_type_ids is not None and family.has_segments:
            inputs["token_type_ids"] = nn.functional.pad(token_type_ids, (0, len(corners)))
        elif token_type_ids is not None and is_eager_on_cpu(token_type_ids) and token_type_ids.any():
            raise ValueError("`token_type_ids` must be 0 or left out: this text encoder has no segments.")

        options = self._options(kwargs)
        pooled_only = pooled_only and self._pools_alone(options)
        options |= fast_options(config, is_text, len(corners), pooled_index if pooled_only else None)
        mask, row_index = attention_mask, options.get("row_index")
        if len(corners) or row_index is not None:
            mask = create_corner_mask(family, config, inputs["inputs_embeds"], is_text, pooled_index, row_index)
        outputs = run_texts(self.backbone, inputs, mask, **options)

        states = outputs.last_hidden_state  # [N, L + m, hidden_size], or [N, 1 + m, hidden_size] of pooled tokens
        length, pooled_index = (1, None) if pooled_only else (shape[-1], pooled_index)
        pooled, corner_states = self._pool(states[:, :length], is_text, pooled_index), states[:, length:]
        corner_embeds = self._pool(corner_states.flatten(0, 1).unsqueeze(1))  # each as a text of its own
        corner_embeds = corner_embeds.unflatten(0, corner_states.shape[:2])
        return BaseModelOutputWithPoolingAndCorners(
            last_hidden_state=None if pooled_only else _line_up(states, shape, 1),
            pooler_output=_line_up(pooled, shape),
            hidden_states=_line_up(outputs.hidden_states, shape, 1),
            attentions=_line_up(outputs.attentions, shape, 2, 3),
            corner_embeds=_line_up(corner_embeds, shape) if len(corners) else None,
        )

    def _embed_words(self, input_ids: Tensor) -> Tensor:
        """[..., L] -> [..., L, hidden_size]"""
        size = self.config.vocab_size
        if is_eager_on_cpu(input_ids) and not ((input_ids >= 0) & (input_ids < size)).all():
            raise ValueError(f"`input_ids` must lie in [0, {size}), as those of the model's tokenizer do.")
        return self.get_input_embeddings()(input_ids)

    def _position_ids(self, position_ids: Tensor | None, is_text: Tensor) -> Tensor:
        """[N, L]: positions in the text, checked where padding by itself does not reach beyond them."""
        limit, length = self.config.max_position_embeddings, is_text.shape[-1]
        may_exceed = position_ids is not None or length > limit
        if position_ids is None:
            position_ids = self.config.family.count_positions(self.config.backbone_config, is_text)
        position_ids = position_ids.reshape(-1, length).expand(is_text.shape[0], -1)
        if may_exceed and is_eager_on_cpu(position_ids) and position_ids.max() >= limit:
            longest = int(position_ids.max()) + 1
            raise ValueError(f"A text has {longest} tokens, the model takes {limit}: tokenise with truncation=True.")
        return position_ids

    def _pool(self, states: Tensor, is_text: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """[N, L, hidden_size] -> [N, hidden_size]"""
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
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        kept_patches: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values: [B, channels, height, width], normalised by the image processor.
            interpolate_pos_encoding: Whether to take images of another size than the model's (DINOv2 always does).
            pooled_only: As for the text tower (ViT, not pooled by the mean, with `sdpa`).
            kept_patches: [B, K], indices in [0, P) of the patches that the tower computes, with their positions in the
                whole image; by default all. Prefix tokens, such as a class token, always stay.
        """
        if pixel_values is None or pixel_values.dim() != 4 or not pixel_values.is_floating_point():
            got = None if pixel_values is None else (list(pixel_values.shape), pixel_values.dtype)
            raise ValueError(f"`pixel_values` must be floats [B, channels, height, width], not {got}.")
        family, embedding_options = self.config.family, {}
        if family.takes_interpolation:
            embedding_options["interpolate_pos_encoding"] = interpolate_pos_encoding
            size, expected = list(pixel_values.shape[-2:]), list(pair(self.config.image_size))
            if not interpolate_pos_encoding and size != expected:
                raise ValueError(f"`pixel_values` are {size}, not {expected}: pass interpolate_pos_encoding=True.")
        options = self._options(kwargs)
        pooled_only = pooled_only and self._pools_alone(options)
        if pooled_only:
            options["pooled_tokens"] = pixel_values.new_zeros(pixel_values.shape[0], 1, dtype=torch.int64)  # [CLS]
        if kept_patches is not None:
            pixel_values = family.keep(self.backbone, pixel_values, kept_patches, **embedding_options)
        outputs = self.backbone(pixel_values, **embedding_options, **options)
        states, pool = outputs.last_hidden_state, POOLINGS[self.config.pooling]
        if self.config.pooling == "pooler":
            pooled = outputs.pooler_output
        else:
            pooled = pool(states if pool is one_token else states[:, family.num_prefix_tokens :], None, None)
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
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> LoTLIPTextModelOutput:
        r"""Arguments are those of [`LoTLIPTextModel`]; `text_embeds` are not normalised."""
        outputs = dict(_project(self.text_model, self.text_projection, input_ids, attention_mask, **kwargs))
        return LoTLIPTextModelOutput(text_embeds=outputs.pop("pooler_output"), **outputs)


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
    def forward(self, pixel_values: Tensor | None = None, *args: Any, **kwargs: Any) -> CLIPVisionModelOutput:
        r"""Arguments are those of [`LoTLIPVisionModel`]; `image_embeds` are not normalised."""
        outputs = dict(_project(self.vision_model, self.visual_projection, pixel_values, *args, **kwargs))
        return CLIPVisionModelOutput(image_embeds=outputs.pop("pooler_output"), **outputs)


class LoTLIPModel(LoTLIPPreTrainedModel):
    """LoTLIP (https://arxiv.org/abs/2410.05249), a dual encoder of images, short and long texts, as `CLIPModel`."""

    def __init__(self, config: LoTLIPConfig) -> None:
        super().__init__(config)
        self.projection_dim = config.projection_dim
        self.text_embed_dim, self.vision_embed_dim = config.text_config.hidden_size, config.vision_config.hidden_size
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
        r"""The output of [`LoTLIPTextModel`], `pooler_output` and `corner_embeds` projected and not normalised."""
        kwargs.update(position_ids=position_ids, inputs_embeds=inputs_embeds, token_type_ids=token_type_ids)
        kwargs["output_corner_embeds"] = output_corner_embeds
        return _project(self.text_model, self.text_projection, input_ids, attention_mask, **kwargs)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        r"""The output of [`LoTLIPVisionModel`], `pooler_output` projected and not normalised."""
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> LoTLIPOutput:
        r"""
        Arguments are those of both towers, and those below. Texts or images alone, as transformers' pipelines for
        feature extraction give them, are answered with their embeddings.

        Args:
            return_loss: Whether to return the loss; text i belongs to image i. For [B, T, L] and with `long_input_ids`
                it is LoTLIP's (`loss_lotlip.lotlip_loss`), for [B, L] CLIP's.
            output_corner_embeds: Whether to compute the corner tokens. By default in training, and for LoTLIP's loss.
            long_input_ids: [B, T - 1, L'], the long texts, with `input_ids` [B, L] the short ones, which run without
                corner tokens. The answers have T texts, the short one first, as for [B, T, L].
            long_attention_mask: shape of `long_input_ids`; by default what is not `pad_token_id`.
            pooled_only: Whether only the embeddings and the loss are needed: the logits are `None`, and the towers'
                `last_hidden_state` may be.

        ```python
        >>> import lotlip_hf
        >>> from PIL import Image
        >>> from transformers import AutoModel, AutoProcessor

        >>> model, processor = AutoModel.from_pretrained("checkpoint"), AutoProcessor.from_pretrained("checkpoint")
        >>> inputs = processor(text=["a cat", "a dog"], images=Image.new("RGB", (640, 480)), return_tensors="pt")
        >>> probabilities = model(**inputs).logits_per_image.softmax(dim=1)
        ```"""
        kwargs.update(pooled_only=pooled_only, return_dict=True)
        texts = (input_ids, attention_mask, position_ids, inputs_embeds, token_type_ids)
        long_texts = (long_input_ids, long_attention_mask)
        has_texts = any(one is not None for one in texts + long_texts)
        vision_outputs = text_outputs = image_embeds = text_embeds = corner_embeds = logits_per_text = None
        loss = LoTLIPLoss(None, None, None)

        # images come first: their backward pass then comes last, and what waits for their gradients has time
        if pixel_values is not None or return_loss:
            options = {"interpolate_pos_encoding": interpolate_pos_encoding, "kept_patches": kept_patches, **kwargs}
            vision_outputs = self.get_image_features(pixel_values, **options)
            image_embeds = nn.functional.normalize(vision_outputs.pooler_output, dim=-1)
        if has_texts or return_loss or pixel_values is None:
            if output_corner_embeds is None:
                has_long = long_input_ids is not None or len(_text_shape(input_ids, inputs_embeds)) == 3
                output_corner_embeds = self.training or bool(return_loss and has_long)
            answers = self._embed_texts(texts, long_texts, output_corner_embeds, **kwargs)
            text_outputs, text_embeds, corner_embeds = answers

        if image_embeds is not None and text_embeds is not None:
            image_embeds = image_embeds.to(text_embeds.device)
            logit_scale = self.logit_scale.exp().to(text_embeds.device)
            if not pooled_only:
                logits_per_text = logit_scale * text_embeds @ image_embeds.t()  # [B, (T,) I]
            if return_loss:
                loss = self._loss(image_embeds, text_embeds, corner_embeds, logit_scale)
        return LoTLIPOutput(
            **loss._asdict(),
            logits_per_image=None if logits_per_text is None else logits_per_text.movedim(-1, 0),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
            corner_embeds=corner_embeds,
        )

    def _embed_texts(
        self, texts: tuple, long_texts: tuple, output_corner_embeds: bool, **kwargs: Any
    ) -> tuple[BaseModelOutputWithPoolingAndCorners, Tensor, Tensor | None]:
        """The output for `texts`, and normalised: `text_embeds` of all, `corner_embeds` of the long ones if given."""
        if all(one is None for one in long_texts):
            outputs = self.get_text_features(*texts, output_corner_embeds, **kwargs)
            text_embeds, corner_embeds = outputs.pooler_output, outputs.corner_embeds
        else:
            short, long = ([] if ids is None else list(ids.shape) for ids in (texts[0], long_texts[0]))
            if len(short) != 2 or len(long) != 3 or short[0] != long[0]:
                raise ValueError(f"`long_input_ids` {long} must be [B, T - 1, L'], `input_ids` {short} be [B, L].")
            outputs = self.get_text_features(*texts, output_corner_embeds=False, **kwargs)
            long_outputs = self.get_text_features(*long_texts, output_corner_embeds=output_corner_embeds, **kwargs)
            text_embeds = torch.cat([outputs.pooler_output.unsqueeze(1), long_outputs.pooler_output], dim=1)
            corner_embeds = long_outputs.corner_embeds
        if corner_embeds is not None:
            corner_embeds = nn.functional.normalize(corner_embeds, dim=-1)
        return outputs, nn.functional.normalize(text_embeds, dim=-1), corner_embeds

    def _loss(
        self, image_embeds: Tensor, text_embeds: Tensor, corner_embeds: Tensor | None, logit_scale: Tensor
    ) -> LoTLIPLoss:
        if text_embeds.dim() == 2:
            text_embeds, corner_embeds = text_embeds.unsqueeze(1), None
        elif corner_embeds is not None:  # of T texts, or without the short one's
            corner_embeds = corner_embeds[:, corner_embeds.shape[1] - text_embeds.shape[1] + 1 :]
        weights = (self.config.short_loss_weight, self.config.long_loss_weight)
        return lotlip_loss(image_embeds, text_embeds, corner_embeds, logit_scale, *weights)


def _projection(config: LoTLIPTextConfig | LoTLIPVisionConfig) -> nn.Module:
    if config.projection_dim is None:
        return nn.Identity()
    return nn.Linear(config.hidden_size, config.projection_dim, bias=False)


def _project(tower: nn.Module, projection: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A tower's output, with what is pooled in the shared space."""
    outputs = tower(*args, **{**kwargs, "return_dict": True})
    outputs.pooler_output = projection(outputs.pooler_output)
    if outputs.get("corner_embeds") is not None:
        outputs.corner_embeds = projection(outputs.corner_embeds)
    return outputs


def _text_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> torch.Size:
    """[B, (T,) L]"""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    shape = inputs_embeds.shape[:-1] if input_ids is None else input_ids.shape
    if len(shape) not in (2, 3):
        raise ValueError(f"`input_ids` or `inputs_embeds` must be texts [B, L] or [B, T, L]; got {list(shape)}.")
    return shape


def _flatten(shape: torch.Size, **arguments: Tensor | None) -> list[Tensor | None]:
    """Each [B, (T,) L] -> [N, L]"""
    for name, value in arguments.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"`{name}` is of shape {list(value.shape)}, the texts are of {list(shape)}.")
    return [None if value is None else value.reshape(-1, shape[-1]) for value in arguments.values()]


def _line_up(states: Any, shape: torch.Size, *length_dims: int) -> Any:
    """Drops the corner tokens and restores the texts' shape [B, (T,) L]; where neither is needed, nothing changes."""
    if states is None or isinstance(states, tuple):
        return states and tuple(_line_up(one, shape, *length_dims) for one in states)
    for dim in length_dims:
        if states.shape[dim] != shape[-1]:
            states = states.narrow(dim, 0, shape[-1])
    return states.unflatten(0, shape[:-1]) if len(shape) == 3 else states
