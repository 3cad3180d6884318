"""Embeddings for an evaluation: shared out over the processes, and kept on disk as they are computed."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ..distributed import gather_lists, rank, world_size
from ..encoder import Encoder, warn_of_cut_texts
from ..files import printable
from ..images import WHITE, ImageError, ImageSource, load_image, read_image_bytes
from ..store import CUT, WHOLE, EmbeddingStore
from .tasks import IncompleteDataError

logger = logging.getLogger(__name__)

# Texts or images that one process encodes, and keeps on disk, together. What is in a unit does not depend on the
# number of processes, so neither do the last digits of what is encoded.
UNIT_SIZE = 256


class TextEmbeddings(NamedTuple):
    """The normalised embeddings [N, P] of N texts, float32 on the CPU, and which of the texts were cut, bool [N]."""

    embeds: torch.Tensor
    was_cut: torch.Tensor


# The embeddings [n, P] of a unit's items and their stamps; `None` if one of them cannot be read
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
    Encodes texts as [`Encoder.encode_texts`] does, each different one once. Of several processes (`accelerate launch`)
    each encodes its share, and all get all embeddings, to the last digit those of one process.

    Args:
        encoder ([`Encoder`]): the dual encoder.
        texts (`Sequence[str]`): N texts.
        cache (`str` or `os.PathLike`, *optional*):
            A folder that keeps what is computed, as it is computed: after an interruption the same call goes on from
            there. It is known by the encoder's fingerprint and by the texts themselves.
        batch_size (`int`, *optional*, defaults to 64): texts of full length in a batch.
        max_length (`int`, *optional*): tokens to cut the texts at; by default as many as the model takes.
        fingerprint (`str`, *optional*): the encoder's, of texts, if it is known already.
        warn (`bool`, *optional*, defaults to `True`): whether to log how many texts were cut.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        [`TextEmbeddings`]: in the order of `texts`.

    Raises:
        TypeError, ValueError: as `encode_texts`.
        OSError: if the cache cannot be written.
    """
    unique = sorted(set(texts), key=lambda text: (-len(text), text))  # texts of a unit are of about the same length
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
    digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest() for text in unique]
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
    Encodes images as [`Encoder.encode_images`] does, with the processes and the cache of [`embed_texts`].

    Args:
        encoder ([`Encoder`]): the dual encoder.
        images (`Sequence`): N images.
        names (`Sequence[str]`, *optional*): N names for errors; by default their paths or indices.
        digests (`Sequence[str]`, *optional*): N digests of their contents, if known from [`image_digests`].
        cache (`str` or `os.PathLike`, *optional*): as in [`embed_texts`].
        batch_size (`int`, *optional*, defaults to 32): images in a batch.
        fingerprint (`str`, *optional*): the encoder's, of images, if it is known already.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        `torch.Tensor`: [N, P] in the order of `images`, normalised, float32 on the CPU.

    Raises:
        IncompleteDataError: if images cannot be read, after all others are computed and kept; it names them.
        OSError: if the cache cannot be written.
    """
    names = image_names(images) if names is None else names
    digests = image_digests(images, names=names, progress=progress) if digests is None else digests
    unreadable: list[str] = []

    def encode(unit: range) -> Unit:
        rows: dict[int, torch.Tensor] = {}
        for index, result in encoder.iterate_images([images[i] for i in unit], batch_size=batch_size):
            if isinstance(result, ImageError):
                unreadable.append(f"{names[unit[index]]}: {result.reason}")
                logger.warning("%s; the others are encoded and kept, but not scored without it.", unreadable[-1])
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
    """What messages call images that were given no names: their paths, or their indices."""
    return [
        os.fspath(image) if isinstance(image, str | os.PathLike) else f"images[{index}]"
        for index, image in enumerate(images)
    ]


def image_digests(
    images: Sequence[ImageSource], *, names: Sequence[str] | None = None, progress: bool = True
) -> list[str]:
    """
    Digests of what images hold, wherever they lie: of a file's bytes, or of an image as it is encoded. Of several
    processes each reads its share.

    Args:
        images: N images.
        names: [N] what errors call them.
        progress: Whether to show a progress bar.

    Returns:
        [N] hexadecimal digits.

    Raises:
        IncompleteDataError: if images cannot be read; it names them.
        TypeError: if one is no image.
    """
    names = image_names(images) if names is None else names
    own = range(rank(), len(images), world_size())
    digests: list[str] = []
    errors: list[str] = []
    for index in tqdm(own, desc="Reading images", unit="image", disable=not progress or rank() > 0):
        image = images[index]
        digest = hashlib.blake2b(digest_size=16)
        try:
            if isinstance(image, str | os.PathLike):
                digest.update(read_image_bytes(image))
            elif isinstance(image, bytes):
                digest.update(image)
            else:
                for background in (WHITE, None):  # processors have either
                    upright = load_image(image, names[index], background=background)
                    digest.update(f"{upright.size}".encode() + upright.tobytes())
        except ImageError as error:
            errors.append(f"{names[index]}: {error.reason}")
        digests.append(digest.hexdigest())
    _refuse(gather_lists(errors), len(images))
    shares = iter(gather_lists(digests))
    ordered = [""] * len(images)
    for first in range(world_size()):
        for index in range(first, len(images), world_size()):
            ordered[index] = next(shares)
    return ordered


def _refuse(errors: list[str], count: int) -> None:
    if errors:
        more = f"\n  ... and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise IncompleteDataError(
            f"{len(errors)} of {count} images cannot be read, and nothing is scored on the others alone; put whole "
            "files in their place:\n  " + "\n  ".join(map(printable, sorted(errors)[:10])) + more
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
    The embeddings [N, P] and stamps that `encode` makes of the items with these digests, from all processes. `errors`
    is what `encode` met in this process; a unit with an error has no embeddings.
    """
    units = [range(start, min(start + UNIT_SIZE, len(digests))) for start in range(0, len(digests), UNIT_SIZE)]
    # turn by turn: the units of long texts come first
    own = units[rank() :: world_size()]
    parts: list[np.ndarray] = []
    stamps: list[str] = []
    advice = "choose a folder that can be written to (--cache DIR), or none (--no-cache)"
    store = nullcontext() if cache is None else EmbeddingStore(Path(cache), made_by, dim, advice=advice)
    with (
        store as kept,
        tqdm(
            total=sum(map(len, own)), desc=f"Encoding {modality}s", unit=modality, disable=not progress or rank() > 0
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
    _refuse(gather_lists(list(errors)), len(digests))
    # all units of the first process, then those of the second, ...
    order = [i for first in range(world_size()) for unit in units[first :: world_size()] for i in unit]
    indices = np.argsort(order)
    stamps = gather_lists(stamps)
    embeds = torch.from_numpy(np.concatenate(gather_lists(parts))[indices])
    return embeds, [stamps[index] for index in indices]
