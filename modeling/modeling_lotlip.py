"""PyTorch LoTLIP: two stock transformers backbones, and what LoTLIP adds to them: corner tokens, pooling, projection,
loss."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPTextModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import revert_weight_conversion
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import (
    can_return_tuple,
    is_flash_attention_requested,
    merge_with_config_defaults,
)
from transformers.utils.output_capturing import capture_outputs

from .configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig
from .loss_lotlip import LoTLIPLoss, lotlip_loss
from .masking_lotlip import create_corner_mask, from_row, to_row
from .pooling_lotlip import takes_pooled_places, with_pooled_layer


@dataclass
class BaseModelOutputWithPoolingAndCorners(BaseModelOutputWithPooling):
    """
    Output of a text tower. B is the batch size, T (where `input_ids` had it) the number of texts an image, L the
    length.

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
class LoTLIPTextModelOutput(ModelOutput):
    """
    Output of [`LoTLIPTextModelWithProjection`]: as CLIP's, and `corner_embeds`.

    Args:
        text_embeds: [B, (T,) projection_dim], not normalised.
        last_hidden_state: [B, (T,) L, hidden_size].
        hidden_states: as `last_hidden_state`, with `output_hidden_states=True`.
        attentions: [B, (T,) heads, L, L], with `output_attentions=True`.
        corner_embeds: [B, (T,) m, projection_dim], not normalised, where they were computed.
    """

    text_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    corner_embeds: torch.Tensor | None = None


@dataclass
class LoTLIPVisionModelOutput(ModelOutput):
    """
    Output of [`LoTLIPVisionModelWithProjection`], as CLIP's.

    Args:
        image_embeds: [B, projection_dim], not normalised.
        last_hidden_state: [B, 1 + patches, hidden_size] (without the 1 where the backbone has no class token).
        hidden_states: as `last_hidden_state`, with `output_hidden_states=True`.
        attentions: [B, heads, tokens, tokens], with `output_attentions=True`.
    """

    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class LoTLIPOutput(ModelOutput):
    """
    Output of [`LoTLIPModel`]: CLIP's fields in CLIP's order, then LoTLIP's own. I is the number of images.

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

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPoolingAndCorners | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    corner_embeds: torch.Tensor | None = None
    loss_short: torch.Tensor | None = None
    loss_long: torch.Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


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
        saved = revert_weight_conversion(self, {name: torch.tensor(place) for place, name in enumerate(names)})
        own = {name: names[int(place)] for name, place in saved.items()}
        own.update({name: name for name in names})
        renamed = {own.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(renamed, strict=strict, assign=assign)


class CLIPTextBackbone(CLIPTextModel):
    """
    CLIP's text tower for sequences that are embedded already: its own embeddings give a text its positions, the corner
    tokens that follow have none. Weights and hidden states are those of `CLIPTextModel`.
    """

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            inputs_embeds: [N, L, hidden_size], what `embeddings` returned.
            attention_mask: [N, L], 1 for text and 0 for padding, or a mask as [`create_corner_mask`] makes it.

        Returns:
            `last_hidden_state` [N, L, hidden_size], nothing pooled.
        """
        attention_mask = create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=None
        )
        outputs = self.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, is_causal=True, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=self.final_layer_norm(outputs.last_hidden_state))


def _backbone_from_config(config: LoTLIPTextConfig | LoTLIPVisionConfig) -> PreTrainedModel:
    if config.backbone_config.model_type == "clip_text_model":
        return CLIPTextBackbone._from_config(config.backbone_config)
    backbone = AutoModel.from_config(
        config.backbone_config,
        trust_remote_code=False,
        **_pooling_layer_argument(config.backbone_config, config.pooling),
    )
    return with_pooled_layer(backbone)


def _pooling_layer_argument(backbone_config: PreTrainedConfig, pooling: str) -> dict[str, bool]:
    """Backbones whose pooler is optional get one only if it is used: an idle layer would never be trained."""
    has_optional_pooler = backbone_config.model_type in ("bert", "roberta", "xlm-roberta", "vit")
    return {"add_pooling_layer": pooling == "pooler"} if has_optional_pooler else {}


def _projection(in_features: int, out_features: int | None) -> nn.Module:
    return nn.Identity() if out_features is None else nn.Linear(in_features, out_features, bias=False)


