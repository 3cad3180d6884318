"""Which patches a training step keeps: A-CLIP's choice by the attention of the class token."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..modeling.modeling_lotlip import LoTLIPModel, LoTLIPVisionModel

FIRST_ROW = "first_row"  # name of an attention implementation


def first_row_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the attention of `sdpa`, and the weights [B, heads, 1, L] of the first token alone."""
    kwargs.pop("output_attentions", None)  # `sdpa` warns of it
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return output, (scale * query[:, :, :1] @ key.transpose(-2, -1)).softmax(-1, dtype=torch.float32)


AttentionInterface.register(FIRST_ROW, first_row_attention)


def check_attention(tower: LoTLIPVisionModel) -> None:
    """
    Raises a `ValueError` if it is unknown which patches an image tower attends to: that of a family without
    `kept_patches`, or one with neither a class token nor SigLIP's attention pooling, or for images of any shape.
    """
    family, model_type = tower.config.family, tower.config.backbone_config.model_type
    if family.passing_embeddings is None or model_type == "siglip2_vision_model":
        raise ValueError(f"`patch_choice` attention does not fit {model_type}. Set `patch_choice` to random.")
    if tower.config.image_token_centers is not None:
        raise ValueError("`patch_choice` attention needs all layers to see the patches. Unset `image_token_centers`.")
    if not family.has_class_token and tower.config.pooling != "pooler":
        raise ValueError(
            f"`patch_choice` attention needs a class token or the pooling `pooler`, which {model_type} with the "
            f"pooling {tower.config.pooling!r} has not. Set `patch_choice` to random."
        )


def attention_scores(model: LoTLIPModel, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes how much an image tower attends to each patch: the attention of the class token, averaged over the heads
    and the layers. For SigLIP, which has no class token, that of its pooling.

    Args:
        model (`LoTLIPModel`): The model.
        **inputs (`torch.Tensor`): Arguments of `get_image_features`, such as `pixel_values` [B, 3, H, W].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The scores [B, P] in float32, and the embeddings [B, dim], normalised.

    Raises:
        `ValueError`: If the image tower does not fit (see [`check_attention`]).

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.scenes.small import small_model
    >>> from lotlip_hf.training.keeping import attention_scores, kept_by_score

    >>> model, _ = small_model()
    >>> scores, _ = attention_scores(model, pixel_values=torch.randn(2, 3, 64, 64))
    >>> kept_by_score(scores, (3, 3), share=0.5).shape
    torch.Size([2, 5])
    ```
    """
    tower = model.vision_model
    check_attention(tower)
    if tower.config.family.has_class_token:
        with _first_rows(tower):
            outputs = model.get_image_features(**inputs, output_attentions=True)
        first = tower.config.family.num_prefix_tokens(tower.backbone)
        scores = torch.stack([one[:, :, 0, first:].mean(1) for one in outputs.attentions]).mean(0)
    else:
        rows: list[torch.Tensor] = []
        pooling = tower.backbone.head.attention
        with pooling.register_forward_hook(lambda module, args, output: rows.append(output[1])):
            outputs = model.get_image_features(**inputs)
        scores = rows[0][:, 0].float()
    return scores, F.normalize(outputs.pooler_output.float(), dim=-1)


@contextmanager
def _first_rows(tower: LoTLIPVisionModel) -> Iterator[None]:
    """Computes the attention of the first token for the time of the context."""
    config = tower.backbone.config
    former = config._attn_implementation
    config._attn_implementation = FIRST_ROW
    try:
        yield
    finally:
        config._attn_implementation = former


def scores_of_view(scores: torch.Tensor, grid: tuple[int, int], box: torch.Tensor) -> torch.Tensor:
    """
    Crops the scores of an image to a view of it, and resizes them bilinearly to the same grid.

    Args:
        scores (`torch.Tensor`): Scores [B, P] of the patches, row by row.
        grid (`tuple[int, int]`): Rows and columns of patches, P in all.
        box (`torch.Tensor`): Left, top, right and bottom edge [B, 4] of the view, as shares of the image's width and
            height. If right is less than left, the view is a mirror image.

    Returns:
        `torch.Tensor`: Scores [B, P].
    """
    left, top, right, bottom = box.to(scores).unsqueeze(1).unbind(-1)  # each [B, 1]
    down, across = ((torch.arange(side, device=scores.device) + 0.5) / side for side in grid)
    y, x = top + (bottom - top) * down, left + (right - left) * across  # centres of the patches [B, side]
    points = torch.stack([x.unsqueeze(1).expand(-1, grid[0], -1), y.unsqueeze(2).expand(-1, -1, grid[1])], dim=-1)
    maps = scores.unflatten(1, (1, *grid))
    return F.grid_sample(maps, 2 * points - 1, padding_mode="border", align_corners=False).flatten(1)


def kept_by_score(scores: torch.Tensor, grid: tuple[int, int], share: float) -> torch.Tensor:
    """
    Chooses the patches with the highest scores, as A-CLIP does: blocks of 2 x 2 patches by their mean, or single
    patches if a side of the grid is odd.

    Args:
        scores (`torch.Tensor`): Scores [B, P] of the patches, row by row.
        grid (`tuple[int, int]`): Rows and columns of patches, P in all.
        share (`float`): Share of the blocks to keep, rounded up.

    Returns:
        `torch.Tensor`: Indices [B, K] of the kept patches, ascending.
    """
    size = 2 if all(side % 2 == 0 for side in grid) else 1
    blocks = F.avg_pool2d(scores.unflatten(1, (1, *grid)), size)  # [B, 1, rows, columns]
    number = max(1, math.ceil(round(share * blocks[0].numel(), 6)))
    best = blocks.flatten(1).topk(number).indices
    is_kept = torch.zeros_like(blocks.flatten(1)).scatter(1, best, 1).view_as(blocks)
    is_kept = is_kept.repeat_interleave(size, 2).repeat_interleave(size, 3).flatten(1)
    return is_kept.nonzero()[:, 1].view(len(scores), -1)
