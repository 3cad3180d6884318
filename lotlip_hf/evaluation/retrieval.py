"""Retrieval between images and texts, by exact search over blocks of similarities."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn import functional as F

# Images and texts of one block of similarities: 16 MB in float32.
BLOCK_SIZE = 2048
# Cosine similarities closer than this are ties. Rounding in float32, which differs with the place in a batch and the
# padding of a text, moves them by a few 1e-7.
TIE_TOLERANCE = 1e-6


class Places(NamedTuple):
    """
    Where each query's match stands among all candidates, both [N]: behind `better` candidates, and somewhere among the
    `tied` ones, itself included, that are as similar as it is.
    """

    better: torch.Tensor
    tied: torch.Tensor


def recalls(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, ks: Sequence[int] = (1, 5, 10), block_size: int = BLOCK_SIZE
) -> dict[str, float]:
    """
    Recall at k in both directions: the share of images whose text is among the k texts most similar to them, and the
    share of texts whose image is. Text i belongs to image i; similarity is the cosine, in float32 or better.

    Candidates as similar as the match come in random order: the result is the expected recall. So a model that gives
    everything the same embedding scores k/N, as guessing does, and so do captions that several images share.

    Args:
        image_embeds: [N, dim], on any device.
        text_embeds: [N, dim], on the same device.
        ks: Numbers of candidates to look at.
        block_size: Images and texts in a block of similarities, which is all that is held of them.

    Returns:
        `image_to_text_r1`, `text_to_image_r1` and so on for each k, from 0 to 1.

    Raises:
        ValueError: if the shapes differ or are empty, if an embedding holds NaN or infinity, and on numbers below 1.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.evaluation.retrieval import recalls

    >>> recalls(torch.eye(4), torch.eye(4), ks=[1])
    {'image_to_text_r1': 1.0, 'text_to_image_r1': 1.0}
    >>> recalls(torch.eye(4), torch.ones(4, 4), ks=[1])
    {'image_to_text_r1': 0.25, 'text_to_image_r1': 0.25}
    ```
    """
    if image_embeds.dim() != 2 or image_embeds.shape != text_embeds.shape or 0 in image_embeds.shape:
        raise ValueError(
            "`image_embeds` and `text_embeds` must both have shape [N, dim], text i belonging to image i; got "
            f"{list(image_embeds.shape)} and {list(text_embeds.shape)}."
        )
    for name, value in (("block_size", block_size), *(("ks", k) for k in ks)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        _check_finite(name, embeds, block_size)

    with _full_precision(image_embeds.device.type):
        pairs = zip(_blocks(image_embeds, block_size), _blocks(text_embeds, block_size), strict=True)
        matches = torch.cat([(images * texts).sum(1) for images, texts in pairs])
        image_places, text_places = _places(image_embeds, text_embeds, matches, matches, block_size)
    results = {}
    for k in ks:
        results[f"image_to_text_r{k}"] = _recall(image_places, k)
        results[f"text_to_image_r{k}"] = _recall(text_places, k)
    return results


def _places(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_matches: torch.Tensor,
    text_matches: torch.Tensor,
    block_size: int,
) -> tuple[Places, Places]:
    """
    The places of the images' matches among the texts, and of the texts' among the images. `image_matches` [I] and
    `text_matches` [T] are how similar each one's match is to it. A block of similarities serves both directions.
    """

    def new(matches: torch.Tensor) -> Places:
        return Places(*torch.zeros(2, len(matches), dtype=torch.int64, device=matches.device))

    def count(similarities: torch.Tensor, matches: torch.Tensor, places: Places) -> None:
        """`similarities` [candidates, queries]; `matches` and the places [queries] of the same queries."""
        better = (similarities > matches + TIE_TOLERANCE).sum(0)
        places.better.add_(better)
        places.tied.add_((similarities >= matches - TIE_TOLERANCE).sum(0) - better)

    image_places, text_places = new(image_matches), new(text_matches)
    first_image = 0
    for images in _blocks(image_embeds, block_size):
        own_images = slice(first_image, first_image + len(images))
        first_text = 0
        for texts in _blocks(text_embeds, block_size):
            own_texts = slice(first_text, first_text + len(texts))
            similarities = images @ texts.t()  # [images, texts]
            count(similarities.t(), image_matches[own_images], Places(*(part[own_images] for part in image_places)))
            count(similarities, text_matches[own_texts], Places(*(part[own_texts] for part in text_places)))
            first_text = own_texts.stop
        first_image = own_images.stop
    return image_places, text_places


def _recall(places: Places, k: int) -> float:
    """The mean probability that a match is among the first k, where those tied with it come in random order."""
    # the match is itself among the tied, but for rounding beyond the tolerance, as in spaces of very many dimensions
    better, tied = (part.cpu().double() for part in places)
    return ((k - better) / tied.clamp(min=1)).clamp(0, 1).mean().item()


def _blocks(embeds: torch.Tensor, block_size: int) -> Iterator[torch.Tensor]:
    """The embeddings [block_size, dim] at a time, normalised, in float32 or better."""
    for block in embeds.split(block_size):
        yield F.normalize(block.detach().to(torch.promote_types(block.dtype, torch.float32)), dim=-1)


def _check_finite(name: str, embeds: torch.Tensor, block_size: int) -> None:
    first = 0
    for block in embeds.split(block_size):
        finite = block.isfinite().all(1)
        if not finite.all():
            row = first + int(finite.int().argmin())
            raise ValueError(f"`{name}` hold NaN or infinity, first in row {row} of {len(embeds)}.")
        first += len(block)


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Neither autocast nor the products in TF32 or bfloat16 that a training run may have allowed."""
    has_backends = hasattr(torch.backends, "fp32_precision")  # torch 2.9; it refuses the older functions after the new
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if has_backends else ()
    precisions = [backend.fp32_precision for backend in backends]
    precision = None if has_backends else torch.get_float32_matmul_precision()
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if precision is not None:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, own in zip(backends, precisions, strict=True):
            backend.fp32_precision = own
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
