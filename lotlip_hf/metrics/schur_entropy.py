"""Schur complement entropy: the diversity of images that their texts do not explain."""

import os
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoder import Encoder, load_encoder
from ..images import ImageSource
from .clip_score import as_pairs


def schur_entropy(
    images: Iterable[ImageSource],
    texts: Iterable[str],
    encoder: Encoder | str | os.PathLike,
    *,
    sigma: float | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> float:
    """
    Computes the Schur complement entropy of images and the texts that they were made from (SCE,
    https://arxiv.org/abs/2412.18645): how diverse the images are beyond what their texts say. See
    [`schur_entropy_of`].

    Args:
        images (`Iterable`): N images as paths, PIL images or arrays.
        texts (`Iterable[str]`): N texts; text i belongs to image i. N should be well above the dimension of the
            embeddings, or the texts explain all images.
        encoder (`Encoder` or `str` or `os.PathLike`): A dual encoder ([`~lotlip_hf.encoder.Encoder`]) or its folder or
            Hub id.
        sigma (`float`, *optional*): Width of a Gaussian kernel, 3.5 in the paper. By default, the kernel is the
            cosine.
        batch_size (`int`, *optional*, defaults to 32): Number of images, or of texts of maximum length, in a batch.
        progress (`bool`, *optional*, defaults to `False`): Whether to show progress bars.

    Returns:
        `float`: The entropy, from 0 for images that are linear in the texts.

    Raises:
        `ValueError`: If the numbers of images and texts differ or are 0.
        `ImageError`: If an image cannot be read; the message names it.

    Example:

    ```python
    >>> from lotlip_hf.metrics import schur_entropy

    >>> schur_entropy(["photos/cat.png", "photos/dog.png"], ["a cat", "a cat"], "checkpoint") > 0
    True
    ```
    """
    images, texts = as_pairs(images, texts)
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder)
    image_embeds = encoder.encode_images(images, batch_size=batch_size, progress=progress)
    text_embeds = encoder.encode_texts(texts, batch_size=batch_size, progress=progress)
    return schur_entropy_of(image_embeds, text_embeds, sigma=sigma)


def schur_entropy_of(
    image_embeds: Tensor, text_embeds: Tensor, *, sigma: float | None = None, num_features: int = 2500, seed: int = 0
) -> float:
    """
    Computes [`schur_entropy`] from embeddings: with the covariances C of images (y) and texts (x), the entropy
    `-sum(e * log(e / sum(e)))` of the eigenvalues e of `C_yy - C_yx C_xx^-1 C_xy`. They add up to 1 if the texts
    explain nothing.

    Args:
        image_embeds (`torch.Tensor`): Embeddings [N, P] of the images, normalised.
        text_embeds (`torch.Tensor`): Embeddings [N, P] of the texts.
        sigma (`float`, *optional*): Width of a Gaussian kernel. By default, the kernel is the inner product.
        num_features (`int`, *optional*, defaults to 2500): Number of random frequencies for the Gaussian kernel. The
            number of images should be well above twice this number.
        seed (`int`, *optional*, defaults to 0): Seed of the frequencies.

    Returns:
        `float`: The entropy.
    """
    embeds = [image_embeds.double(), text_embeds.double()]
    if sigma is not None:
        generator = torch.Generator().manual_seed(seed)
        frequencies = torch.randn(embeds[0].shape[1], num_features, generator=generator, dtype=torch.double)
        phases = [one @ (frequencies / sigma).to(one.device) for one in embeds]
        embeds = [torch.cat([one.cos(), one.sin()], dim=1) / num_features**0.5 for one in phases]
    images, texts = embeds
    residuals = images - texts @ text_part(images, texts)
    values = torch.linalg.svdvals(residuals).square() / len(images)  # eigenvalues of their covariance
    values = values[values > 1e-12]
    return float(-(values * (values / values.sum()).log()).sum().clamp(max=0)) + 0.0


def text_part(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """
    Finds the linear map from texts to what they explain of their images, by least squares.

    Args:
        image_embeds (`torch.Tensor`): Embeddings [N, P] of images.
        text_embeds (`torch.Tensor`): Embeddings [N, P] of texts; text i belongs to image i.

    Returns:
        `torch.Tensor`: The map A [P, P], so that `text_embeds @ A` is near `image_embeds`.
    """
    return torch.linalg.pinv(text_embeds, rtol=1e-6) @ image_embeds


def without_text(embeds: Tensor, text_embeds: Tensor, part: Tensor | None = None) -> Tensor:
    """
    Removes from embeddings what a text says.

    Args:
        embeds (`torch.Tensor`): Embeddings [..., P].
        text_embeds (`torch.Tensor`): Embedding [P] of the text, or [..., P] with one for each of `embeds`.
        part (`torch.Tensor`, *optional*): What texts explain of images, from [`text_part`] of many pairs; the result
            is then `embeds - text_embeds @ part`, the embedding of SCE. By default, the result is the projection of
            `embeds` to what is orthogonal to the text. The cosine of a projected query with an image orders images as
            the inner product with projected images does.

    Returns:
        `torch.Tensor`: Embeddings [..., P], not normalised.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.metrics import without_text

    >>> without_text(torch.tensor([0.6, 0.8]), torch.tensor([1.0, 0.0])).tolist()
    [0.0, 0.800000011920929]
    ```
    """
    if part is not None:
        return embeds - text_embeds @ part
    unit = F.normalize(text_embeds, dim=-1)
    return embeds - (embeds * unit).sum(-1, keepdim=True) * unit
