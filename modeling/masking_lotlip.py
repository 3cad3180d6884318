"""The attention mask of LoTLIP's corner tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def corner_mask_function(num_tokens: int, cls_index: torch.Tensor) -> Callable:
    """
    The rule of the LoTLIP paper's corner tokens, over a sequence of `num_tokens` text tokens followed by the corner
    tokens: words and [CLS] see every text token and no corner; a corner sees itself and every word, but neither [CLS]
    nor another corner.

    Args:
        num_tokens: Length of the text part L; positions from there on are corner tokens.
        cls_index: [batch_size], where [CLS] stands in each text (0 unless the text is padded on the left).

    Returns:
        A function (batch, head, query, key) -> bool for transformers' `and_mask_function`.
    """

    def allowed(
        batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        corner_query, corner_key = q_idx >= num_tokens, kv_idx >= num_tokens
        to_itself = q_idx == kv_idx
        to_cls = kv_idx == cls_index[batch_idx]
        return (~corner_key & ~(corner_query & to_cls)) | to_itself

    return allowed


def create_corner_mask(
    config: PreTrainedConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, num_corner_tokens: int
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

    Returns:
        A mask over [batch_size, 1, L + m, L + m]; `None` for an attention implementation that takes no mask.
    """
    text_mask = attention_mask.bool()
    with_corners = torch.nn.functional.pad(text_mask, (0, num_corner_tokens), value=True)
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=with_corners,
        and_mask_function=corner_mask_function(text_mask.shape[-1], text_mask.int().argmax(-1)),
    )
