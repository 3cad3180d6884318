"""The attention mask of LoTLIP's corner tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def corner_mask_function(num_tokens: int, pooled_index: torch.Tensor, is_causal: bool = False) -> Callable:
    """
    The rule of the LoTLIP paper's corner tokens, over a sequence of `num_tokens` text tokens followed by the corner
    tokens: words and the pooled token see every text token and no corner; a corner sees itself and every word, but
    neither the pooled token nor another corner.

    Args:
        num_tokens: Length of the text part L; positions from there on are corner tokens.
        pooled_index: [batch_size], where the token stands that the text's feature is read off: [CLS] (0 unless the
            text is padded on the left), or [EOT] of a causal encoder.
        is_causal: Whether the encoder is causal. What stands behind [EOT] then is padding, which no corner sees.

    Returns:
        A function (batch, head, query, key) -> bool for transformers' `and_mask_function`.
    """

    def allowed(
        batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        corner_query, corner_key = q_idx >= num_tokens, kv_idx >= num_tokens
        to_itself = q_idx == kv_idx
        pooled = pooled_index[batch_idx]
        to_pooled = kv_idx >= pooled if is_causal else kv_idx == pooled
        return (~corner_key & ~(corner_query & to_pooled)) | to_itself

    return allowed


def create_corner_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
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
        attention_mask: [batch_size, L], 1 for text and 0 for padding; `None` for no padding.
        num_corner_tokens: m.
        pooled_index: [batch_size], see [`corner_mask_function`].
        is_causal: Whether the backbone is causal.

    Returns:
        A mask over [batch_size, 1, L + m, L + m]; `None` for an attention implementation that takes no mask.
    """
    if attention_mask is not None:
        attention_mask = torch.nn.functional.pad(attention_mask.bool(), (0, num_corner_tokens), value=True)
    rule = corner_mask_function(inputs_embeds.shape[1] - num_corner_tokens, pooled_index, is_causal)
    arguments = {"config": config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
    if is_causal:
        return create_causal_mask(**arguments, past_key_values=None, and_mask_function=rule)
    return create_bidirectional_mask(**arguments, and_mask_function=rule)
