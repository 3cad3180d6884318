"""Caption reward: how near a caption is to what a corpus says of the image."""

import os
from collections.abc import Iterable

from torch import Tensor
from torch.nn import functional as F

from ..encoder import Encoder, load_encoder
from ..images import ImageSource
from .clip_score import as_pairs


def caption_reward(
    images: Iterable[ImageSource],
    texts: Iterable[str],
    corpus: Iterable[str] | Tensor,
    encoder: Encoder | str | os.PathLike,
    *,
    sharpness: float = 100.0,
    cosine_weight: float = 0.5,
    image_weight: float = 0.0,
    scale: float = 100.0,
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """
    Computes the reward of CgtGAN (https://arxiv.org/abs/2308.12045) for captions of images. A caption is compared with
    an embedding that a corpus of texts has for the image, see [`aggregate`], so that it is not rewarded for being
    near to images in ways that texts are not.

    Args:
        images (`Iterable`): N images as paths, PIL images or arrays.
        texts (`Iterable[str]`): N captions; caption i describes image i.
        corpus (`Iterable[str]` or `torch.Tensor`): Texts, which need not belong to the images, or their embeddings
            [M, P].
        encoder (`Encoder` or `str` or `os.PathLike`): A dual encoder ([`~lotlip_hf.encoder.Encoder`]) or its folder or
            Hub id.
        sharpness (`float`, *optional*, defaults to 100.0): See [`aggregate`].
        cosine_weight (`float`, *optional*, defaults to 0.5): See [`caption_reward_of`].
        image_weight (`float`, *optional*, defaults to 0.0): See [`caption_reward_of`].
        scale (`float`, *optional*, defaults to 100.0): See [`caption_reward_of`].
        batch_size (`int`, *optional*, defaults to 32): Number of images, or of texts of maximum length, in a batch.
        progress (`bool`, *optional*, defaults to `False`): Whether to show progress bars.

    Returns:
        `torch.Tensor`: The rewards [N].

    Raises:
        `ValueError`: If the numbers of images and texts differ or are 0, or if the corpus is empty.
        `ImageError`: If an image cannot be read; the message names it.

    Example:

    ```python
    >>> from lotlip_hf.metrics import caption_reward

    >>> corpus = ["A cat sleeps.", "A dog runs.", "A red car."]
    >>> caption_reward(["photos/cat.png"] * 2, ["A cat sleeps.", "A bus."], corpus, "checkpoint").shape
    torch.Size([2])
    ```
    """
    images, texts = as_pairs(images, texts)
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder)
    options = {"batch_size": batch_size, "progress": progress}
    corpus_embeds = corpus if isinstance(corpus, Tensor) else encoder.encode_texts(corpus, **options)
    image_embeds, text_embeds = encoder.encode_images(images, **options), encoder.encode_texts(texts, **options)
    targets = aggregate(image_embeds, corpus_embeds, sharpness)
    weights = {"cosine_weight": cosine_weight, "image_weight": image_weight, "scale": scale}
    return caption_reward_of(text_embeds, targets, image_embeds, **weights)


def aggregate(image_embeds: Tensor, corpus_embeds: Tensor, sharpness: float = 100.0) -> Tensor:
    """
    Computes what a corpus says of images: the mean of its embeddings, weighted by the softmax of their similarity to
    the image.

    Args:
        image_embeds (`torch.Tensor`): Embeddings [N, P] of images.
        corpus_embeds (`torch.Tensor`): Embeddings [M, P] of texts.
        sharpness (`float`, *optional*, defaults to 100.0): Factor of the cosines in the softmax. The paper uses 100
            for captions of the same data and 175 for those of other data.

    Returns:
        `torch.Tensor`: Embeddings [N, P], not normalised.
    """
    if not len(corpus_embeds):
        raise ValueError("`corpus` is empty. Pass texts or their embeddings.")
    cosines = F.normalize(image_embeds, dim=-1) @ F.normalize(corpus_embeds, dim=-1).T
    return (sharpness * cosines).softmax(-1) @ corpus_embeds


def caption_reward_of(
    text_embeds: Tensor,
    targets: Tensor,
    image_embeds: Tensor,
    *,
    cosine_weight: float = 0.5,
    image_weight: float = 0.0,
    scale: float = 100.0,
) -> Tensor:
    """
    Computes [`caption_reward`] from embeddings: `scale * (w cos + (1 - w) (1 - d))`, with the cosine and the mean
    absolute difference d of caption and target.

    Args:
        text_embeds (`torch.Tensor`): Embeddings [N, P] of captions. The authors' are not normalised; their length
            changes d.
        targets (`torch.Tensor`): Targets [N, P] from [`aggregate`].
        image_embeds (`torch.Tensor`): Embeddings [N, P] of the images.
        cosine_weight (`float`, *optional*, defaults to 0.5): Weight w of the cosine against the difference.
        image_weight (`float`, *optional*, defaults to 0.0): Weight of the cosine of caption and image, against the
            rest.
        scale (`float`, *optional*, defaults to 100.0): Factor of the reward: in the paper, CLIP's logit scale.

    Returns:
        `torch.Tensor`: The rewards [N].
    """
    near = 1 - (targets - text_embeds).abs().mean(-1)
    to_target = cosine_weight * F.cosine_similarity(targets, text_embeds, dim=-1) + (1 - cosine_weight) * near
    to_image = F.cosine_similarity(image_embeds, text_embeds, dim=-1)
    return scale * ((1 - image_weight) * to_target + image_weight * to_image)
