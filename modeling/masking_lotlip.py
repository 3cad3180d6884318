"""The attention mask of LoTLIP's corner tokens, and attention over texts without their padding."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    create_bidirectional_mask,
    create_causal_mask,
    packed_sequence_mask_function,
    padding_mask_function,
    sdpa_mask,
)

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


CORNER, POOLED, WORD = 0, 1, 2


def corner_mask_function(kinds: torch.Tensor) -> Callable:
    """
    The rule of the LoTLIP paper's corner tokens: text tokens see every text token and no corner; a corner sees itself
    and every word, but no other corner and not the pooled token. Padding and other texts are for other rules to hide.

    Args:
        kinds: [batch_size, length], `WORD` for the tokens that corners see, `POOLED` for text that they do not, and
            `CORNER`.

    Returns:
        A function (batch, head, query, key) -> bool for transformers' `and_mask_function`.
    """

    def allowed(
        batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        lowest_seen = torch.where(kinds[batch_idx, q_idx] == CORNER, WORD, POOLED)
        return (kinds[batch_idx, kv_idx] >= lowest_seen) | (q_idx == kv_idx)

    return allowed


def create_corner_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    num_corner_tokens: int,
    pooled_index: torch.Tensor,
    is_causal: bool = False,
    row_index: torch.Tensor | None = None,
) -> "torch.Tensor | BlockMask | None":
    """
    The mask in the form that the backbone's attention implementation takes: additive for `eager`, boolean for `sdpa`
    and `unpadded`, a block mask for `flex_attention`.

    Args:
        config: Configuration of the backbone, which names the attention implementation.
        inputs_embeds: [batch_size, L + m, hidden_size], text tokens followed by the m corner tokens; only its shape,
            dtype and device count.
        attention_mask: [batch_size, L], 1 for text and 0 for padding.
        num_corner_tokens: m.
        pooled_index: [batch_size], where the token stands that the text's feature is read off: [CLS] (0 unless the
            text is padded on the left), or [EOT] of a causal backbone.
        is_causal: Whether the backbone is causal.
        row_index: [total], the places of [batch_size, L + m] that are no padding, if the backbone gets these alone, in
            one row ([`to_row`]).

    Returns:
        A mask over [batch_size, 1, L + m, L + m]; over [1, 1, total, total] for `flex_attention` with `row_index`;
        `None` for an attention implementation that takes no mask.
    """
    with_corners = torch.nn.functional.pad(attention_mask.bool(), (0, num_corner_tokens), value=True)
    places = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    pooled = pooled_index.unsqueeze(-1)
    # what stands behind [EOT] is padding, whether or not the attention mask says so
    words = places < pooled if is_causal else places != pooled
    kinds = torch.nn.functional.pad(torch.where(words, WORD, POOLED), (0, num_corner_tokens), value=CORNER)
    if row_index is not None and config._attn_implementation == "flex_attention":
        texts = torch.arange(len(kinds), device=kinds.device).unsqueeze(-1).expand_as(kinds)
        texts, kinds, inputs_embeds = (to_row(states, row_index) for states in (texts, kinds, inputs_embeds))
        seen = packed_sequence_mask_function(texts)
    else:
        seen = padding_mask_function(with_corners)
    rule = and_masks(seen, corner_mask_function(kinds))
    arguments = {"config": config, "inputs_embeds": inputs_embeds, "attention_mask": None}
    if is_causal:  # the tokens of a text are in the same order in a row
        return create_causal_mask(**arguments, past_key_values=None, and_mask_function=rule)
    return create_bidirectional_mask(**arguments, and_mask_function=rule)


def to_row(states: torch.Tensor, row_index: torch.Tensor) -> torch.Tensor:
    """
    Texts without their padding, one behind the other.

    Args:
        states: [batch_size, length, ...]
        row_index: [total], the places to keep, counted through all texts, in ascending order.

    Returns:
        [1, total, ...]
    """
    return states.flatten(0, 1).index_select(0, row_index).unsqueeze(0)


def from_row(row: torch.Tensor, row_index: torch.Tensor, batch_size: int, length: int) -> torch.Tensor:
    """The inverse of [`to_row`]: [1, total, ...] -> [batch_size, length, ...] with zeros for padding."""
    padded = row.new_zeros(batch_size * length, *row.shape[2:])
    return padded.index_copy(0, row_index, row.squeeze(0)).unflatten(0, (batch_size, length))


def unpadded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_index: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    The attention implementation `unpadded`: everything but attention computes the texts' tokens in one row, without
    padding; here they are laid out for `sdpa`. Without `row_index` it is `sdpa`.

    Args:
        module: The attention layer.
        query: [1, heads, total, head_dim]
        key: As `query`.
        value: As `query`.
        attention_mask: [batch_size, 1, length, length], of the texts with padding.
        row_index: [total], see [`to_row`].
        kwargs: Further arguments of transformers' `sdpa_attention_forward`.

    Returns:
        [1, total, heads, head_dim], and no attention weights.
    """
    if row_index is None or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch_size, _, _, length = attention_mask.shape
    query, key, value = (
        from_row(states.transpose(1, 2), row_index, batch_size, length).transpose(1, 2)
        for states in (query, key, value)
    )
    # [batch_size, length, heads, head_dim]
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return to_row(output, row_index), None


AttentionInterface.register("unpadded", unpadded_attention)
AttentionMaskInterface.register("unpadded", sdpa_mask)
