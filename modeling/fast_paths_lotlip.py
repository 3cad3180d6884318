"""
What saves time and changes no result: texts in one row without their padding, and the last layer of a BERT or ViT for
the pooled tokens alone. A tower that takes neither reads the same without this file.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer
from transformers.models.vit.modeling_vit import ViTLayer
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLayer


def to_row(states: torch.Tensor, row_index: torch.Tensor) -> torch.Tensor:
    """[N, length, ...] -> [1, total, ...]: the tokens at `row_index` [total], counted through all texts."""
    return states.flatten(0, 1).index_select(0, row_index).unsqueeze(0)


def from_row(row: torch.Tensor, row_index: torch.Tensor, num_texts: int, length: int) -> torch.Tensor:
    """The inverse of [`to_row`]: [1, total, ...] -> [N, length, ...] with zeros for padding."""
    padded = row.new_zeros(num_texts * length, *row.shape[2:])
    return padded.index_copy(0, row_index, row.squeeze(0)).unflatten(0, (num_texts, length))


def find_row_index(attention_mask: torch.Tensor, num_corner_tokens: int, attention: str) -> torch.Tensor | None:
    """[total]: the tokens of [N, L + m] that are no padding, if the backbone computes these alone; else `None`."""
    if (
        attention not in ("unpadded", "flex_attention")
        # torch's code for CPUs does not compile with as many changing sizes as a row has
        or (attention == "flex_attention" and attention_mask.device.type == "cpu")
        or torch.compiler.is_compiling()  # their number is another in each batch
        or torch.jit.is_tracing()
    ):
        return None
    kept = nn.functional.pad(attention_mask.bool(), (0, num_corner_tokens), value=True).flatten()
    row_index = kept.nonzero().squeeze(1)
    return row_index if len(row_index) < len(kept) else None


class TextPath(NamedTuple):
    """
    How a backbone computes N texts.

    Args:
        size: N, and the number of tokens of a text with padding and corner tokens, L + m.
        row_index: [total], see [`find_row_index`]; `None` for texts with padding.
        pooled_tokens: [N, 1 + m], the tokens that the last layer computes; `None` for all.
    """

    size: tuple[int, int]
    row_index: torch.Tensor | None
    pooled_tokens: torch.Tensor | None

    @classmethod
    def choose(
        cls,
        config: PreTrainedConfig,
        attention_mask: torch.Tensor,
        num_corner_tokens: int,
        pooled_index: torch.Tensor,
        pooled_only: bool,
    ) -> "TextPath":
        """For a mask [N, L], the index [N] of the pooled token, and whether the last layer may leave others out."""
        num_texts, length = attention_mask.shape
        pooled_tokens = None
        if pooled_only:
            corners = torch.arange(length, length + num_corner_tokens, device=pooled_index.device)
            pooled_tokens = torch.cat([pooled_index.unsqueeze(1), corners.expand(num_texts, -1)], dim=1)
        row_index = find_row_index(attention_mask, num_corner_tokens, config._attn_implementation)
        return cls((num_texts, length + num_corner_tokens), row_index, pooled_tokens)

    def run(self, backbone: PreTrainedModel, attention_mask: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        """The backbone's outputs; states as of texts with padding, or [N, 1 + m, hidden_size] of pooled tokens."""
        if self.pooled_tokens is not None:
            kwargs["pooled_tokens"] = self.pooled_tokens
        if self.row_index is None:
            return backbone(attention_mask=attention_mask, **inputs, **kwargs)
        inputs = {name: to_row(value, self.row_index) for name, value in inputs.items()}
        outputs = backbone(attention_mask=attention_mask, row_index=self.row_index, **inputs, **kwargs)
        if self.pooled_tokens is None:
            outputs.last_hidden_state = from_row(outputs.last_hidden_state, self.row_index, *self.size)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(from_row(one, self.row_index, *self.size) for one in outputs.hidden_states)
        return outputs


def unpadded_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_index: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    The attention implementation `unpadded`: `sdpa`, for which it lays texts in one row, [1, heads, total, head_dim]
    with a mask [N, 1, length, length], out with their padding. Without `row_index` [total] it is `sdpa`.
    """
    if row_index is None or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    num_texts, _, _, length = attention_mask.shape
    query, key, value = (
        from_row(states.transpose(1, 2), row_index, num_texts, length).transpose(1, 2)
        for states in (query, key, value)
    )
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return to_row(output, row_index), None  # [1, total, heads, head_dim]


AttentionInterface.register("unpadded", unpadded_attention)
AttentionMaskInterface.register("unpadded", sdpa_mask)


class PooledLayer(nn.Module):
    """A stock layer, second among the bases, that also takes `pooled_tokens` [N, Q] and computes these alone."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """[N, L, hidden_size], or [1, total, hidden_size] with `row_index`, and [N, 1, L, L] -> [N, Q, hidden_size]"""
        tokens = kwargs.pop("pooled_tokens", None)
        if tokens is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        row_index = kwargs.get("row_index")
        if row_index is not None:
            hidden_states = from_row(hidden_states, row_index, attention_mask.shape[0], attention_mask.shape[-1])
        if attention_mask is not None:
            attention_mask = take(attention_mask[:, 0], tokens).unsqueeze(1)  # [N, 1, Q, L]
        return self.pooled(hidden_states, attention_mask, tokens)

    def pooled(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        """[N, L, hidden_size], [N, 1, Q, L] and [N, Q] -> [N, Q, hidden_size]; of a BERT's layer"""
        attention, states = self.attention.self, take(hidden_states, tokens)
        query, key, value = attention.query(states), attention.key(hidden_states), attention.value(hidden_states)
        context = _attend(attention, query, key, value, mask, attention.dropout.p)
        return self.feed_forward_chunk(self.attention.output(context, states))


class PooledViTLayer(PooledLayer, ViTLayer):
    """`ViTLayer`, see [`PooledLayer`]."""

    def pooled(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        """As [`PooledLayer.pooled`]."""
        attention, normed = self.attention, self.layernorm_before(hidden_states)
        query = attention.q_proj(take(normed, tokens))
        key, value = attention.k_proj(normed), attention.v_proj(normed)
        context = _attend(attention, query, key, value, mask, attention.attention_dropout)
        states = self.dropout(attention.o_proj(context)) + take(hidden_states, tokens)
        return self.dropout(self.mlp(self.layernorm_after(states))) + states


PooledBertLayer = type("PooledBertLayer", (PooledLayer, BertLayer), {})
PooledRobertaLayer = type("PooledRobertaLayer", (PooledLayer, RobertaLayer), {})
PooledXLMRobertaLayer = type("PooledXLMRobertaLayer", (PooledLayer, XLMRobertaLayer), {})
POOLED_LAYERS: dict[type, type] = {
    BertLayer: PooledBertLayer,
    RobertaLayer: PooledRobertaLayer,
    XLMRobertaLayer: PooledXLMRobertaLayer,
    ViTLayer: PooledViTLayer,
}


def take(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[N, L, size] at [N, Q] -> [N, Q, size]"""
    texts = torch.arange(states.shape[0], device=states.device)
    return states[texts.unsqueeze(1), tokens]  # `take_along_dim` would fix the sizes of an exported graph


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """[N, Q, hidden_size] and twice [N, L, hidden_size] -> [N, Q, hidden_size]"""
    query, key, value = (
        states.unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2) for states in (query, key, value)
    )
    dropout = dropout if module.training else 0.0
    output, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=module.scaling)
    return output.flatten(-2)
