"""Who sees a corner token: nobody but itself. And whom a corner token sees: the words."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import and_masks, packed_sequence_mask_function, padding_mask_function

from .fast_paths_lotlip import to_row

if TYPE_CHECKING:
    from .backbones_lotlip import TextBackbone

CORNER, POOLED, WORD = 0, 1, 2


def corner_mask_function(kinds: torch.Tensor) -> Callable:
    """
    The rule of the LoTLIP paper's corner tokens: text tokens see every text token and no corner; a corner sees itself
    and every word, but no other corner and not the pooled token. Padding and other texts are for other rules to hide.

    Args:
        kinds: [N, length], `WORD` for the tokens that corners see, `POOLED` for text that they do not, and `CORNER`.

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
    family: "TextBackbone",
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    num_corner_tokens: int,
    pooled_index: torch.Tensor,
    row_index: torch.Tensor | None = None,
) -> Any:
    """
    The masks in the form that the backbone's attention implementation takes: additive for `eager`, boolean for `sdpa`
    and `unpadded`, a block mask for `flex_attention`.

    Args:
        family: The family of the backbone, which makes the masks of the rule.
        config: Configuration of the backbone, which names the attention implementation.
        inputs_embeds: [N, L + m, hidden_size], text tokens followed by the m corner tokens; only its shape, dtype and
            device count.
        attention_mask: [N, L], 1 for text and 0 for padding.
        num_corner_tokens: m.
        pooled_index: [N], the index of the token that is pooled.
        row_index: [total], the tokens of [N, L + m] that are no padding, if the backbone gets these alone, in one row.

    Returns:
        A mask over [N, 1, L + m, L + m]; over [1, 1, total, total] for `flex_attention` with `row_index`; a
        dictionary of masks for a family whose layers are of several types.
    """
    seen = torch.nn.functional.pad(attention_mask.bool(), (0, num_corner_tokens), value=True)
    index, pooled = torch.arange(attention_mask.shape[-1], device=attention_mask.device), pooled_index.unsqueeze(-1)
    # what stands behind a causal text's last token is padding, whether or not the attention mask says so
    words = index < pooled if family.is_causal else index != pooled
    kinds = torch.nn.functional.pad(torch.where(words, WORD, POOLED), (0, num_corner_tokens), value=CORNER)
    if row_index is not None and config._attn_implementation == "flex_attention":
        texts = torch.arange(len(kinds), device=kinds.device).unsqueeze(-1).expand_as(kinds)
        texts, kinds, inputs_embeds = (to_row(states, row_index) for states in (texts, kinds, inputs_embeds))
        same_text = packed_sequence_mask_function(texts)
    else:
        same_text = padding_mask_function(seen)

    def is_corner(
        batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        return kinds[batch_idx, q_idx] == CORNER

    return family.create_masks(config, inputs_embeds, and_masks(same_text, corner_mask_function(kinds)), is_corner)
