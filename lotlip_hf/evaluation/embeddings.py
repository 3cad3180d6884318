"""Embeddings for an evaluation, distributed over processes and cached on disk."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..distributed import gather_lists, rank, world_size
from ..encoder import Encoder, warn_of_cut_texts
from ..files import printable
from ..images import ImageError, ImageSource, image_digest
from ..store import CUT, WHOLE, EmbeddingStore, text_digest
from ..terminal import progress_bar
from .tasks import IncompleteDataError

logger = logging.getLogger(__name__)

# Number of texts or images that one process encodes and caches together. Units do not depend on the number of
# processes, so the embeddings do not depend on it either.
UNIT_SIZE = 256


class TextEmbeddings(NamedTuple):
    """Embeddings [N, P] of N texts (normalised, float32 on the CPU), and the mask of truncated texts, bool [N]."""

    embeds: torch.Tensor
    was_cut: torch.Tensor


# Embeddings [n, P] and stamps (see `EmbeddingStore.add`) of the n items of a unit, or `None` if one cannot be read
Unit = tuple[np.ndarray, list[str]] | None


def embed_texts(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    cache: str | os.PathLike | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    fingerprint: str | None = None,
    warn: bool = True,
    progress: bool = True,
) -> TextEmbeddings:
    """
    Encodes texts like [`Encoder.encode_texts`], but duplicates only once. With several processes (`accelerate
    launch`), each process encodes a share of the texts and returns all embeddings, identical to those of one process.

    Args:
        encoder (`Encoder`): The dual encoder.
        texts (`Sequence[str]`): N texts.
        cache (`str` or `os.PathLike`, *optional*): Folder for the cache. Embeddings are written as they are computed,
            so the same call continues after an interruption. The cache is specific to the encoder's fingerprint.
        batch_size (`int`, *optional*, defaults to 64): Number of texts of maximum length in a batch.
        max_length (`int`, *optional*): Maximum length of a text in tokens. Defaults to the model's maximum.
        fingerprint (`str`, *optional*): Fingerprint of the encoder for texts, if known.
        warn (`bool`, *optional*, defaults to `True`): Whether to log the number of truncated texts.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `TextEmbeddings`: The embeddings in the order of `texts`, and the mask of truncated texts.

    Raises:
        `TypeError`: If a text is not a string.
        `ValueError`: If a text is not valid Unicode or `max_length` is out of range.
        `OSError`: If the cache cannot be written.
    """
    unique = sorted(set(texts), key=lambda text: (-len(text), text))  # texts of a unit have similar lengths
    length = max_length or encoder.max_text_length

    def encode(unit: range) -> Unit:
        rows = {
            index: (embedding, was_cut)
            for index, embedding, was_cut in encoder.iterate_texts(
                [unique[i] for i in unit], batch_size=batch_size, max_length=max_length
            )
        }
        ordered = [rows[index] for index in range(len(unit))]
        return torch.stack([row for row, _ in ordered]).numpy(), [CUT if was_cut else WHOLE for _, was_cut in ordered]

    made_by = ""
    if cache is not None:
        made_by = f"text-{fingerprint or encoder.fingerprint('text')}-{encoder.device.type}-{length}"
    digests = list(map(text_digest, unique))
    embeds, stamps = _embed_units(encode, digests, cache, made_by, encoder.dim, progress, "text")
    indices = {text: index for index, text in enumerate(unique)}
    order = [indices[text] for text in texts]
    was_cut = torch.tensor([stamps[index] == CUT for index in order])
    if warn and rank() == 0:
        warn_of_cut_texts(int(was_cut.sum()), len(texts), length)
    return TextEmbeddings(embeds[order], was_cut)


def embed_images(
    encoder: Encoder,
    images: Sequence[ImageSource],
    *,
    names: Sequence[str] | None = None,
    digests: Sequence[str] | None = None,
    cache: str | os.PathLike | None = None,
    batch_size: int = 32,
    fingerprint: str | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """
    Encodes images like [`Encoder.encode_images`], with processes and a cache as in [`embed_texts`].

    Args:
        encoder (`Encoder`): The dual encoder.
        images (`Sequence[ImageSource]`): N images.
        names (`Sequence[str]`, *optional*): Names of the images for messages. Defaults to paths or indices.
        digests (`Sequence[str]`, *optional*): Digests of the images, if known from [`image_digests`].
        cache (`str` or `os.PathLike`, *optional*): Folder for the cache, as in [`embed_texts`].
        batch_size (`int`, *optional*, defaults to 32): Number of images in a batch.
        fingerprint (`str`, *optional*): Fingerprint of the encoder for images, if known.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `torch.Tensor`: [N, P] in the order of `images`, normalised, float32 on the CPU.

    Raises:
        `IncompleteDataError`: If images cannot be read; the message names them. The others are encoded and cached.
        `OSError`: If the cache cannot be written.
    """
    names = image_names(images) if names is None else names
    digests = image_digests(images, names=names, progress=progress) if digests is None else digests
    unreadable: list[str] = []

    def encode(unit: range) -> Unit:
        rows: dict[int, torch.Tensor] = {}
        for index, result in encoder.iterate_images([images[i] for i in unit], batch_size=batch_size):
            if isinstance(result, ImageError):
                unreadable.append(f"{names[unit[index]]}: {result.reason}")
                logger.warning("%s; the other images are encoded and cached, but not scored.", unreadable[-1])
            else:
                rows[index] = result
        if len(rows) < len(unit):
            return None
        return torch.stack([rows[index] for index in range(len(unit))]).numpy(), [WHOLE] * len(unit)

    made_by = ""
    if cache is not None:
        made_by = f"image-{fingerprint or encoder.fingerprint('image')}-{encoder.device.type}"
    return _embed_units(encode, digests, cache, made_by, encoder.dim, progress, "image", unreadable)[0]


def image_names(images: Sequence[ImageSource]) -> list[str]:
    """Returns names of images for messages: their paths or indices."""
    return [
        os.fspath(image) if isinstance(image, str | os.PathLike) else f"images[{index}]"
        for index, image in enumerate(images)
    ]


def image_digests(
    images: Sequence[ImageSource], *, names: Sequence[str] | None = None, progress: bool = True
) -> list[str]:
    """
    Computes digests of the contents of images: of the bytes of a file, or of the pixels of an image object. With
    several processes, each process reads a share of the images.

    Args:
        images (`Sequence[ImageSource]`): N images.
        names (`Sequence[str]`, *optional*): Names of the images for messages. Defaults to paths or indices.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `list[str]`: N hexadecimal digests.

    Raises:
        `IncompleteDataError`: If images cannot be read; the message names them.
        `TypeError`: If an item is not an image.
    """
    names = image_names(images) if names is None else names
    own = range(rank(), len(images), world_size())
    digests: list[str] = []
    errors: list[str] = []
    for index in progress_bar(own, desc="Reading images", unit="image", shown=progress and rank() == 0):
        digest = ""
        try:
            digest = image_digest(images[index], names[index])
        except ImageError as error:
            errors.append(f"{names[index]}: {error.reason}")
        digests.append(digest)
    refuse_unreadable(gather_lists(errors), len(images))
    shares = iter(gather_lists(digests))
    ordered = [""] * len(images)
    for first in range(world_size()):
        for index in range(first, len(images), world_size()):
            ordered[index] = next(shares)
    return ordered


def refuse_unreadable(errors: list[str], count: int) -> None:
    """Raises an `IncompleteDataError` if some of `count` images cannot be read."""
    if errors:
        more = f"\n  ... and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise IncompleteDataError(
            f"{len(errors)} of {count} images cannot be read, so nothing is scored. Replace these files:\n  "
            + "\n  ".join(map(printable, sorted(errors)[:10]))
            + more
        )


def _embed_units(
    encode: Callable[[range], Unit],
    digests: Sequence[str],
    cache: str | os.PathLike | None,
    made_by: str,
    dim: int,
    progress: bool,
    modality: str,
    errors: Sequence[str] = (),
) -> tuple[torch.Tensor, list[str]]:
    """
    Returns the embeddings [N, P] and stamps of all items, encoded by all processes or read from the cache. `encode`
    appends to `errors` and returns `None` for a unit with an unreadable item.
    """
    units = [range(start, min(start + UNIT_SIZE, len(digests))) for start in range(0, len(digests), UNIT_SIZE)]
    # distribute units round-robin, because the units of long texts come first
    own = units[rank() :: world_size()]
    parts: list[np.ndarray] = []
    stamps: list[str] = []
    advice = "pass a writable folder with --cache DIR, or --no-cache"
    store = nullcontext() if cache is None else EmbeddingStore(Path(cache), made_by, dim, advice=advice)
    with (
        store as kept,
        progress_bar(
            total=sum(map(len, own)), desc=f"Encoding {modality}s", unit=modality, shown=progress and rank() == 0
        ) as bar,
    ):
        held = None if kept is None else kept.held(digests[i] for unit in own for i in unit)
        for unit in own:
            keys = [digests[i] for i in unit]
            if kept is not None and held is not None and all(key in held.locations for key in keys):
                parts.append(kept.vectors([held.locations[key] for key in keys]))
                stamps += [held.stamps[key] for key in keys]
            elif (encoded := encode(unit)) is not None:
                parts.append(encoded[0])
                stamps += encoded[1]
                if kept is not None:
                    kept.add(keys, *encoded)
            bar.update(len(unit))
    refuse_unreadable(gather_lists(list(errors)), len(digests))
    # gathered parts contain all units of the first process, then those of the second, ...
    order = [i for first in range(world_size()) for unit in units[first :: world_size()] for i in unit]
    indices = np.argsort(order)
    stamps = gather_lists(stamps)
    embeds = torch.from_numpy(np.concatenate(gather_lists(parts))[indices])
    return embeds, [stamps[index] for index in indices]
