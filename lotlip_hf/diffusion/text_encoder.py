"""A LoTLIP text tower with an adapter that maps its states to CLIP's, to replace a CLIP text encoder."""

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput
from transformers.utils.generic import can_return_tuple

from ..modeling.backbones_lotlip import CLIPTextBackbone
from ..modeling.configuration_lotlip import LoTLIPTextConfig
from ..modeling.modeling_lotlip import (
    LoTLIPModel,
    LoTLIPPreTrainedModel,
    LoTLIPTextModel,
    LoTLIPTextModelWithProjection,
)
from ..modeling.tokenization_lotlip import LoTLIPTokenizer


def pipeline_target_layer(have_projections: Iterable[bool]) -> Literal[-1, -2]:
    """
    Returns the index of the hidden state that a diffusion pipeline reads from its CLIP text encoders: -2 if one of
    them has a text projection (Stable Diffusion XL and 3), else -1 (Stable Diffusion 1.x and 2.x, Flux).
    """
    return -2 if any(have_projections) else -1


KEEPING = (None, "window")  # adapters that keep the width and the pooled states of the tower


@strict
class LoTLIPTextEncoderConfig(PreTrainedConfig):
    """
    Configuration of a [`LoTLIPTextEncoder`].

    Args:
        text_config (`LoTLIPTextConfig` or `dict`, *optional*): Configuration of the text tower.
        adapter (`str`, *optional*): Adapter that maps the tower's hidden states to the space of the replaced encoder.
            `"linear"` and `"mlp"` map each token separately. `"resampler"` has learnable queries that attend to all
            tokens, so it always returns `num_queries` tokens. `"window"` adds a linear map of a token and its two
            neighbours on each side, and starts with 0, as WiCLP (https://arxiv.org/abs/2406.07844); pooled states
            stay as they are. `None` applies no adapter.
        hidden_size (`int`, *optional*): Width of the returned states, equal to the width of the replaced encoder.
            Defaults to the width of the tower.
        projection_dim (`int`, *optional*): Width of the pooled `text_embeds`: a number to replace a
            `CLIPTextModelWithProjection`, `None` to replace a `CLIPTextModel`.
        target_layer (`int`, *optional*, defaults to -1): Hidden state of the replaced encoder that the adapter
            imitates: -1 for `last_hidden_state` (Stable Diffusion 1.x and 2.x) or -2 for `hidden_states[-2]` (Stable
            Diffusion XL and 3).
        adapter_size (`int`, *optional*): Inner width of the MLP and the resampler. Defaults to `hidden_size`.
        num_queries (`int`, *optional*, defaults to 77): Number of queries in the resampler.
        num_adapter_layers (`int`, *optional*, defaults to 2): Number of layers in the resampler.
        num_adapter_heads (`int`, *optional*, defaults to 8): Number of attention heads in each resampler layer.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the adapter's initial weights.

    Raises:
        `ValueError`: If the widths do not match without an adapter, or if the heads do not divide `adapter_size`.

    Example:

    ```python
    >>> from lotlip_hf import LoTLIPTextEncoderConfig

    >>> config = LoTLIPTextEncoderConfig(adapter="mlp", hidden_size=1024)
    >>> config.text_config.hidden_size, config.hidden_size, config.max_position_embeddings
    (768, 1024, 510)
    ```
    """

    model_type = "lotlip_text_encoder"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": LoTLIPTextConfig}

    text_config: LoTLIPTextConfig | dict | None = None
    adapter: Literal["linear", "mlp", "resampler", "window"] | None = None
    hidden_size: int | None = None
    projection_dim: int | None = None
    target_layer: Literal[-1, -2] = -1
    adapter_size: int | None = None
    num_queries: int = 77
    num_adapter_layers: int = 2
    num_adapter_heads: int = 8
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, LoTLIPTextConfig):
            self.text_config = LoTLIPTextConfig(**(self.text_config or {}))
        if self.hidden_size is None:
            self.hidden_size = self.text_config.hidden_size
        if self.adapter_size is None:
            self.adapter_size = self.hidden_size
        super().__post_init__(**kwargs)

    def validate_widths(self) -> None:
        width = self.text_config.hidden_size
        if self.adapter in KEEPING and self.hidden_size != width:
            raise ValueError(
                f"`hidden_size`={self.hidden_size} needs another adapter, because the text tower has width {width}. "
                'Pass `adapter="linear"`, `"mlp"` or `"resampler"`.'
            )
        if self.adapter == "resampler" and self.adapter_size % self.num_adapter_heads:  # pyright: ignore
            raise ValueError(
                f"`adapter_size`={self.adapter_size} is not a multiple of `num_adapter_heads`="
                f"{self.num_adapter_heads}. Change one of them."
            )

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the text tower's vocabulary."""
        return self.text_config.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        """Maximum length of a text in tokens, special tokens included."""
        return self.text_config.max_position_embeddings

    @property
    def output_length(self) -> int | None:
        """Length of every returned sequence, or `None` if it equals the length of `input_ids`."""
        return self.num_queries if self.adapter == "resampler" else None


