"""LoTLIP's loss, symmetric InfoNCE between one image and several texts, as pure functions on embeddings."""

from typing import NamedTuple

import torch
from torch.nn import functional as F


class LoTLIPLoss(NamedTuple):
    """`loss` is the sum of the other two: the weighted shares of the short and of the long texts. Scalars."""

    loss: torch.Tensor
    loss_short: torch.Tensor
    loss_long: torch.Tensor


def contrastive_losses(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """
    Symmetric InfoNCE of the images with each of K sets of text features, every set a batch of its own.

    Args:
        image_embeds: [batch_size, dim], normalised.
        text_embeds: [batch_size, K, dim], normalised; row i belongs to image i.
        logit_scale: scalar factor on the cosine similarities (not its logarithm).

    Returns:
        [K], one loss for each set.
    """
    logits = logit_scale * torch.einsum("id,jkd->kij", image_embeds, text_embeds)  # [K, images, texts]
    num_sets, batch_size, _ = logits.shape
    targets = torch.arange(batch_size, device=logits.device).expand(num_sets, -1)
    # cross_entropy takes the classes in dimension 1: texts for each image, then images for each text
    per_image = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(-1)
    per_text = F.cross_entropy(logits, targets, reduction="none").mean(-1)
    return (per_image + per_text) / 2


def stack_features(text_embeds: torch.Tensor, corner_embeds: torch.Tensor | None) -> torch.Tensor:
    """
    The K = 1 + (T - 1)(m + 1) features that LoTLIP's loss is the mean over: the [CLS] features of the short and of the
    long texts, then the corner features of the long texts.

    Args:
        text_embeds: [batch_size, T, dim], [CLS] features, the short text first.
        corner_embeds: [batch_size, T - 1, m, dim], of the long texts, or `None` for m = 0.

    Returns:
        [batch_size, K, dim]
    """
    if corner_embeds is None:
        return text_embeds
    return torch.cat([text_embeds, corner_embeds.flatten(1, 2)], dim=1)


def weighted_loss(losses: torch.Tensor, short_loss_weight: float = 1.0, long_loss_weight: float = 1.0) -> LoTLIPLoss:
    """The weighted mean of the features' losses [K]: the first is the short text's, the others are the long ones'."""
    loss_short = short_loss_weight * losses[0] / len(losses)
    loss_long = long_loss_weight * losses[1:].sum() / len(losses)
    return LoTLIPLoss(loss_short + loss_long, loss_short, loss_long)


def lotlip_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    corner_embeds: torch.Tensor | None,
    logit_scale: torch.Tensor,
    short_loss_weight: float = 1.0,
    long_loss_weight: float = 1.0,
) -> LoTLIPLoss:
    """
    LoTLIP's loss: the mean over K features of the symmetric InfoNCE with the images. The first
    text of each image, the short one, gives its [CLS] feature; every other text gives its [CLS] feature and its m
    corner features, K = 1 + (T - 1)(m + 1).

    Args:
        image_embeds: [batch_size, dim], normalised.
        text_embeds: [batch_size, T, dim], normalised [CLS] features, the short text first.
        corner_embeds: [batch_size, T - 1, m, dim], normalised, of the long texts, or `None` for m = 0.
        logit_scale: scalar factor on the cosine similarities (not its logarithm).
        short_loss_weight: Weight of the short texts' share.
        long_loss_weight: Weight of the long texts' share.

    Returns:
        [`LoTLIPLoss`]: `loss`, `loss_short` and `loss_long`. With one text an image, `loss` is CLIP's times its
        weight.

    Raises:
        ValueError: if there are not as many images as sets of texts.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.modeling.loss_lotlip import lotlip_loss

    >>> images, texts = torch.eye(4), torch.eye(4)[:, None].expand(4, 3, 4)
    >>> lotlip_loss(images, texts, None, torch.tensor(100.0)).loss.item()
    0.0
    ```
    """
    if len(image_embeds) != len(text_embeds):
        raise ValueError(
            f"The loss pairs image i with the texts of row i: got {len(image_embeds)} images and {len(text_embeds)} "
            "rows of texts."
        )
    features = stack_features(text_embeds, corner_embeds)
    losses = contrastive_losses(image_embeds, features, logit_scale)
    return weighted_loss(losses, short_loss_weight, long_loss_weight)
