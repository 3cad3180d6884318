"""LoTLIP's loss on embeddings: symmetric InfoNCE between each image and several texts."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class LoTLIPLoss(NamedTuple):
    """The `loss` and its two weighted parts, `loss_short` and `loss_long`, which add up to it. All are scalars."""

    loss: Tensor
    loss_short: Tensor
    loss_long: Tensor


def contrastive_losses(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """
    Symmetric InfoNCE losses [K] of images [B, D] with K batches of texts, [B, K, D]. All embeddings are normalised,
    and row i belongs to image i. `logit_scale` is the factor on the similarities, not its logarithm.
    """
    logits = logit_scale * torch.einsum("id,jkd->kij", image_embeds, text_embeds)  # [K, images, texts]
    num_sets, batch_size, _ = logits.shape
    targets = torch.arange(batch_size, device=logits.device).expand(num_sets, -1)
    per_image = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(-1)
    per_text = F.cross_entropy(logits, targets, reduction="none").mean(-1)
    return (per_image + per_text) / 2


def stack_features(text_embeds: Tensor, corner_embeds: Tensor | None) -> Tensor:
    """Stacks [B, T, D] and [B, T - 1, m, D] to [B, K, D], K = 1 + (T - 1)(m + 1), the short text first."""
    if corner_embeds is None:
        return text_embeds
    return torch.cat([text_embeds, corner_embeds.flatten(1, 2)], dim=1)


def weighted_loss(losses: Tensor, short_loss_weight: float = 1.0, long_loss_weight: float = 1.0) -> LoTLIPLoss:
    """Weighted mean of the losses [K]. The first loss is the short text's, all others are the long texts'."""
    loss_short = short_loss_weight * losses[0] / len(losses)
    loss_long = long_loss_weight * losses[1:].sum() / len(losses)
    return LoTLIPLoss(loss_short + loss_long, loss_short, loss_long)


def lotlip_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    corner_embeds: Tensor | None,
    logit_scale: Tensor,
    short_loss_weight: float = 1.0,
    long_loss_weight: float = 1.0,
) -> LoTLIPLoss:
    """
    LoTLIP's loss: the mean of the symmetric InfoNCE over the embeddings of [`stack_features`]. With one text per
    image, LoTLIP's loss equals CLIP's.

    Args:
        image_embeds (`torch.Tensor`): Normalised image embeddings [B, D]. Image i belongs to the texts of row i.
        text_embeds (`torch.Tensor`): Normalised text embeddings [B, T, D], the short text first.
        corner_embeds (`torch.Tensor` or `None`): Normalised corner embeddings of the long texts [B, T - 1, m, D].
        logit_scale (`torch.Tensor`): Factor on the cosine similarities, not its logarithm.
        short_loss_weight, long_loss_weight (`float`, *optional*, defaults to 1.0): Weights of the loss's two parts.

    ```python
    >>> import torch
    >>> from lotlip_hf.modeling.loss_lotlip import lotlip_loss
    >>> embeds = torch.eye(4)
    >>> lotlip_loss(embeds, embeds[:, None].expand(4, 3, 4), None, torch.tensor(100.0)).loss.item()
    0.0
    ```
    """
    if len(image_embeds) != len(text_embeds):
        raise ValueError(f"Got {len(image_embeds)} images and {len(text_embeds)} rows of texts. Pass a row per image.")
    losses = contrastive_losses(image_embeds, stack_features(text_embeds, corner_embeds), logit_scale)
    return weighted_loss(losses, short_loss_weight, long_loss_weight)
