"""A text encoder of a user's own: rotary positions, and layers of full and of sliding attention."""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from lotlip_hf.modeling.backbones_lotlip import TEXT_BACKBONES, TextBackbone


@strict
class TinyRotaryConfig(PreTrainedConfig):
    model_type = "tiny_rotary"

    vocab_size: int = 99
    hidden_size: int = 32
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 40
    sliding_window: int = 3
    pad_token_id: int | None = 0
    initializer_range: float = 0.02


class TinyRotaryAttention(nn.Module):
    is_causal = False

    def __init__(self, config: TinyRotaryConfig) -> None:
        super().__init__()
        self.config, self.head_dim = config, config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: torch.Tensor, mask: Any, position_ids: torch.Tensor, **kwargs: Any) -> tuple:
        query, key, value = (
            one.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in self.qkv(states).chunk(3, dim=-1)
        )
        frequencies = 100.0 ** -torch.linspace(0, 1, self.head_dim // 2, device=states.device)
        angles = (position_ids.unsqueeze(-1) * frequencies).repeat(1, 1, 2).unsqueeze(1)  # [N, 1, L, head_dim]
        query, key = (rotate(one, angles) for one in (query, key))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        context, weights = attend(self, query, key, value, mask, scaling=self.head_dim**-0.5, **kwargs)
        return self.output(context.flatten(-2)), weights


def rotate(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    one, other = states.chunk(2, dim=-1)
    return states * angles.cos().to(states.dtype) + torch.cat([-other, one], dim=-1) * angles.sin().to(states.dtype)


class TinyRotaryLayer(GradientCheckpointingLayer):
    def __init__(self, config: TinyRotaryConfig, layer_type: str) -> None:
        super().__init__()
        self.layer_type, self.attention = layer_type, TinyRotaryAttention(config)
        self.norm, self.mlp = nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: torch.Tensor, masks: dict, position_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        states = states + self.attention(self.norm(states), masks[self.layer_type], position_ids, **kwargs)[0]
        return states + self.mlp(states).tanh()


class TinyRotaryModel(PreTrainedModel):
    config: TinyRotaryConfig
    config_class = TinyRotaryConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TinyRotaryLayer"]
    _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": TinyRotaryLayer, "attentions": TinyRotaryAttention}

    def __init__(self, config: TinyRotaryConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        types = ("full_attention", "sliding_attention")
        self.layers = nn.ModuleList(TinyRotaryLayer(config, types[i % 2]) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(states.shape[1], device=states.device).unsqueeze(0)
        if not isinstance(attention_mask, dict):
            options = {"config": self.config, "inputs_embeds": states, "attention_mask": attention_mask}
            attention_mask = {
                "full_attention": create_bidirectional_mask(**options),
                "sliding_attention": create_bidirectional_sliding_window_mask(**options),
            }
        for layer in self.layers:
            states = layer(states, attention_mask, position_ids, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(states))


class TinyRotary(TextBackbone):
    """All that LoTLIP has to know of it."""

    def create_masks(self, config: Any, inputs_embeds: torch.Tensor, rule: Any, is_corner: Any) -> dict[str, Any]:
        options = {"config": config, "inputs_embeds": inputs_embeds, "attention_mask": None, "and_mask_function": rule}
        return {
            "full_attention": create_bidirectional_mask(**options),
            "sliding_attention": create_bidirectional_sliding_window_mask(**options, or_mask_function=is_corner),
        }


def register() -> None:
    """Makes it known to transformers and to LoTLIP; a second call changes nothing."""
    AutoConfig.register(TinyRotaryConfig.model_type, TinyRotaryConfig, exist_ok=True)
    AutoModel.register(TinyRotaryConfig, TinyRotaryModel, exist_ok=True)
    TEXT_BACKBONES["tiny_rotary"] = TinyRotary()
