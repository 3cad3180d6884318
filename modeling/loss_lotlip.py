"""LoTLIP's loss, symmetric InfoNCE between one image and several texts, as pure functions on embeddings."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class LoTLIPLoss(NamedTuple):
    """`loss` is the sum of the other two: the weighted shares of the short and of the long texts. Scalars."""

    loss: Tensor
    loss_short: Tensor
    loss_long: Tensor


def contrastive_losses(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """
    Symmetric InfoNCE [K] of the images [B, D] with each of K sets of text features [B, K, D], every set a batch of its
    own. Features are normalised, row i belongs to image i; `logit_scale` is the factor itself, not its logarithm.
    """
    logits = logit_scale * torch.einsum("id,jkd->kij", image_embeds, text_embeds)  # [K, images, texts]
    num_sets, batch_size, _ = logits.shape
    targets = torch.arange(batch_size, device=logits.device).expand(num_sets, -1)
    # cross_entropy takes the classes in dimension 1: texts for each image, then images for each text
    per_image = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(-1)
    per_text = F.cross_entropy(logits, targets, reduction="none").mean(-1)
    return (per_image + per_text) / 2


def stack_features(text_embeds: Tensor, corner_embeds: Tensor | None) -> Tensor:
    """
    The features [B, K, D] that LoTLIP's loss is the mean over, K = 1 + (T - 1)(m + 1): those of the texts [B, T, D],
    the short one first, and of the long texts' corner tokens [B, T - 1, m, D].
    """
    if corner_embeds is None:
        return text_embeds
    return torch.cat([text_embeds, corner_embeds.flatten(1, 2)], dim=1)


def weighted_loss(losses: Tensor, short_loss_weight: float = 1.0, long_loss_weight: float = 1.0) -> LoTLIPLoss:
    """The weighted mean of the features' losses [K]: the first is the short text's, the others are the long ones'."""
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
    LoTLIP's loss: the mean over the features of [`stack_features`] of the symmetric InfoNCE with the images. With one
    text an image it is CLIP's.

    Args:
        image_embeds: [B, D], normalised; image i belongs to the texts of row i.
        text_embeds: [B, T, D], normalised, the short text first.
        corner_embeds: [B, T - 1, m, D], normalised, of the long texts, or `None` for m = 0.
        logit_scale: Factor on the cosine similarities (not its logarithm).
        short_loss_weight, long_loss_weight: Weights of the short and of the long texts' share.

    ```python
    >>> import torch
    >>> from lotlip_hf.modeling.loss_lotlip import lotlip_loss

    >>> images, texts = torch.eye(4), torch.eye(4)[:, None].expand(4, 3, 4)
    >>> lotlip_loss(images, texts, None, torch.tensor(100.0)).loss.item()
    0.0
    ```
    """
    if len(image_embeds) != len(text_embeds):
        raise ValueError(f"The loss is of pairs: got {len(image_embeds)} images and {len(text_embeds)} rows of texts.")
    losses = contrastive_losses(image_embeds, stack_features(text_embeds, corner_embeds), logit_scale)
    return weighted_loss(losses, short_loss_weight, long_loss_weight)
