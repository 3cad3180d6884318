"""The paper's term: symmetric InfoNCE of the images with the short and the long texts, in tiles of similarities."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ...distributed import max_over_ranks, sum_over_ranks, world_size
from ...modeling.loss_lotlip import stack_features, weighted_loss
from .views import Views

# Images and texts of one tile of similarities: 64 MB in float32.
TILE_SIZE = 4096


class InfoNCE(nn.Module):
    """
    LoTLIP's loss over the whole batch of all processes.

    Every process gathers the images, with gradients, and compares them with its own texts, one tile of similarities at
    a time. Text-to-image sums are complete locally; image-to-text sums are all-reduced. So the texts, K times as many
    as the images, are not gathered, no similarity is computed twice, and a process holds its embeddings, the images
    and a few tiles: the backward pass computes the tiles again.

    Args:
        short_loss_weight (`float`, *optional*, defaults to 1.0): weight of the short texts' share.
        long_loss_weight (`float`, *optional*, defaults to 1.0): weight of the long texts' share.
        label_smoothing (`float`, *optional*, defaults to 0.0): share of the target that is spread evenly over the
            batch, as in `torch.nn.functional.cross_entropy`. Long-CLIP trains with 0.1.
        tile_size (`int`, *optional*, defaults to 4096): images and texts in a tile of similarities.

    Raises:
        ValueError: if an option is out of range.
    """

    needs = frozenset({"image_embeds", "text_embeds", "corner_embeds"})

    def __init__(
        self,
        short_loss_weight: float = 1.0,
        long_loss_weight: float = 1.0,
        label_smoothing: float = 0.0,
        tile_size: int = TILE_SIZE,
    ) -> None:
        super().__init__()
        check_options(short_loss_weight, long_loss_weight, tile_size)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be at least 0 and below 1, got {label_smoothing}.")
        self.short_loss_weight, self.long_loss_weight = short_loss_weight, long_loss_weight
        self.label_smoothing, self.tile_size = label_smoothing, tile_size

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """
        Args:
            views ([`Views`]): `image_embeds` [b, dim], `text_embeds` [b, T, dim], the short text first, and, if the
                model has corner tokens, `corner_embeds` [b, T - 1, m, dim] of the long texts, all normalised.

        Returns:
            `dict[str, torch.Tensor]`: this process's shares, `short` and `long`.
        """
        images = views.logit_scale * views.all("image_embeds")  # [N, dim]
        text_sets = split_texts(views)
        image_sets = [self.for_short_texts(images), *[images] * (len(text_sets) - 1)]
        sums = contrastive_sums(image_sets, text_sets, views.own, self.tile_size, self.label_smoothing)
        return weighted_shares(sums, len(images), self.short_loss_weight, self.long_loss_weight)

    def for_short_texts(self, images: torch.Tensor) -> torch.Tensor:
        """What the short texts are compared with: the images [N, dim]."""
        return images


def check_options(short_loss_weight: float, long_loss_weight: float, tile_size: int) -> None:
    """Raises a `ValueError` on a negative weight or an empty tile."""
    for name, weight in (("short_loss_weight", short_loss_weight), ("long_loss_weight", long_loss_weight)):
        if weight < 0:
            raise ValueError(f"`{name}` must be at least 0, got {weight}.")
    if tile_size < 1:
        raise ValueError(f"`tile_size` must be at least 1, got {tile_size}.")


def split_texts(views: Views) -> tuple[torch.Tensor, ...]:
    """K of [b, dim]: this process's features of the texts, the short ones' first."""
    return stack_features(views["text_embeds"], views.get("corner_embeds")).unbind(1)


def weighted_shares(
    sums: torch.Tensor, num_images: int, short_loss_weight: float, long_loss_weight: float
) -> dict[str, torch.Tensor]:
    """The weighted means over the `num_images` of all processes, from this process's sums [K]."""
    loss = weighted_loss(sums * world_size() / num_images, short_loss_weight, long_loss_weight)
    return {"short": loss.loss_short, "long": loss.loss_long}


def contrastive_sums(
    image_sets: Sequence[torch.Tensor],
    text_sets: Sequence[torch.Tensor],
    own: slice,
    tile_size: int,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """
    The symmetric InfoNCE summed over this process's images and texts.

    Args:
        image_sets (`Sequence[torch.Tensor]`): K of [N, dim], the scaled images of all processes.
        text_sets (`Sequence[torch.Tensor]`): K of [b, dim], this process's texts.
        own (`slice`): which of the images belong to this process's texts.
        tile_size (`int`): images and texts in a tile of similarities.
        label_smoothing (`float`, *optional*, defaults to 0.0): share of the target that is spread over the batch.

    Returns:
        `torch.Tensor` of shape `[K]`: the sums.
    """
    per_image, per_text, matches = [], [], []
    for images, texts in zip(image_sets, text_sets, strict=True):
        image_sums, text_sums = _LogSumExps.apply(images, texts, tile_size)  # pyright: ignore[reportGeneralTypeIssues]
        per_image.append(image_sums)
        per_text.append(text_sums)
        match = (images[own] * texts).sum()
        if label_smoothing:  # the mean similarity of each image and text with all others needs no tile
            spread = (images.sum(0) * texts.sum(0)).sum() / len(images)
            match = (1 - label_smoothing) * match + label_smoothing * spread
        matches.append(match)
    # what the images make of the texts of the other processes
    own_sums = torch.stack(per_image)  # [K, N]
    largest = max_over_ranks(own_sums)
    image_sums = largest + sum_over_ranks((own_sums - largest).exp()).log()
    return (image_sums[:, own].sum(1) + torch.stack(per_text).sum(1)) / 2 - torch.stack(matches)


class _LogSumExps(torch.autograd.Function):
    """[N], [b]: the logarithms of the sums over the rows and over the columns of exp(images @ texts.t()), in tiles."""

    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, texts: torch.Tensor, tile_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.tile_size = tile_size
        per_image, per_text = [], []
        for image_tile in images.split(tile_size):
            # one tile serves both directions: its rows are a part of the images' sums, its columns of the texts'
            sums = [_log_sum_exps(image_tile @ text_tile.t()) for text_tile in texts.split(tile_size)]
            per_image.append(torch.stack([rows for rows, _ in sums]).logsumexp(0))
            per_text.append(torch.cat([columns for _, columns in sums]))
        answers = torch.cat(per_image), torch.stack(per_text).logsumexp(0)
        ctx.save_for_backward(images, texts, *answers)
        return answers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        images, texts, *sums = ctx.saved_tensors
        image_grads, text_grads = torch.zeros_like(images), torch.zeros_like(texts)
        with torch.autocast(images.device.type, enabled=False):
            of_images = [part.split(ctx.tile_size) for part in (images, image_grads, sums[0], grads[0])]
            of_texts = [part.split(ctx.tile_size) for part in (texts, text_grads, sums[1], grads[1])]
            for image_tile, image_grad, image_sums, image_weights in zip(*of_images, strict=True):
                for text_tile, text_grad, text_sums, text_weights in zip(*of_texts, strict=True):
                    tile = image_tile @ text_tile.t()
                    # the derivative of a sum's logarithm is the softmax
                    grad = (tile - image_sums.unsqueeze(1)).exp_().mul_(image_weights.unsqueeze(1))
                    grad += tile.sub_(text_sums).exp_().mul_(text_weights)
                    image_grad.addmm_(grad, text_tile)
                    text_grad.addmm_(grad.t(), image_tile)
        return image_grads, text_grads, None


def _log_sum_exps(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.logsumexp(1), logits.logsumexp(0)
