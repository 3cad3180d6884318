"""CLIPScore: how well images fit their texts, of any length that the model takes."""

import os
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from ..encoder import (
    TEXT_CHUNK,
    _check_text,
    encode_images,
    iterate_text_embeddings,
    load_model,
    max_text_length,
    warn_of_cut_texts,
)
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
    `100 * max(cos(image, text), 0)`, where cos is the cosine of the model's embeddings. A text of more tokens than the
    model takes is cut there, and counted.

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
            what is left of each; or `"raise"`, before anything is computed.
        batch_size: Images, and texts of full length, in a batch.
        device: Where to compute; by default where the model is, and for a folder the accelerator, if there is one.
        progress: Whether to show progress bars.

    Returns:
        The scores in the order of `images`, their mean, and the number of texts that were cut.

    Raises:
        ValueError: if there are not as many texts as images or none, if the model has no feature functions, if a
            processor is missing or lacks a part, on a text that is not valid Unicode, or on
            texts too long with `on_truncation="raise"`.
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
    if isinstance(model, str | os.PathLike):
        if processor is not None:
            raise ValueError("`processor` is read from the folder that `model` names: leave it out.")
        model, processor = load_model(model, device=device)
    elif processor is None:
        raise ValueError(f"`processor` is missing: give that of the {type(model).__name__}, or `model` as a folder.")
    if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
        raise ValueError(
            f"`model` is a {type(model).__name__}, without `get_text_features` and `get_image_features`: expected a "
            "dual encoder, such as LoTLIPModel or CLIPModel, or the folder of one."
        )
    if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
        raise ValueError(
            f"`processor` is a {type(processor).__name__}: expected one with `tokenizer` and `image_processor`."
        )
    max_length = max_text_length(model, processor.tokenizer)
    if on_truncation == "raise":
        _refuse_long_texts(texts, model, processor.tokenizer, max_length)

    rows: dict[int, torch.Tensor] = {}
    num_truncated = 0
    for index, embedding, was_cut in iterate_text_embeddings(
        model, processor, texts, batch_size=batch_size, device=device, progress=progress
    ):
        rows[index] = embedding
        num_truncated += was_cut
    warn_of_cut_texts(num_truncated, len(texts), max_length)
    text_embeds = torch.stack([rows[index] for index in range(len(texts))])
    image_embeds = encode_images(model, processor, images, batch_size=batch_size, device=device, progress=progress)
    scores = 100 * (image_embeds * text_embeds).sum(1).clamp(min=0)
    return CLIPScores(scores, scores.double().mean().item(), num_truncated)


def _as_list(name: str, items: Iterable[Any]) -> list[Any]:
    not_lists = str | bytes | os.PathLike | np.ndarray | torch.Tensor | Mapping | Set
    if isinstance(items, not_lists) or not isinstance(items, Iterable):
        raise TypeError(f"`{name}` must be a list, one item for each pair; got one {type(items).__name__}.")
    return list(items)


def _refuse_long_texts(texts: list[str], model: PreTrainedModel, tokenizer: Any, max_length: int) -> None:
    """Raises a `ValueError` if a text has more than `max_length` tokens; says what sets that length."""
    too_long = []
    for start in range(0, len(texts), TEXT_CHUNK):
        chunk = texts[start : start + TEXT_CHUNK]
        for index, text in enumerate(chunk, start):
            _check_text(text, index)
        encoded = tokenizer(chunk, truncation=False, verbose=False)["input_ids"]
        too_long += [index for index, input_ids in enumerate(encoded, start) if len(input_ids) > max_length]
    if not too_long:
        return
    places = ", ".join(map(str, too_long[:5])) + (", ..." if len(too_long) > 5 else "")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions == max_length:
        limit, remedy = "model's positions allow", "take a model with more positions"
    else:
        limit, remedy = "tokenizer's `model_max_length` allows", "raise that as far as the model takes it"
    raise ValueError(
        f"{len(too_long)} of {len(texts)} texts are longer than the {max_length} tokens that the {limit} (texts "
        f"{places}): shorten them, or {remedy}."
    )
