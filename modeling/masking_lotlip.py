"""The attention mask of LoTLIP's corner tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def corner_mask_function(seen_by_corners: torch.Tensor, attention_mask: torch.Tensor) -> Callable:
    """
    The rule of the LoTLIP paper's corner tokens, over a text's L tokens followed by m corner tokens: text tokens see
    every text token and no corner; a corner sees itself and every word, but no other corner and not the pooled token.
    Nobody sees padding.

    Args:
        seen_by_corners: [batch_size, L], `True` for the words.
        attention_mask: [batch_size, L + m], `False` for padding.

    Returns:
        A function (batch, head, query, key) -> bool for transformers' `and_mask_function`.
    """
    num_tokens = seen_by_corners.shape[-1]

    def allowed(
        batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        # a lookup for any key: that of a corner finds the last token, and is ruled out by itself
        word = seen_by_corners[batch_idx, kv_idx.clamp(max=num_tokens - 1)]
        seen = ((kv_idx < num_tokens) & (word | (q_idx < num_tokens))) | (q_idx == kv_idx)
        return seen & attention_mask[batch_idx, kv_idx]

    return allowed


def create_corner_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    num_corner_tokens: int,
    pooled_index: torch.Tensor,
    is_causal: bool = False,
) -> "torch.Tensor | BlockMask | None":
    """
    The mask in the form that the backbone's attention implementation takes: additive for `eager`, boolean for `sdpa`,
    a block mask for `flex_attention`.

    Args:
        config: Configuration of the backbone, which names the attention implementation.
        inputs_embeds: [batch_size, L + m, hidden_size], text tokens followed by the m corner tokens; only its shape,
            dtype and device count.
        attention_mask: [batch_size, L], 1 for text and 0 for padding.
        num_corner_tokens: m.
        pooled_index: [batch_size], where the token stands that the text's feature is read off: [CLS] (0 unless the
            text is padded on the left), or [EOT] of a causal backbone.
        is_causal: Whether the backbone is causal.

    Returns:
        A mask over [batch_size, 1, L + m, L + m]; `None` for an attention implementation that takes no mask.
    """
    with_corners = torch.nn.functional.pad(attention_mask.bool(), (0, num_corner_tokens), value=True)
    places = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    pooled = pooled_index.unsqueeze(-1)
    # what stands behind [EOT] is padding, whether or not the attention mask says so
    rule = corner_mask_function(places < pooled if is_causal else places != pooled, with_corners)
    arguments = {"config": config, "inputs_embeds": inputs_embeds, "attention_mask": None}
    if is_causal:
        return create_causal_mask(**arguments, past_key_values=None, and_mask_function=rule)
    return create_bidirectional_mask(**arguments, and_mask_function=rule)
