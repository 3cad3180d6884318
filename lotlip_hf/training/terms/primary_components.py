"""Long-CLIP's term: InfoNCE whose short texts meet the images' principal components."""

import torch

from .infonce import TILE_SIZE, InfoNCE


class PrimaryComponents(InfoNCE):
    """
    [`InfoNCE`] that compares the short texts with the images' first principal components ([`primary_components`]) in
    place of the images.

    Args:
        num_components (`int`, *optional*, defaults to 32): components to keep.
        short_loss_weight (`float`, *optional*, defaults to 1.0): see [`InfoNCE`], as for the others.
        long_loss_weight (`float`, *optional*, defaults to 1.0): weight of the long texts' share.
        label_smoothing (`float`, *optional*, defaults to 0.0): share of the target that is spread evenly.
        tile_size (`int`, *optional*, defaults to 4096): images and texts in a tile of similarities.

    Raises:
        ValueError: if an option is out of range.
    """

    def __init__(
        self,
        num_components: int = 32,
        short_loss_weight: float = 1.0,
        long_loss_weight: float = 1.0,
        label_smoothing: float = 0.0,
        tile_size: int = TILE_SIZE,
    ) -> None:
        super().__init__(short_loss_weight, long_loss_weight, label_smoothing, tile_size)
        if num_components < 1:
            raise ValueError(f"`num_components` must be at least 1, got {num_components}.")
        self.num_components = num_components

    def for_short_texts(self, images: torch.Tensor) -> torch.Tensor:
        """The principal components of the images [N, dim]."""
        return primary_components(images, self.num_components)


def primary_components(image_embeds: torch.Tensor, num_components: int) -> torch.Tensor:
    """
    The images as their batch's first principal components tell them: Long-CLIP's "primary component matching"
    (https://arxiv.org/abs/2403.15378), which matches short texts with these in place of the images. As
    there, the result is not normalised again.

    The gradient passes through the projection; the components themselves are constants, for the derivative of a
    component has no bound where two singular values meet, as all those of a small batch do at zero.

    Args:
        image_embeds: [batch_size, dim]; across processes the gathered ones.
        num_components: How many components to keep; 32 in Long-CLIP.

    Returns:
        [batch_size, dim]: the mean, and what of the difference to it lies in the components.

    Raises:
        ValueError: if `num_components` is below 1.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.training.terms.primary_components import primary_components

    >>> images = torch.tensor([[2.0, 0.1], [-2.0, 0.1], [0.0, -0.2]])
    >>> primary_components(images, 1).allclose(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 0.0]]))
    True
    ```
    """
    if num_components < 1:
        raise ValueError(f"`num_components` must be at least 1, got {num_components}.")
    mean = image_embeds.mean(0, keepdim=True)
    centred = image_embeds - mean
    with torch.no_grad():
        # half precision has no SVD
        full = centred.to(torch.promote_types(centred.dtype, torch.float32))
        components = torch.linalg.svd(full, full_matrices=False).Vh[:num_components].to(centred)  # [q, dim]
    return mean + centred @ components.t() @ components