def _with_config_defaults(config: PreTrainedConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Passes the tower's settings of what to return on to its backbone, which has a configuration of its own."""
    defaults = {"output_attentions": config.output_attentions, "output_hidden_states": config.output_hidden_states}
    return {**defaults, **kwargs, "return_dict": True}


def _takes_pooled_places(tower: "LoTLIPTextModel | LoTLIPVisionModel", kwargs: dict[str, Any]) -> bool:
    """Whether a tower can leave out what is not pooled: not where every layer's states or attentions are asked for."""
    names = ("output_attentions", "output_hidden_states")
    asks_for_more = any(kwargs.get(name, getattr(tower.config, name)) for name in names)
    return tower.config.pooling != "mean" and not asks_for_more and takes_pooled_places(tower.backbone)


def _is_eager_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether looking at values is cheap and allowed: not while compiling, exporting or tracing, and not on a
    device."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _check_input_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    if input_ids.dim() not in (2, 3):
        raise ValueError(
            f"`input_ids` must have shape [batch, length] or [batch, texts, length], got {list(input_ids.shape)}."
        )
    if input_ids.dtype not in (torch.int64, torch.int32):  # what an embedding takes
        raise ValueError(f"`input_ids` must be integers of 64 or 32 bits, got {input_ids.dtype}.")
    if 0 in input_ids.shape:
        raise ValueError(f"`input_ids` must hold at least one text of one token, got shape {list(input_ids.shape)}.")
    if _is_eager_on_cpu(input_ids):
        low, high = input_ids.min().item(), input_ids.max().item()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"`input_ids` must lie in [0, {vocab_size}), the model's vocabulary; got ids from {low} to {high}. "
                "Was the text tokenised with another model's tokenizer?"
            )


def _check_long_input_ids(long_input_ids: torch.Tensor, short_texts: torch.Tensor | None) -> None:
    if short_texts is None or short_texts.dim() != 2:
        raise ValueError(
            "With `long_input_ids`, `input_ids` must be the short texts [batch, length], got "
            f"{None if short_texts is None else list(short_texts.shape)}."
        )
    if long_input_ids.dim() != 3 or len(long_input_ids) != len(short_texts):
        raise ValueError(
            f"`long_input_ids` must have shape [{len(short_texts)}, texts, length], a row of long texts for each "
            f"short text, got {list(long_input_ids.shape)}."
        )


