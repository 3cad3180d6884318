"""
The attention mask of the LoTLIP paper's corner tokens. Text tokens attend to all text tokens and to no corner token. A
corner token attends to itself and to all words, but not to other corner tokens and not to the pooled token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.masking_utils import and_masks, packed_sequence_mask_function, padding_mask_function
from transformers.utils.generic import is_flash_attention_requested

from .backbones_lotlip import TextBackbone, is_eager_on_cpu
from .fast_paths_lotlip import Row, to_row

CORNER, POOLED, WORD = 0, 1, 2
# Number of words whose sliding windows are computed together in a row.
WINDOW_BLOCK = 256


def create_corner_mask(
    family: TextBackbone,
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    is_text: Tensor,
    pooled_index: Tensor,
    row: Row | None = None,
) -> Any:
    """
    The mask for `inputs_embeds` [N, L + m, hidden_size], which are texts followed by m corner tokens, or preceded by
    them for families with `corners_first`. `is_text` [N, L] is 0 for padding, and `pooled_index` [N] is the index of
    the pooled token. The mask has the form that the backbone needs: [N, 1, L + m, L + m]; [1, 1, total, total] for
    `flex_attention` over a `row`; or a dictionary of such masks by type of layer. For `unpadded` attention over a
    `row`, which has masks of its own, only the masks of sliding windows are not empty.
    """
    if is_flash_attention_requested(config):
        raise ValueError(
            "Flash attention cannot mask corner tokens. Load the model with attn_implementation='sdpa' or "
            "'flex_attention', or pass output_corner_embeds=False."
        )
    num_corners = inputs_embeds.shape[1] - is_text.shape[1]
    corners = (num_corners, 0) if family.corners_first else (0, num_corners)
    if family.corners_first and is_eager_on_cpu(is_text) and (is_text.int().diff() > 0).any():
        raise ValueError("This text encoder needs padding on the right. Set `tokenizer.padding_side='right'`.")
    index, pooled = torch.arange(is_text.shape[1], device=is_text.device), pooled_index.unsqueeze(-1)
    # In a causal encoder, tokens after the pooled token are padding, even without an attention mask.
    words = index < pooled if family.is_causal else index != pooled
    if row is not None and config._attn_implementation == "unpadded":
        row.mask_corners(is_text, words, num_corners)
        return _window_masks(family, config, inputs_embeds, row)
    kinds = pad(torch.where(words, WORD, POOLED), corners, value=CORNER)
    if row is not None:
        texts = torch.arange(kinds.shape[0], device=kinds.device).unsqueeze(-1).expand_as(kinds)
        texts, kinds, inputs_embeds = (to_row(states, row.index) for states in (texts, kinds, inputs_embeds))
        seen = packed_sequence_mask_function(texts)
    else:
        seen = padding_mask_function(pad(is_text.bool(), corners, value=True))

    def rule(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        lowest_seen = torch.where(kinds[batch_idx, q_idx] == CORNER, WORD, POOLED)
        return (kinds[batch_idx, kv_idx] >= lowest_seen) | (q_idx == kv_idx)

    def is_corner(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kinds[batch_idx, q_idx] == CORNER

    return family.create_masks(config, inputs_embeds, and_masks(seen, rule), is_corner)


def _window_masks(family: TextBackbone, config: PreTrainedConfig, inputs_embeds: Tensor, row: Row) -> Any:
    """
    For layers with sliding windows, the mask [1, 1, WINDOW_BLOCK, keys] of consecutive words and of the keys in their
    windows. Sets `row.left`, the number of keys before the first word. For other layers, an empty tensor.
    """
    window = family.window(config)
    everything = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=inputs_embeds.device)
    if window is None or row.groups[0].length <= window:
        return everything

    def rule(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx == q_idx

    def is_corner(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx != q_idx

    masks = family.create_masks(config, inputs_embeds.new_empty(1, WINDOW_BLOCK + 2 * window, 1), rule, is_corner)
    mask = masks["sliding_attention"] if isinstance(masks, dict) else masks
    block = mask[:, :, window : window + WINDOW_BLOCK]
    first, last = block[0, 0].any(0).nonzero().flatten()[[0, -1]].tolist()
    row.left, block = window - first, block[..., first : last + 1]
    if not isinstance(masks, dict):
        return block
    return {name: block if name == "sliding_attention" else everything for name in masks}
