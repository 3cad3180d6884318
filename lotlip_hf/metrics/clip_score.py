"""CLIPScore: how well images fit their texts, of any length that the model takes."""

import os
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from transformers import PreTrainedModel

from ..encoding import encode_images, iterate_text_embeddings, load_model, max_text_length, warn_of_cut_texts
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
    model: PreTrainedModel | str | os.PathLike,
    processor: Any | None = None,
    *,
    on_truncation: OnTruncation = "warn",
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> CLIPScores:
    """
    CLIPScore without references (Hessel et al., 2021, https://arxiv.org/abs/2104.08718, section 3): for each pair
    `100 * max(cos(image, text), 0)`, where cos is the cosine of the model's embeddings.

    The factor 100 is torchmetrics'; the paper has 2.5, so divide by 40 for its scale. The paper also writes "A photo
    depicts " before each caption: do so in `texts` to compare with its numbers. Each pair is clipped at 0 before the
    mean is taken, as in the paper; torchmetrics clips the mean. Scores of different models do not compare.

    Args:
        images: N images: paths, PIL images or arrays.
        texts: N texts; text i is about image i.
        model: A [`LoTLIPModel`], a `CLIPModel` or another dual encoder with its feature functions, or the folder or
            Hub id of one.
        processor: The model's processor; read from the folder where `model` is one.
        on_truncation: What to do about texts longer than the model takes: `"warn"`, cut them, log how many and score
            the rest of each; or `"raise"`.
        batch_size: Images, and texts of full length, in a batch.
        device: Where to compute; by default where the model is, and for a folder the accelerator, if there is one.
        progress: Whether to show progress bars.

    Returns:
        The scores in the order of `images`, their mean, and the number of texts that were cut.

    Raises:
        ValueError: if there are not as many texts as images or none, if a processor is missing, or on texts too long
            with `on_truncation="raise"`.
        TypeError: if `images` or `texts` is no list.
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
    if isinstance(model, str | os.PathLike):
        if processor is not None:
            raise ValueError("`processor` is read from the folder that `model` names: leave it out.")
        model, processor = load_model(model, device=device)
    elif processor is None:
        raise ValueError(f"`processor` is missing: give that of the {type(model).__name__}, or `model` as a folder.")

    rows: dict[int, torch.Tensor] = {}
    truncated = []
    for index, embedding, was_cut in iterate_text_embeddings(
        model, processor, texts, batch_size=batch_size, device=device, progress=progress
    ):
        rows[index] = embedding
        if was_cut:
            truncated.append(index)
    max_length = max_text_length(model, getattr(processor, "tokenizer", processor))
    if truncated and on_truncation == "raise":
        places = ", ".join(map(str, sorted(truncated)[:5])) + (", ..." if len(truncated) > 5 else "")
        raise ValueError(
            f"{len(truncated)} of {len(texts)} texts are longer than the {max_length} tokens that the model takes "
            f"(texts {places}): shorten them, or take a model with more positions."
        )
    warn_of_cut_texts(len(truncated), len(texts), max_length)
    text_embeds = torch.stack([rows[index] for index in range(len(texts))])
    image_embeds = encode_images(model, processor, images, batch_size=batch_size, device=device, progress=progress)
    scores = 100 * (image_embeds * text_embeds).sum(1).clamp(min=0)
    return CLIPScores(scores, scores.double().mean().item(), len(truncated))


def _as_list(name: str, items: Iterable[Any]) -> list[Any]:
    if isinstance(items, str | os.PathLike) or not isinstance(items, Iterable):
        raise TypeError(f"`{name}` must be a list, one item for each pair; got one {type(items).__name__}.")
    return list(items)
