"""Direction between two sets of images: what the first has and the second has not."""

import os
from collections.abc import Iterable

from torch import Tensor
from torch.nn import functional as F

from ..encoder import Encoder, load_encoder
from ..images import ImageSource


def direction(
    like: Iterable[ImageSource],
    unlike: Iterable[ImageSource],
    encoder: Encoder | str | os.PathLike,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """
    Computes the direction from one set of images to another (RAVE, https://arxiv.org/abs/2404.01889): the difference
    of the means of their embeddings. The cosine of an image's embedding with it says which set the image is like.

    Args:
        like (`Iterable`): Images as paths, PIL images or arrays.
        unlike (`Iterable`): The other images. Without any, the direction is the mean of `like`.
        encoder (`Encoder` or `str` or `os.PathLike`): A dual encoder ([`~lotlip_hf.encoder.Encoder`]) or its folder or
            Hub id.
        batch_size (`int`, *optional*, defaults to 32): Number of images in a batch.
        progress (`bool`, *optional*, defaults to `False`): Whether to show progress bars.

    Returns:
        `torch.Tensor`: The direction [P], normalised, to search with ([`~lotlip_hf.search.ImageIndex`]).

    Raises:
        `ValueError`: If both sets are empty, or if their means are the same.
        `ImageError`: If an image cannot be read; the message names it.

    Example:

    ```python
    >>> from lotlip_hf.metrics import direction

    >>> direction(["photos/cat.png"], ["photos/dog.png"], "checkpoint").norm().round().item()
    1.0
    ```
    """
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder)
    options = {"batch_size": batch_size, "progress": progress}
    return direction_of(encoder.encode_images(like, **options), encoder.encode_images(unlike, **options))


def direction_of(like: Tensor, unlike: Tensor) -> Tensor:
    """
    Computes [`direction`] from embeddings.

    Args:
        like (`torch.Tensor`): Embeddings [N, P].
        unlike (`torch.Tensor`): Embeddings [M, P]. One of N and M may be 0.

    Returns:
        `torch.Tensor`: The direction [P], normalised.
    """
    if not len(like) + len(unlike):
        raise ValueError("`like` and `unlike` are both empty. Pass embeddings in at least one of them.")
    means = [embeds.mean(0) if len(embeds) else embeds.new_zeros(embeds.shape[1:]) for embeds in (like, unlike)]
    return checked_direction(means[0] - means[1], "`like` and `unlike` have the same mean")


def checked_direction(vector: Tensor, reason: str) -> Tensor:
    """Normalises a vector that is not 0 up to rounding errors."""
    if vector.norm() < 1e-5:
        raise ValueError(f"{reason}, so there is no direction to compare with.")
    return F.normalize(vector, dim=-1)
