"""The term of Long-CLIP: InfoNCE that compares short texts with principal components of the images."""

import torch

from .infonce import InfoNCE


class PrimaryComponents(InfoNCE):
    """
    The "primary component matching" of Long-CLIP (https://arxiv.org/abs/2403.15378). Like [`InfoNCE`], but short texts
    are compared with images that are reduced to the first principal components of the batch.

    Args:
        num_components (`int`, *optional*, defaults to 32): Number of components. Long-CLIP uses 32.
        short_loss_weight, long_loss_weight, label_smoothing, equal_positives (`float` or `bool`, *optional*): See
            [`InfoNCE`].
    """

    def __init__(
        self,
        num_components: int = 32,
        short_loss_weight: float = 1.0,
        long_loss_weight: float = 1.0,
        label_smoothing: float = 0.0,
        equal_positives: bool = False,
    ) -> None:
        super().__init__(short_loss_weight, long_loss_weight, label_smoothing, equal_positives)
        if num_components < 1:
            raise ValueError(f"`num_components` must be at least 1, got {num_components}.")
        self.num_components = num_components

    def for_short_texts(self, images: torch.Tensor) -> torch.Tensor:
        return primary_components(images, self.num_components)


def primary_components(image_embeds: torch.Tensor, num_components: int) -> torch.Tensor:
    """
    Projects images [N, dim] onto their mean plus their first principal components. As in Long-CLIP, the result is not
    normalised again.

    Gradients flow through the projection, but the components are constants. The derivative of a component is unbounded
    if two singular values are equal, and in a small batch several are 0.
    """
    mean = image_embeds.mean(0, keepdim=True)
    centred = image_embeds - mean
    with torch.no_grad():
        components = torch.linalg.svd(centred, full_matrices=False).Vh[:num_components]  # [q, dim]
    return mean + centred @ components.t() @ components
