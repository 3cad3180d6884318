"""What the terms that compare images with short and long texts share."""

from collections.abc import Sequence

import torch
from torch import nn

from ...distributed import world_size
from ...modeling.loss_lotlip import stack_features, weighted_loss
from .views import Views

TILE_SIZE = 4096  # images and texts of a tile of similarities: 64 MB in float32
Sets = Sequence[torch.Tensor]


class Pairs(nn.Module):
    """
    The base of terms over all pairs of an image and a text, short or long, of all processes.

    Every process gathers the images, with gradients, and compares them with its own texts, one tile of similarities at
    a time. So the texts, K times as many as the images, are not gathered, no similarity is computed twice, and a
    process holds its embeddings, the images and a few tiles: the backward pass computes the tiles again.

    Args:
        short_loss_weight (`float`, *optional*, defaults to 1.0): weight of the short texts' share.
        long_loss_weight (`float`, *optional*, defaults to 1.0): weight of the long texts' share.

    Raises:
        ValueError: if a weight is below 0.
    """

    needs = frozenset({"image_embeds", "text_embeds", "corner_embeds"})

    def __init__(self, short_loss_weight: float = 1.0, long_loss_weight: float = 1.0) -> None:
        super().__init__()
        if short_loss_weight < 0 or long_loss_weight < 0:
            raise ValueError("`short_loss_weight` and `long_loss_weight` must be at least 0.")
        self.short_loss_weight, self.long_loss_weight = short_loss_weight, long_loss_weight

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """This process's shares, `short` and `long`."""
        images = views.logit_scale * views.all("image_embeds")  # [N, dim]
        text_sets = stack_features(views["text_embeds"], views.get("corner_embeds")).unbind(1)  # K of [b, dim]
        image_sets = [self.for_short_texts(images), *[images] * (len(text_sets) - 1)]
        losses = self.sums(image_sets, text_sets, views.own) * world_size() / len(images)
        loss = weighted_loss(losses, self.short_loss_weight, self.long_loss_weight)
        return {"short": loss.loss_short, "long": loss.loss_long}

    def for_short_texts(self, images: torch.Tensor) -> torch.Tensor:
        """[N, dim]: what the short texts are compared with in place of the images [N, dim]."""
        return images

    def sums(self, image_sets: Sets, text_sets: Sets, own: slice) -> torch.Tensor:
        """
        [K]: the losses summed over this process's images and texts.

        `image_sets` are K of [N, dim], the scaled images of all processes, those of this one at `own`; `text_sets` are
        K of [b, dim], this process's.
        """
        raise NotImplementedError


def tiles_of(vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows of the tiles."""
    return vectors.split(TILE_SIZE)
