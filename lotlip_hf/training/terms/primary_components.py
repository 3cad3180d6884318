"""Long-CLIP's term: InfoNCE whose short texts meet the images' principal components."""

import torch

from .infonce import InfoNCE


class PrimaryComponents(InfoNCE):
    """
    Long-CLIP's "primary component matching" (https://arxiv.org/abs/2403.15378): [`InfoNCE`] that compares the short
    texts with the images as their batch's first principal components tell them.

    Args:
        num_components (`int`, *optional*, defaults to 32): components to keep, as many as in Long-CLIP.
        short_loss_weight, long_loss_weight, label_smoothing: see [`InfoNCE`].
    """

    def __init__(
        self,
        num_components: int = 32,
        short_loss_weight: float = 1.0,
        long_loss_weight: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(short_loss_weight, long_loss_weight, label_smoothing)
        if num_components < 1:
            raise ValueError(f"`num_components` must be at least 1, got {num_components}.")
        self.num_components = num_components

    def for_short_texts(self, images: torch.Tensor) -> torch.Tensor:
        """See [`Pairs.for_short_texts`]."""
        return primary_components(images, self.num_components)


def primary_components(image_embeds: torch.Tensor, num_components: int) -> torch.Tensor:
    """
    The mean of the images [N, dim], and what of the difference to it lies in the first components. The result is not
    normalised again, as in Long-CLIP.

    The gradient passes through the projection; the components themselves are constants, for the derivative of a
    component has no bound where two singular values meet, as all those of a small batch do at zero.
    """
    mean = image_embeds.mean(0, keepdim=True)
    centred = image_embeds - mean
    with torch.no_grad():
        components = torch.linalg.svd(centred, full_matrices=False).Vh[:num_components]  # [q, dim]
    return mean + centred @ components.t() @ components
