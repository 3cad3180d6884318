"""
The last layer of a BERT or ViT for the tokens that are pooled alone: nobody reads the other tokens' last states, but
what the layer computes for them is a good part of what a tower costs.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer
from transformers.models.vit.modeling_vit import ViTLayer
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLayer

from .masking_lotlip import from_row


class PooledLayer(nn.Module):
    """What the layers below add to the stock ones, which come second among their bases."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: [N, L, hidden_size], or [1, total, hidden_size] with `row_index`.
            attention_mask: [N, 1, L, L], as `sdpa` takes it.
            args: Those of the stock layer.
            kwargs: Those of the stock layer; and `pooled_places` [N, Q], the tokens to compute, and `row_index` (see
                [`~masking_lotlip.to_row`]).

        Returns:
            [N, Q, hidden_size]; without `pooled_places` what the stock layer returns.
        """
        places = kwargs.pop("pooled_places", None)
        if places is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        row_index = kwargs.get("row_index")
        if row_index is not None:
            hidden_states = from_row(hidden_states, row_index, attention_mask.shape[0], attention_mask.shape[-1])
        if attention_mask is not None:
            attention_mask = _take(attention_mask[:, 0], places).unsqueeze(1)  # [N, 1, Q, L]
        return self.pooled(hidden_states, attention_mask, places)

    def pooled(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, places: torch.Tensor
    ) -> torch.Tensor:
        """[N, L, hidden_size], [N, 1, Q, L] and [N, Q] -> [N, Q, hidden_size]"""
        raise NotImplementedError


class _BertLayer(PooledLayer):
    def pooled(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, places: torch.Tensor
    ) -> torch.Tensor:
        attention, states = self.attention.self, _take(hidden_states, places)
        query, key, value = attention.query(states), attention.key(hidden_states), attention.value(hidden_states)
        context = _attend(attention, query, key, value, attention_mask, attention.dropout.p)
        return self.feed_forward_chunk(self.attention.output(context, states))


class PooledBertLayer(_BertLayer, BertLayer):
    """`BertLayer`, see [`PooledLayer`]."""


class PooledRobertaLayer(_BertLayer, RobertaLayer):
    """`RobertaLayer`, see [`PooledLayer`]."""


class PooledXLMRobertaLayer(_BertLayer, XLMRobertaLayer):
    """`XLMRobertaLayer`, see [`PooledLayer`]."""


class PooledViTLayer(PooledLayer, ViTLayer):
    """`ViTLayer`, see [`PooledLayer`]."""

    def pooled(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, places: torch.Tensor
    ) -> torch.Tensor:
        attention, normed = self.attention, self.layernorm_before(hidden_states)
        query = attention.q_proj(_take(normed, places))
        key, value = attention.k_proj(normed), attention.v_proj(normed)
        context = _attend(attention, query, key, value, attention_mask, attention.attention_dropout)
        states = self.dropout(attention.o_proj(context)) + _take(hidden_states, places)
        return self.dropout(self.mlp(self.layernorm_after(states))) + states


POOLED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    BertLayer: PooledBertLayer,
    RobertaLayer: PooledRobertaLayer,
    XLMRobertaLayer: PooledXLMRobertaLayer,
    ViTLayer: PooledViTLayer,
}


def last_layer(backbone: PreTrainedModel) -> nn.Module | None:
    """The last layer of a BERT or ViT; `None` for other backbones."""
    encoder = getattr(backbone, "encoder", None)
    layers = getattr(backbone, "layers", None) or getattr(encoder, "layer", None)
    return layers[-1] if layers else None


def with_pooled_layer(backbone: PreTrainedModel) -> PreTrainedModel:
    """The same backbone, its last layer one of `POOLED_LAYERS` if it is of a kind that these extend."""
    layer = last_layer(backbone)
    if type(layer) in POOLED_LAYERS:
        layer.__class__ = POOLED_LAYERS[type(layer)]
        backbone._no_split_modules = {*(backbone._no_split_modules or ()), type(layer).__name__}
    return backbone


def takes_pooled_places(backbone: PreTrainedModel) -> bool:
    """Whether the backbone, as it is set up, takes `pooled_places`: the layers above compute attention by sdpa."""
    is_sdpa = backbone.config._attn_implementation in ("sdpa", "unpadded")
    return is_sdpa and isinstance(last_layer(backbone), PooledLayer)


def _take(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[N, L, size] at [N, Q] -> [N, Q, size]"""
    texts = torch.arange(states.shape[0], device=states.device)
    return states[texts.unsqueeze(1), places]  # `take_along_dim` would fix the sizes of an exported graph


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """[N, Q, hidden_size] and twice [N, L, hidden_size] -> [N, Q, hidden_size]"""
    query, key, value = (
        states.unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2) for states in (query, key, value)
    )
    dropout = dropout if module.training else 0.0
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=module.scaling
    )
    return output.flatten(-2)
