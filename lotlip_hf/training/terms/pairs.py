"""The base class of terms that compare images with short and long texts."""

from collections.abc import Sequence

import torch
from torch import nn

from ...distributed import world_size
from ...modeling.loss_lotlip import stack_features, weighted_loss
from .views import Views

TILE_SIZE = 4096  # images and texts in a tile of similarities, 64 MB in float32
Sets = Sequence[torch.Tensor]


class Pairs(nn.Module):
    """
    The base class of terms that compare every image with every text, over all processes.

    Every process gathers the image embeddings of all processes, with gradients, and compares them with its own texts
    in tiles of similarities. Texts are not gathered, because there are K times as many. The backward pass computes the
    tiles again, so that a process stores only its own embeddings, all images and a few tiles.

    Args:
        short_loss_weight (`float`, *optional*, defaults to 1.0): Weight of the part for short texts.
        long_loss_weight (`float`, *optional*, defaults to 1.0): Weight of the part for long texts.

    Raises:
        `ValueError`: If a weight is below 0.
    """

    needs = frozenset({"image_embeds", "text_embeds", "corner_embeds"})

    def __init__(self, short_loss_weight: float = 1.0, long_loss_weight: float = 1.0) -> None:
        super().__init__()
        if short_loss_weight < 0 or long_loss_weight < 0:
            raise ValueError(
                "`short_loss_weight` and `long_loss_weight` must be at least 0, got "
                f"{short_loss_weight} and {long_loss_weight}."
            )
        self.short_loss_weight, self.long_loss_weight = short_loss_weight, long_loss_weight

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Returns the shares of this process in the parts `short` and `long`."""
        images = views.logit_scale * views.all("image_embeds")  # [N, dim]
        text_sets = stack_features(views["text_embeds"], views.get("corner_embeds")).unbind(1)  # K tensors [b, dim]
        image_sets = [self.for_short_texts(images), *[images] * (len(text_sets) - 1)]
        positives = self.positives(image_sets, views)
        losses = self.sums(image_sets, text_sets, positives, views) * world_size() / len(images)
        loss = weighted_loss(losses, self.short_loss_weight, self.long_loss_weight)
        return {"short": loss.loss_short, "long": loss.loss_long}

    def for_short_texts(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the images [N, dim] that the short texts are compared with. Subclasses may change them."""
        return images

    def positives(self, image_sets: Sets, views: Views) -> Sets:
        """Returns the image [b, dim] that matches each text of this process, K times. Subclasses may change it."""
        return [images[views.own] for images in image_sets]

    def sums(self, image_sets: Sets, text_sets: Sets, positives: Sets, views: Views) -> torch.Tensor:
        """
        Returns K losses [K], each summed over the images and texts of this process.

        `image_sets` are K tensors [N, dim] with the scaled images of all processes; `views.own` is the slice of this
        process in them. `text_sets` and `positives` are K tensors [b, dim] with the texts of this process and the
        images that match them.
        """
        raise NotImplementedError


def tiles_of(vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Splits the rows of a matrix into tiles."""
    return vectors.split(TILE_SIZE)
