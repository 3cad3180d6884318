"""CLIPScore: how well images match their texts, up to the maximum text length of the model."""

import os
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from ..encoder import Encoder, load_encoder, warn_of_cut_texts
from ..images import ImageSource

OnTruncation = Literal["warn", "raise"]


class CLIPScores(NamedTuple):
    """The scores [N] of N pairs (float32 on the CPU, from 0 to 100), their mean, and the number of truncated texts."""

    scores: torch.Tensor
    mean: float
    num_truncated: int


def clip_score(
    images: Iterable[ImageSource],
    texts: Iterable[str],
    encoder: Encoder | str | os.PathLike,
    *,
    on_truncation: OnTruncation = "warn",
    batch_size: int = 32,
    progress: bool = False,
) -> CLIPScores:
    """
    Computes the reference-free CLIPScore of each pair (Hessel et al., 2021, https://arxiv.org/abs/2104.08718, section
    3): `100 * max(cos(image, text), 0)`, with the cosine of their embeddings. Texts longer than the model's maximum
    length are truncated and counted.

    The factor 100 is that of torchmetrics. The paper uses 2.5, so divide by 40 to get its scale. The paper also
    prepends "A photo depicts " to each caption; do the same to compare with its numbers. Negative cosines are set to 0
    before the mean is taken, as in the paper; torchmetrics clamps the mean instead. Scores of different models are not
    comparable.

    Args:
        images (`Iterable`): N images as paths, PIL images or arrays.
        texts (`Iterable[str]`): N texts; text i describes image i.
        encoder (`Encoder` or `str` or `os.PathLike`): A dual encoder ([`~lotlip_hf.encoder.Encoder`]) or its folder or
            Hub id.
        on_truncation (`str`, *optional*, defaults to `"warn"`): What to do with texts that are too long: `"warn"`
            truncates them and logs their number, `"raise"` raises an error.
        batch_size (`int`, *optional*, defaults to 32): Number of images, or of texts of maximum length, in a batch.
        progress (`bool`, *optional*, defaults to `False`): Whether to show progress bars.

    Returns:
        `CLIPScores`: The scores in the order of `images`, their mean, and the number of truncated texts.

    Raises:
        `ValueError`: If the numbers of images and texts differ or are 0, if a text is not valid Unicode, or if a text
            is too long with `on_truncation="raise"`.
        `TypeError`: If `images` or `texts` is not a list, or a text is not a string.
        `ImageError`: If an image cannot be read; the message names it.

    Example:

    ```python
    >>> from lotlip_hf.metrics import clip_score

    >>> result = clip_score(["photos/dog.png"], ["A dog runs. " * 20], "checkpoint")
    >>> 0 <= result.mean <= 100
    True
    ```
    """
    if on_truncation not in get_args(OnTruncation):
        raise ValueError(f"`on_truncation` is {on_truncation!r}. Pass one of {', '.join(get_args(OnTruncation))}.")
    images, texts = as_pairs(images, texts)
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder)
    max_length = encoder.max_text_length
    text_embeds = torch.empty(len(texts), encoder.dim)
    cut: list[int] = []
    for index, embedding, was_cut in encoder.iterate_texts(texts, batch_size=batch_size, progress=progress):
        if was_cut and on_truncation == "raise":
            raise ValueError(
                f"texts[{index}] is longer than the model's maximum of {max_length} tokens. Shorten the text or pass "
                '`on_truncation="warn"`.'
            )
        text_embeds[index] = embedding
        cut += [index] if was_cut else []
    warn_of_cut_texts(len(cut), len(texts), max_length)
    image_embeds = encoder.encode_images(images, batch_size=batch_size, progress=progress)
    scores = 100 * (image_embeds * text_embeds).sum(1).clamp(min=0)
    return CLIPScores(scores, scores.double().mean().item(), len(cut))


def as_pairs(images: Iterable[ImageSource], texts: Iterable[str]) -> tuple[list[ImageSource], list[str]]:
    """Returns lists of N images and N texts, N > 0."""
    images, texts = _as_list("images", images), _as_list("texts", texts)
    if len(images) != len(texts) or not images:
        raise ValueError(
            f"Got {len(images)} images and {len(texts)} texts. Pass `images` and `texts` as lists of the same length, "
            "not empty."
        )
    return images, texts


def _as_list(name: str, items: Iterable[Any]) -> list[Any]:
    not_lists = str | bytes | os.PathLike | np.ndarray | torch.Tensor | Mapping | Set
    if isinstance(items, not_lists) or not isinstance(items, Iterable):
        raise TypeError(f"`{name}` is a {type(items).__name__}. Pass a list with one item for each pair.")
    return list(items)
