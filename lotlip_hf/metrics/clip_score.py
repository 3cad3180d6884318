"""CLIPScore: how well images fit their texts, of any length that the model takes."""

import os
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from ..encoder import Encoder, load_encoder, warn_of_cut_texts
from ..images import ImageSource

OnTruncation = Literal["warn", "raise"]


class CLIPScores(NamedTuple):
    """The scores [N] of N pairs, float32 on the CPU, from 0 to 100; their mean; how many texts were cut."""

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
    CLIPScore without references (Hessel et al., 2021, https://arxiv.org/abs/2104.08718, section 3): for each pair
    `100 * max(cos(image, text), 0)`, where cos is the cosine of the model's embeddings. A text of more tokens than the
    model takes is cut there, and counted.

    The factor 100 is torchmetrics'; the paper has 2.5, so divide by 40 for its scale. The paper also writes "A photo
    depicts " before each caption: do so in `texts` to compare with its numbers. Each pair is clipped at 0 before the
    mean is taken, as in the paper; torchmetrics clips the mean. Scores of different models do not compare.

    Args:
        images: N images: paths, PIL images or arrays.
        texts: N texts; text i is about image i.
        encoder: A dual encoder ([`~lotlip_hf.encoder.Encoder`]), or the folder or Hub id of one.
        on_truncation: What to do about texts longer than the model takes: `"warn"`, cut them, log how many and score
            what is left of each; or `"raise"`.
        batch_size: Images, and texts of full length, in a batch.
        progress: Whether to show progress bars.

    Returns:
        The scores in the order of `images`, their mean, and the number of texts that were cut.

    Raises:
        ValueError: if there are not as many texts as images or none, on a text that is not valid Unicode, or on texts
            too long with `on_truncation="raise"`.
        TypeError: if `images` or `texts` is no list, or a text is no string.
        ImageError: if an image cannot be read; the message names it.

    Example:

    ```python
    >>> from lotlip_hf.metrics import clip_score

    >>> result = clip_score(["dog.png"], ["A dog runs. " * 20], "path/to/checkpoint")  # doctest: +SKIP
    >>> print(f"{result.mean:.2f}")  # doctest: +SKIP
    ```
    """
    if on_truncation not in get_args(OnTruncation):
        raise ValueError(f"`on_truncation` must be one of {', '.join(get_args(OnTruncation))}, got {on_truncation!r}.")
    images, texts = _as_list("images", images), _as_list("texts", texts)
    if len(images) != len(texts) or not images:
        raise ValueError(
            f"`images` and `texts` must be lists of the same length, one or more; got {len(images)} images and "
            f"{len(texts)} texts."
        )
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder)
    max_length = encoder.max_text_length
    text_embeds = torch.empty(len(texts), encoder.dim)
    cut: list[int] = []
    for index, embedding, was_cut in encoder.iterate_texts(texts, batch_size=batch_size, progress=progress):
        if was_cut and on_truncation == "raise":
            raise ValueError(
                f"texts[{index}] is longer than the {max_length} tokens that the model takes: shorten it."
            )
        text_embeds[index] = embedding
        cut += [index] if was_cut else []
    warn_of_cut_texts(len(cut), len(texts), max_length)
    image_embeds = encoder.encode_images(images, batch_size=batch_size, progress=progress)
    scores = 100 * (image_embeds * text_embeds).sum(1).clamp(min=0)
    return CLIPScores(scores, scores.double().mean().item(), len(cut))


def _as_list(name: str, items: Iterable[Any]) -> list[Any]:
    not_lists = str | bytes | os.PathLike | np.ndarray | torch.Tensor | Mapping | Set
    if isinstance(items, not_lists) or not isinstance(items, Iterable):
        raise TypeError(f"`{name}` must be a list, one item for each pair; got one {type(items).__name__}.")
    return list(items)