class _LoTLIPTower(LoTLIPPreTrainedModel):
    """
    What both towers share: the backbone's modules are found under its own names too, such as
    `vision_model.encoder.layers` over CLIP's image tower. In `named_modules` and in what is saved they are the
    backbone's all the same.
    """

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        backbone = modules.get("backbone")
        if backbone is not None and name not in modules and name in backbone._modules:
            return backbone._modules[name]
        return super().__getattr__(name)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)


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
        self.backbone = _backbone_from_config(config)
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
            position_ids: [L] or shape of `input_ids`, the tokens' places in their text, 0 for [CLS]; the places of the
                corner tokens and the backbone's own offset are added here. By default counted along `attention_mask`.
            inputs_embeds: [B, L, hidden_size] or [B, T, L, hidden_size], word embeddings in place of `input_ids`.
            token_type_ids: shape of `input_ids`; by default zeros.
            output_corner_embeds: Whether to compute the corner tokens. By default in training mode only.
            pooled_only: Whether the pooled states are all that is asked for: where that saves time (BERT, RoBERTa and
                XLM-RoBERTa, not pooled by the mean, with `sdpa` or `unpadded`), `last_hidden_state` is `None`.

        Raises:
            ValueError: on arguments of a wrong shape, type or range, on texts longer than the positions, and on corner
                tokens under flash attention, which cannot mask them.

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
        is_causal = self.config.is_causal
        if input_ids is not None:
            _check_input_ids(input_ids, self.config.vocab_size)
            shape = input_ids.shape
            if attention_mask is None and not is_causal and self.config.pad_token_id is not None:
                attention_mask = input_ids != self.config.pad_token_id
            input_ids = input_ids.reshape(-1, shape[-1])
        else:
            if inputs_embeds.dim() not in (3, 4):
                raise ValueError(
                    "`inputs_embeds` must have shape [batch, length, hidden] or [batch, texts, length, hidden], got "
                    f"{list(inputs_embeds.shape)}."
                )
            shape = inputs_embeds.shape[:-1]
            inputs_embeds = inputs_embeds.reshape(-1, *inputs_embeds.shape[-2:])
        device = input_ids.device if input_ids is not None else inputs_embeds.device
        if attention_mask is None and not is_causal:
            attention_mask = torch.ones(shape, dtype=torch.bool, device=device)
        for name, value in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if value is not None and value.shape != shape:
                raise ValueError(f"`{name}` must have the texts' shape {list(shape)}, got {list(value.shape)}.")
        if attention_mask is not None:
            attention_mask = attention_mask.reshape(-1, shape[-1])
        if token_type_ids is not None:
            token_type_ids = token_type_ids.reshape(-1, shape[-1])

        if output_corner_embeds is None:
            output_corner_embeds = self.training
        num_corner_tokens = self.config.num_corner_tokens if output_corner_embeds else 0
        num_texts = (input_ids if input_ids is not None else inputs_embeds).shape[0]
        pooled_index = self._pooled_index(input_ids, attention_mask, num_texts, shape[-1], device)
        position_ids = self._backbone_position_ids(position_ids, attention_mask, num_texts, shape[-1], device)
        backbone_mask = attention_mask
        if is_causal:
            if token_type_ids is not None and _is_eager_on_cpu(token_type_ids) and token_type_ids.any():
                raise ValueError("`token_type_ids` must be 0 or left out: CLIP's text tower has no segments.")
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
                input_ids = None
            inputs_embeds = inputs_embeds + self.backbone.embeddings.position_embedding(position_ids)

        row_index = self._row_index(attention_mask, num_corner_tokens)
        if num_corner_tokens or row_index is not None:
            if is_flash_attention_requested(self.config.backbone_config):
                raise ValueError(
                    "Flash attention cannot apply the corner tokens' mask. Load the model with "
                    "attn_implementation='sdpa' or 'flex_attention' for training, or pass output_corner_embeds=False "
                    "to leave the corner tokens out."
                )
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
                input_ids = None
            if num_corner_tokens:
                corner_embeds = self.corner_embeds.to(inputs_embeds).expand(num_texts, -1, -1)
                inputs_embeds = torch.cat([inputs_embeds, corner_embeds], dim=1)  # [N, L + m, hidden_size]
                corner_positions = torch.arange(1, num_corner_tokens + 1, device=device) + self.config.position_offset
                position_ids = torch.cat([position_ids, corner_positions.expand(num_texts, -1)], dim=1)
                if token_type_ids is not None:
                    token_type_ids = nn.functional.pad(token_type_ids, (0, num_corner_tokens))
            if attention_mask is None:
                attention_mask = torch.ones(num_texts, shape[-1], dtype=torch.bool, device=device)
            backbone_mask = create_corner_mask(
                self.config.backbone_config,
                inputs_embeds,
                attention_mask,
                num_corner_tokens,
                pooled_index,
                is_causal,
                row_index,
            )
        if row_index is not None:
            kwargs["row_index"] = row_index  # for the attention layers
            inputs_embeds, position_ids = to_row(inputs_embeds, row_index), to_row(position_ids, row_index)
            if token_type_ids is not None:
                token_type_ids = to_row(token_type_ids, row_index)

        pooled_only = pooled_only and _takes_pooled_places(self, kwargs)
        if pooled_only:
            places = pooled_index.unsqueeze(1)
            if num_corner_tokens:
                corners = torch.arange(shape[-1], shape[-1] + num_corner_tokens, device=device)
                places = torch.cat([places, corners.expand(num_texts, -1)], dim=1)
            kwargs["pooled_places"] = places  # [N, 1 + m]

        if is_causal:
            outputs = self.backbone(inputs_embeds, backbone_mask, **_with_config_defaults(self.config, kwargs))
        else:
            outputs = self.backbone(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=backbone_mask,
                position_ids=position_ids,
                token_type_ids=token_type_ids,
                **_with_config_defaults(self.config, kwargs),
            )

        length = shape[-1]
        last_hidden_state, hidden_states, attentions = (
            outputs.last_hidden_state,
            outputs.hidden_states,
            outputs.attentions,
        )
        if pooled_only:
            last_hidden_state = None
        elif row_index is not None:
            grid = (row_index, num_texts, length + num_corner_tokens)
            last_hidden_state = from_row(last_hidden_state, *grid)
            if hidden_states is not None:
                hidden_states = tuple(from_row(states, *grid) for states in hidden_states)

        def line_up(states: torch.Tensor | None, *length_dims: int) -> torch.Tensor | None:
            """Drops the corner tokens and restores the texts' shape; where neither is needed, nothing changes."""
            if states is None:
                return None
            for dim in length_dims if num_corner_tokens else ():
                states = states.narrow(dim, 0, length)
            return states.unflatten(0, shape[:-1]) if len(shape) == 3 else states

        if pooled_only:
            states = self._pool_corners(outputs.last_hidden_state)  # [N, 1 + m, hidden_size]
            pooled, corner_states = states[:, 0], states[:, 1:] if num_corner_tokens else None
        else:
            pooled = self._pool(last_hidden_state[:, :length], attention_mask, pooled_index)
            corner_states = self._pool_corners(last_hidden_state[:, length:]) if num_corner_tokens else None
        return BaseModelOutputWithPoolingAndCorners(
            last_hidden_state=line_up(last_hidden_state, 1),
            pooler_output=line_up(pooled),
            hidden_states=None if hidden_states is None else tuple(line_up(h, 1) for h in hidden_states),
            attentions=None if attentions is None else tuple(line_up(a, 2, 3) for a in attentions),
            corner_embeds=line_up(corner_states),
        )

    def _row_index(self, attention_mask: torch.Tensor | None, num_corner_tokens: int) -> torch.Tensor | None:
        """[total]: the places of [N, L + m] that are no padding, where the backbone is to compute these alone."""
        attention = self.config.backbone_config._attn_implementation
        if (
            attention_mask is None
            or attention not in ("unpadded", "flex_attention")
            # torch's code for CPUs does not compile with as many changing sizes as a row has
            or (attention == "flex_attention" and attention_mask.device.type == "cpu")
            or torch.compiler.is_compiling()  # their number is another in each batch
            or torch.jit.is_tracing()
        ):
            return None
        kept = nn.functional.pad(attention_mask.bool(), (0, num_corner_tokens), value=True).flatten()
        row_index = kept.nonzero().squeeze(1)
        return row_index if len(row_index) < len(kept) else None

    def _pooled_index(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        num_texts: int,
        length: int,
        device: torch.device,
    ) -> torch.Tensor:
        """[N]: where the token stands that a text's feature is read off: [CLS], or CLIP's [EOT]."""
        if not self.config.is_causal:
            return attention_mask.int().argmax(-1)
        if input_ids is not None:
            if attention_mask is not None:  # [EOT] may be the padding, too
                input_ids = input_ids.masked_fill(~attention_mask.bool(), -1)
            if self.config.eos_token_id == 2:
                # Configurations from before transformers 4.31 hold a wrong id: as in CLIPTextModel, [EOT] has the
                # highest.
                return input_ids.int().argmax(-1)
            return (input_ids == self.config.eos_token_id).int().argmax(-1)
        if attention_mask is not None:  # the last token of the text
            return length - 1 - attention_mask.int().flip(-1).argmax(-1)
        return torch.full((num_texts,), length - 1, device=device)

    def _backbone_position_ids(
        self,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        num_texts: int,
        length: int,
        device: torch.device,
    ) -> torch.Tensor:
        """[N, L]: places in the text, behind [CLS] moved on by the corner tokens' places, in the backbone's own
        counting."""
        limit = self.config.max_position_embeddings
        # padding may reach beyond the positions, text may not
        may_exceed = position_ids is not None or length > limit
        if position_ids is not None:
            position_ids = position_ids.reshape(-1, length).expand(num_texts, -1)
        elif self.config.is_causal:
            # padding behind the text counts on, as in CLIPTextModel, and padding before it does not
            position_ids = torch.arange(length, device=device).expand(num_texts, -1)
            if attention_mask is not None:
                position_ids = (position_ids - attention_mask.int().argmax(-1, keepdim=True)).clamp(min=0)
                position_ids = torch.where(attention_mask.bool(), position_ids, position_ids.clamp(max=limit - 1))
        else:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if may_exceed and _is_eager_on_cpu(position_ids) and position_ids.max() >= limit:
            raise ValueError(
                f"The longest text has {int(position_ids.max()) + 1} tokens; this model takes {limit}, the first and "
                "last token included. Tokenise with truncation=True."
            )
        behind_cls = (position_ids > 0).long() * self.config.num_corner_positions
        return position_ids + behind_cls + self.config.position_offset

    def _pool(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, pooled_index: torch.Tensor
    ) -> torch.Tensor:
        """[N, L, hidden_size] -> [N, hidden_size]"""
        if self.config.pooling == "mean":
            weights = attention_mask.to(hidden_states.dtype).unsqueeze(-1)
            return (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)
        state = hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), pooled_index]
        return self._pool_corners(state.unsqueeze(1)).squeeze(1)

    def _pool_corners(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[N, m, hidden_size] -> [N, m, hidden_size], each state by itself (a backbone's pooler takes a text's
        first)"""
        if self.config.pooling != "pooler":
            return hidden_states
        return self.backbone.pooler(hidden_states.flatten(0, 1).unsqueeze(1)).unflatten(0, hidden_states.shape[:2])


class LoTLIPVisionModel(_LoTLIPTower):
    """LoTLIP's image tower, without projection: a stock encoder and its pooling."""

    config: LoTLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^(text|visual)_projection\.", r"^logit_scale$"]

    def __init__(self, config: LoTLIPVisionConfig) -> None:
        super().__init__(config)
        self.backbone = _backbone_from_config(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values: [B, channels, height, width], normalised by the image processor.
            interpolate_pos_encoding: Whether to interpolate the position encodings for images of another size than the
                model's (DINOv2 always does).
            pooled_only: Whether the pooled states are all that is asked for: where that saves time (ViT, not pooled by
                the mean, with `sdpa`), `last_hidden_state` is `None`.

        Raises:
            ValueError: on pixel values of a wrong shape or type.

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
        if pixel_values.dim() != 4:
            raise ValueError(
                f"`pixel_values` must have shape [batch, channels, height, width], got {list(pixel_values.shape)}."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` must be floating point, got {pixel_values.dtype}: pass images through the processor."
            )
        if self.config.backbone_config.model_type != "dinov2":
            kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
            size = self.config.image_size
            size = (size, size) if isinstance(size, int) else tuple(size)
            if not interpolate_pos_encoding and pixel_values.shape[-2:] != size:
                raise ValueError(
                    f"`pixel_values` are {list(pixel_values.shape[-2:])}, the model is for {list(size)}: resize the "
                    "images with the processor, or pass interpolate_pos_encoding=True."
                )
        pooled_only = pooled_only and _takes_pooled_places(self, kwargs)
        if pooled_only:
            kwargs["pooled_places"] = pixel_values.new_zeros(pixel_values.shape[0], 1, dtype=torch.int64)  # [CLS]
        outputs = self.backbone(pixel_values, **_with_config_defaults(self.config, kwargs))
        return BaseModelOutputWithPooling(
            last_hidden_state=None if pooled_only else outputs.last_hidden_state,
            pooler_output=self._pool(outputs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _pool(self, outputs: BaseModelOutputWithPooling) -> torch.Tensor:
        """[B, hidden_size]"""
        if self.config.pooling == "pooler":
            return outputs.pooler_output  # pyright: ignore[reportReturnType]
        if self.config.pooling == "cls":
            return outputs.last_hidden_state[:, 0]
        has_class_token = self.config.backbone_config.model_type != "siglip_vision_model"
        return outputs.last_hidden_state[:, int(has_class_token) :].mean(1)


class LoTLIPTextModelWithProjection(LoTLIPPreTrainedModel):
    """LoTLIP's text tower with its projection to the space that it shares with the images."""

    config: LoTLIPTextConfig
    base_model_prefix = "text_model"
    input_modalities = ["text"]
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", r"^logit_scale$"]

    def __init__(self, config: LoTLIPTextConfig) -> None:
        super().__init__(config)
        self.text_model = LoTLIPTextModel._from_config(config)
        self.text_projection = _projection(config.hidden_size, config.projection_dim)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

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
        r"""
        Arguments and errors are those of [`LoTLIPTextModel`].

        Example:

        ```python
        >>> from transformers import AutoTokenizer
        >>> from lotlip_hf import LoTLIPTextModelWithProjection

        >>> model = LoTLIPTextModelWithProjection.from_pretrained("checkpoint")
        >>> tokenizer = AutoTokenizer.from_pretrained("checkpoint")

        >>> inputs = tokenizer(["a photo of a cat", "a dog"], padding=True, return_tensors="pt")
        >>> text_embeds = model(**inputs).text_embeds
        ```"""
        outputs = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            output_corner_embeds=output_corner_embeds,
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
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]

    def __init__(self, config: LoTLIPVisionConfig) -> None:
        super().__init__(config)
        self.vision_model = LoTLIPVisionModel._from_config(config)
        self.visual_projection = _projection(config.hidden_size, config.projection_dim)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vision_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LoTLIPVisionModelOutput:
        r"""
        Arguments and errors are those of [`LoTLIPVisionModel`].

        Example:

        ```python
        >>> from PIL import Image
        >>> from transformers import AutoProcessor
        >>> from lotlip_hf import LoTLIPVisionModelWithProjection

        >>> model = LoTLIPVisionModelWithProjection.from_pretrained("checkpoint")
        >>> processor = AutoProcessor.from_pretrained("checkpoint")

        >>> inputs = processor(images=Image.new("RGB", (640, 480)), return_tensors="pt")
        >>> image_embeds = model(**inputs).image_embeds
        ```"""
        outputs = self.vision_model(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **{**kwargs, "return_dict": True},
        )
        return LoTLIPVisionModelOutput(
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
        self.text_projection = _projection(config.text_config.hidden_size, config.text_config.projection_dim)
        self.visual_projection = _projection(config.vision_config.hidden_size, config.vision_config.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

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
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            output_corner_embeds=output_corner_embeds,
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
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **{**kwargs, "return_dict": True},
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

        Raises:
            ValueError: if `long_input_ids` do not fit `input_ids`.

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
        has_all_texts = (input_ids is not None and input_ids.dim() == 3) or (
            inputs_embeds is not None and inputs_embeds.dim() == 4
        )
        has_long_texts = long_input_ids is not None
        if not return_loss and not has_long_texts:
            if pixel_values is None:
                outputs = self.get_text_features(
                    input_ids,
                    attention_mask,
                    position_ids,
                    inputs_embeds,
                    token_type_ids,
                    output_corner_embeds,
                    **{**kwargs, "return_dict": True},
                )
                embeds, corners = outputs.pooler_output, outputs.corner_embeds
                return LoTLIPOutput(
                    text_embeds=nn.functional.normalize(embeds, dim=-1),
                    text_model_output=outputs,
                    corner_embeds=None if corners is None else nn.functional.normalize(corners, dim=-1),
                )
            if input_ids is None and inputs_embeds is None:
                outputs = self.get_image_features(
                    pixel_values, interpolate_pos_encoding, **{**kwargs, "return_dict": True}
                )
                embeds = nn.functional.normalize(outputs.pooler_output, dim=-1)
                return LoTLIPOutput(image_embeds=embeds, vision_model_output=outputs)
        if has_long_texts:
            _check_long_input_ids(long_input_ids, input_ids if inputs_embeds is None else inputs_embeds[..., 0])
        elif long_attention_mask is not None:
            raise ValueError("`long_attention_mask` is given without `long_input_ids`.")
        if output_corner_embeds is None:
            output_corner_embeds = self.training or (bool(return_loss) and (has_all_texts or has_long_texts))
        vision_outputs = self.get_image_features(
            pixel_values, interpolate_pos_encoding, **{**kwargs, "return_dict": True}
        )
        # before the texts: its backward pass then comes after theirs, and what the images' gradients wait for has time
        image_embeds = nn.functional.normalize(vision_outputs.pooler_output, dim=-1)
        text_outputs = self.get_text_features(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            output_corner_embeds=output_corner_embeds and not has_long_texts,
            **{**kwargs, "return_dict": True},
        )
        text_embeds, corner_embeds = text_outputs.pooler_output, text_outputs.corner_embeds
        if has_long_texts:
            long_outputs = self.get_text_features(
                input_ids=long_input_ids,
                attention_mask=long_attention_mask,
                output_corner_embeds=output_corner_embeds,
                **{**kwargs, "return_dict": True},
            )
            text_embeds = torch.cat([text_embeds.unsqueeze(1), long_outputs.pooler_output], dim=1)
            corner_embeds = long_outputs.corner_embeds
        text_embeds = nn.functional.normalize(text_embeds, dim=-1)
        image_embeds = image_embeds.to(text_embeds.device)
        if corner_embeds is not None:
            corner_embeds = nn.functional.normalize(corner_embeds, dim=-1)

        logit_scale = self.logit_scale.exp().to(text_embeds.device)
        logits_per_text = logit_scale * text_embeds @ image_embeds.t()  # [B, (T,) I]
        logits_per_image = logits_per_text.movedim(-1, 0)

        loss = LoTLIPLoss(None, None, None)
        if return_loss:
            long_corner_embeds = corner_embeds if has_long_texts else None
            if has_all_texts and corner_embeds is not None:
                long_corner_embeds = corner_embeds[:, 1:]
            loss = lotlip_loss(
                image_embeds,
                text_embeds if text_embeds.dim() == 3 else text_embeds.unsqueeze(1),
                long_corner_embeds,
                logit_scale,
                self.config.short_loss_weight,
                self.config.long_loss_weight,
            )
        return LoTLIPOutput(
            loss=loss.loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
            corner_embeds=corner_embeds,
            loss_short=loss.loss_short,
            loss_long=loss.loss_long,
        )

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
            vision_pooling: See [`LoTLIPVisionConfig`]; by default `"cls"` for ViT and DINOv2, `"pooler"` for CLIP and
                SigLIP.
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
        text_config = _backbone_config(text, "text")
        text_pooling = LoTLIPTextConfig(backbone_config=text_config.to_dict(), pooling=text_pooling).pooling
        text_encoder = _load_backbone(text, "text", text_pooling)
        vision_config = _backbone_config(vision, "vision")
        if vision_pooling is None:
            vision_pooling = "cls" if vision_config.model_type in ("vit", "dinov2") else "pooler"
        vision_encoder = _load_backbone(vision, "vision", vision_pooling)
        projection_dim = projection_dim or vision_encoder.config.hidden_size
        config = LoTLIPConfig(
            text_config=LoTLIPTextConfig(
                backbone_config=_without_path(text_encoder.config),
                num_corner_tokens=num_corner_tokens,
                pooling=text_pooling,
                projection_dim=projection_dim,
            ),
            vision_config=LoTLIPVisionConfig(
                backbone_config=_without_path(vision_encoder.config), pooling=vision_pooling, projection_dim=None
            ),
            projection_dim=projection_dim,
            **config_kwargs,
        )
        model = cls(config)
        for name, backbone, encoder in (
            ("text", model.text_model.backbone, text_encoder),
            ("vision", model.vision_model.backbone, vision_encoder),
        ):
            keys = backbone.load_state_dict(encoder.state_dict(), strict=False)
            missing, unexpected = _without_pooler(keys.missing_keys), _without_pooler(keys.unexpected_keys)
            if missing or unexpected:
                raise ValueError(
                    f"The `{name}` encoder {type(encoder).__name__} does not fit its tower: missing {missing}, "
                    f"unexpected {unexpected}."
                )
        return model


def _without_pooler(names: Iterable[str]) -> list[str]:
    """Masked language models come without a pooler: where a tower needs one it is new, as the corner tokens are."""
    return sorted(name for name in names if not name.startswith("pooler."))


def _without_path(config: PreTrainedConfig) -> dict[str, Any]:
    """Where a backbone once lay is nothing to publish."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def _backbone_config(source: str | Path | PreTrainedModel, tower: str) -> PreTrainedConfig:
    config = (
        source.config
        if isinstance(source, PreTrainedModel)
        else AutoConfig.from_pretrained(source, trust_remote_code=False)
    )
    return getattr(config, f"{tower}_config") if config.model_type in ("clip", "siglip") else config


def _load_backbone(source: str | Path | PreTrainedModel, tower: str, pooling: str) -> PreTrainedModel:
    if isinstance(source, PreTrainedModel):
        # the classes with a projection hold the encoder under the tower's name, too
        return getattr(source, f"{tower}_model", source)
    config = _backbone_config(source, tower)
    encoder, info = AutoModel.from_pretrained(
        source,
        config=config,
        trust_remote_code=False,
        output_loading_info=True,
        **_pooling_layer_argument(config, pooling),
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
    "LoTLIPVisionModelOutput",
    "LoTLIPVisionModelWithProjection",
]