class LoTLIPMLPAdapter(nn.Module):
    """Two linear layers with a GELU between them, applied to each token separately."""

    def __init__(self, input_size: int, adapter_size: int, output_size: int) -> None:
        super().__init__()
        self.input_projection = nn.Linear(input_size, adapter_size)
        self.output_projection = nn.Linear(adapter_size, output_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., input_size] -> [..., output_size]"""
        return self.output_projection(F.gelu(self.input_projection(hidden_states)))


class LoTLIPWindowAdapter(nn.Module):
    """WiCLP's map: the state of a token, plus a linear function of the states around it, which starts as 0."""

    def __init__(self, width: int, window: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, window, padding=window // 2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, L, width] -> [B, L, width]"""
        return hidden_states + self.conv(hidden_states.transpose(1, 2)).transpose(1, 2)


class LoTLIPResamplerLayer(GradientCheckpointingLayer):
    """A pre-norm layer in which the queries attend to the text and to each other and then pass through an MLP."""

    def __init__(self, config: LoTLIPTextEncoderConfig) -> None:
        super().__init__()
        size: int = config.adapter_size  # pyright: ignore[reportAssignmentType]
        self.num_heads = config.num_adapter_heads
        self.query_norm = nn.LayerNorm(size)
        self.text_norm = nn.LayerNorm(size)
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)
        self.mlp_norm = nn.LayerNorm(size)
        self.mlp = LoTLIPMLPAdapter(size, 4 * size, size)

    def forward(self, queries: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Queries [B, Q, size], text [B, L, size], mask [B, 1, 1, L + Q] (True: visible key) -> [B, Q, size]"""
        normalized = self.query_norm(queries)
        keys = torch.cat([self.text_norm(text), normalized], dim=1)
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, length, head size]
            for projection, states in ((self.q_proj, normalized), (self.k_proj, keys), (self.v_proj, keys))
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        queries = queries + self.out_proj(attended.transpose(1, 2).flatten(2))
        return queries + self.mlp(self.mlp_norm(queries))


class LoTLIPResampler(nn.Module):
    """
    A perceiver resampler as in Flamingo (https://arxiv.org/abs/2204.14198, section 3.1.1): a fixed number of learnable
    queries attend to a text of any length. ELLA (https://arxiv.org/abs/2403.05135) uses a resampler for diffusion
    models that, unlike this one, depends on the timestep.
    """

    def __init__(self, config: LoTLIPTextEncoderConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_queries, config.adapter_size))
        self.input_projection = nn.Linear(config.text_config.hidden_size, config.adapter_size)
        self.layers = nn.ModuleList(LoTLIPResamplerLayer(config) for _ in range(config.num_adapter_layers))
        self.norm = nn.LayerNorm(config.adapter_size)
        self.output_projection = nn.Linear(config.adapter_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States [B, L, text width], mask [B, L] (True: text) -> [B, num_queries, hidden_size]"""
        text = self.input_projection(hidden_states)
        queries = self.queries.to(text).expand(len(text), -1, -1)
        mask = F.pad(mask, (0, queries.shape[1]), value=True)[:, None, None]
        for layer in self.layers:
            queries = layer(queries, text, mask)
        return self.output_projection(self.norm(queries))


class LoTLIPTextEncoder(LoTLIPPreTrainedModel):
    """
    A LoTLIP text tower that replaces a CLIP text encoder, for example in a diffusion pipeline.

    Its outputs have the fields, order and widths of a `CLIPTextModel`, or of a `CLIPTextModelWithProjection` if
    `config.projection_dim` is set. An adapter maps the tower's hidden states to the space of the replaced encoder;
    `examples/align_text_encoder.py` trains it. Without an adapter, the hidden states are those of the LoTLIP tower.

    Load LoRA weights of a BERT tower with `encoder.load_adapter(folder)`. diffusers' `load_lora_weights` only knows
    the layer names of CLIP.

    Args:
        config (`LoTLIPTextEncoderConfig`): Configuration of the tower and the adapter.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from lotlip_hf import LoTLIPTextEncoder, LoTLIPTextModel

    >>> tower = LoTLIPTextModel.from_pretrained("checkpoint")
    >>> encoder = LoTLIPTextEncoder.from_text_model(tower, adapter="linear", hidden_size=768)
    >>> inputs = AutoTokenizer.from_pretrained("checkpoint")(["a cat"], return_tensors="pt")
    >>> encoder(**inputs).pooler_output.shape
    torch.Size([1, 768])
    ```
    """

    config: LoTLIPTextEncoderConfig
    _auto_class = None  # save checkpoints without code, because this package provides the class
    base_model_prefix = "text_model"
    input_modalities = ["text"]
    _no_split_modules = ["LoTLIPResamplerLayer"]

    def __init__(self, config: LoTLIPTextEncoderConfig) -> None:
        super().__init__(config)
        self.text_model = LoTLIPTextModel._from_config(config.text_config)
        # diffusers' `clip_skip` applies `final_layer_norm` to earlier hidden states, which are already normalised here
        self.text_model.final_layer_norm = nn.Identity()
        width = config.text_config.hidden_size
        if config.adapter in KEEPING:
            self.adapter = nn.Identity() if config.adapter is None else LoTLIPWindowAdapter(width)
            self.pooled_adapter = nn.Identity()
        elif config.adapter == "linear":
            self.adapter = nn.Linear(width, config.hidden_size)
            self.pooled_adapter = nn.Linear(width, config.hidden_size)
        elif config.adapter == "mlp":
            self.adapter = LoTLIPMLPAdapter(width, config.adapter_size, config.hidden_size)
            self.pooled_adapter = LoTLIPMLPAdapter(width, config.adapter_size, config.hidden_size)
        else:
            self.adapter = LoTLIPResampler(config)
            self.pooled_adapter = LoTLIPMLPAdapter(width, config.adapter_size, config.hidden_size)
        self.text_projection = None
        if config.projection_dim is not None:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LoTLIPResampler):
            init.normal_(module.queries, std=self.config.initializer_range)
        elif isinstance(module, LoTLIPWindowAdapter):
            init.zeros_(module.conv.weight)
            init.zeros_(module.conv.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | CLIPTextModelOutput:
        r"""
        Encodes texts. In the shapes below, S is `num_queries` with a resampler, else L.

        Args:
            input_ids (`torch.Tensor`): [B, L] token ids, padded with the tokenizer's padding token.
            attention_mask (`torch.Tensor`, *optional*): [B, L], 0 for masked tokens. Padding is always masked, even if
                the mask is all ones: tokens with `pad_token_id`, or with CLIP's text tower all tokens after [EOT].
            position_ids (`torch.Tensor`, *optional*): [B, L] positions of the tokens. Defaults to 0, 1, 2, ...
            output_hidden_states (`bool`, *optional*): Whether to return `hidden_states`, a tuple of [B, S,
                hidden_size] for the embeddings and each layer. The final norm and the adapter are applied to each of
                them. `hidden_states[target_layer]` is `last_hidden_state`; with -2, it appears twice at the end.
                Adapters are trained on the last state and only approximate earlier layers of the replaced encoder.
            **kwargs: `return_dict` and `output_attentions`, as in CLIP.

        Returns:
            `BaseModelOutputWithPooling` or `CLIPTextModelOutput`: `last_hidden_state` [B, S, hidden_size],
            `pooler_output` [B, hidden_size] and `hidden_states`. With `config.projection_dim`: `text_embeds`
            [B, projection_dim], `last_hidden_state` and `hidden_states`. The states of padding are finite and do not
            depend on other texts.

        Raises:
            `ValueError`: If a text is longer than `config.max_position_embeddings`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        mask = self._text_mask(input_ids, attention_mask)
        has_positions = input_ids.shape[-1] <= self.config.max_position_embeddings
        if (
            attention_mask is not None
            and isinstance(self.config.text_config.family, CLIPTextBackbone)
            and has_positions
        ):
            # Pipelines also read the states of padding. As in CLIP, padding attends to the padding before it.
            attention_mask = attention_mask.bool() | self._is_behind_text(input_ids, attention_mask)
        elif attention_mask is not None:
            attention_mask = mask
        outputs = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            output_hidden_states=output_hidden_states,
            output_corner_embeds=False,
            **{**kwargs, "return_dict": True},
        )
        last_hidden_state = self.adapt(outputs.last_hidden_state, mask)
        hidden_states = None
        if output_hidden_states:
            norm = _final_norm(self.text_model.backbone)
            earlier = tuple(self.adapt(norm(states), mask) for states in outputs.hidden_states[:-1])
            hidden_states = earlier + (last_hidden_state,) * -self.config.target_layer
        pooled = self.pooled_adapter(outputs.pooler_output)
        if self.text_projection is None:
            return BaseModelOutputWithPooling(
                last_hidden_state=last_hidden_state,
                pooler_output=pooled,
                hidden_states=hidden_states,
                attentions=outputs.attentions,
            )
        return CLIPTextModelOutput(
            text_embeds=self.text_projection(pooled),
            last_hidden_state=last_hidden_state,
            hidden_states=hidden_states,
            attentions=outputs.attentions,
        )

    def adapt(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalised states of the tower [B, L, text width], mask [B, L] (True: text) -> [B, S, hidden_size]"""
        if isinstance(self.adapter, LoTLIPResampler):
            return self.adapter(hidden_states, mask)
        return self.adapter(hidden_states)

    def _text_mask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Returns [B, L]: False for padding and where `attention_mask` is 0."""
        config = self.config.text_config
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if isinstance(config.family, CLIPTextBackbone):
            return seen.bool() & ~self._is_behind_text(input_ids, seen)
        return seen.bool() if config.pad_token_id is None else seen.bool() & (input_ids != config.pad_token_id)

    def _is_behind_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Returns [B, L]: True after the first unmasked [EOT], which is also CLIP's padding token."""
        config = self.config.text_config
        # Old configurations have the wrong [EOT] id 2. As in CLIPTextModel, [EOT] is then the highest id.
        eos_token_id = input_ids.amax(-1, keepdim=True) if config.eos_token_id == 2 else config.eos_token_id
        ends = ((input_ids == eos_token_id) & attention_mask.bool()).int()
        return ends.cumsum(-1) - ends > 0

    @classmethod
    def from_text_model(
        cls, model: LoTLIPModel | LoTLIPTextModel | LoTLIPTextModelWithProjection, **config_kwargs: Any
    ) -> "LoTLIPTextEncoder":
        r"""
        Makes an encoder from the text tower of a LoTLIP model. The encoder shares the tower's weights with `model`;
        frozen weights stay frozen. An adapter is new and must be trained. Without an adapter, `projection_dim` uses
        the model's own text projection.

        Args:
            model (`LoTLIPModel` or `LoTLIPTextModel` or `LoTLIPTextModelWithProjection`): Model with the text tower.
            **config_kwargs: Fields of [`LoTLIPTextEncoderConfig`].

        Returns:
            `LoTLIPTextEncoder`: The encoder, in training mode if `model` is.

        Raises:
            `ValueError`: If there is no adapter and `projection_dim` is not the width of the model's text projection.

        Example:

        ```python
        >>> from lotlip_hf import LoTLIPTextConfig, LoTLIPTextEncoder, LoTLIPTextModel

        >>> tower = LoTLIPTextModel(LoTLIPTextConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
        >>> encoder = LoTLIPTextEncoder.from_text_model(tower, adapter="linear", hidden_size=64)
        >>> encoder.config.hidden_size
        64
        ```
        """
        tower = model if isinstance(model, LoTLIPTextModel) else model.text_model
        text_config = copy.deepcopy(tower.config)
        # a saved encoder must not contain the tower's local path
        text_config._name_or_path = text_config.backbone_config._name_or_path = ""
        config = LoTLIPTextEncoderConfig(text_config=text_config, **config_kwargs)
        projection = getattr(model, "text_projection", None)
        shares_projection = config.adapter in KEEPING and config.projection_dim is not None
        if shares_projection and getattr(projection, "out_features", None) != config.projection_dim:
            has = f"has width {projection.out_features}" if isinstance(projection, nn.Linear) else "does not exist"
            raise ValueError(
                f"`projection_dim`={config.projection_dim} needs an adapter, because the text projection of "
                f'{type(model).__name__} {has}. Pass `adapter="linear"`, `"mlp"` or `"resampler"`.'
            )
        with torch.device("meta"):
            encoder = cls(config)
        encoder.text_model.load_state_dict(tower.state_dict(), assign=True)
        for name, parameter in tower.named_parameters():
            encoder.text_model.get_parameter(name).requires_grad_(parameter.requires_grad)
        buffers = {name: module._buffers for name, module in tower.named_modules()}
        for name, module in encoder.text_model.named_modules():
            module._buffers = dict(buffers.get(name, {}))  # state dicts lack non-persistent buffers
        for name, module in encoder.named_children():
            if name != "text_model":
                module.to_empty(device=tower.device).to(tower.dtype).apply(encoder._init_weights)
        if shares_projection:
            encoder.text_projection.load_state_dict(projection.state_dict(), assign=True)
            encoder.text_projection.requires_grad_(projection.weight.requires_grad)
        attention = tower.config.backbone_config._attn_implementation
        if encoder.config.text_config.backbone_config._attn_implementation != attention:
            encoder.set_attn_implementation(attention)
        return encoder.train(model.training)


def _final_norm(backbone: nn.Module) -> nn.Module:
    """The norm behind the last layer, which `hidden_states` of earlier layers lack."""
    modules = dict(backbone.named_modules())
    names = ("final_layer_norm", "encoder.final_layer_norm", "final_norm", "norm")  # CLIP, T5, ModernBERT, decoders
    return next((modules[name] for name in names if name in modules), nn.Identity())


AutoConfig.register(LoTLIPTextEncoderConfig.model_type, LoTLIPTextEncoderConfig)
AutoModel.register(LoTLIPTextEncoderConfig, LoTLIPTextEncoder)
AutoTokenizer.register(LoTLIPTextEncoderConfig, fast_tokenizer_class=LoTLIPTokenizer)

# Saved pipelines name the package and class of each component. diffusers looks the class up in `lotlip_hf`.
LoTLIPTextEncoderConfig.__module__ = LoTLIPTextEncoder.__module__ = "lotlip_hf"

__all__ = ["LoTLIPTextEncoder", "LoTLIPTextEncoderConfig", "pipeline_target_layer"]
