"""Embeddings for an evaluation: shared out over the processes, and kept on disk as they are computed."""

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..distributed import gather_lists, rank, world_size
from ..encoder import iterate_image_embeddings, iterate_text_embeddings, max_text_length, warn_of_cut_texts
from ..files import own_folder, printable, read_regular, replacing
from ..images import WHITE, ImageError, ImageSource, load_image, read_image_bytes
from ..store import fingerprint
from .tasks import IncompleteDataError

logger = logging.getLogger(__name__)

# Texts or images that are encoded by one process, and kept on disk, together. What is in a unit does not depend on the
# number of processes nor on what is kept already, so neither do the last digits of an embedding.
UNIT_SIZE = 256
# A unit of embeddings with 65,536 dimensions.
MAX_UNIT_BYTES = 1 << 27


class TextEmbeddings(NamedTuple):
    """The normalised embeddings [N, P] of N texts, float32 on the CPU, and which of the texts were cut, bool [N]."""

    embeds: torch.Tensor
    was_cut: torch.Tensor


def embed_texts(
    model: PreTrainedModel,
    processor: Any,
    texts: Sequence[str],
    *,
    cache: str | os.PathLike | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    model_fingerprint: str | None = None,
    warn: bool = True,
    progress: bool = True,
) -> TextEmbeddings:
    """
    Encodes texts as `encode_texts` does, each different one once. Of several processes (`accelerate launch`) each
    encodes its share, and all get all embeddings, to the last digit those of one process.

    Args:
        model: A dual encoder, as `load_model` gives it.
        processor: Its processor.
        texts: N texts.
        cache: A folder that keeps what is computed, as it is computed: after an interruption the same call goes on
            from there. What is kept is known by the model's weights and settings and by the texts themselves.
        batch_size: Texts of full length in a batch.
        max_length: Tokens to cut the texts at; by default as many as the model takes.
        model_fingerprint: The model's ([`~lotlip_hf.store.fingerprint`], of texts), if it is known already.
        warn: Whether to log how many texts were cut.
        progress: Whether to show a progress bar.

    Returns:
        The embeddings in the order of `texts`, and which texts were cut.

    Raises:
        TypeError, ValueError: as `encode_texts`; also if there are no texts.
        OSError: if the cache cannot be written.
    """
    if not texts:
        raise ValueError("`texts` is empty: there is nothing to encode.")
    places = {text: place for place, text in enumerate(sorted(set(texts), key=lambda text: (-len(text), text)))}
    unique = list(places)  # longest first: texts of a unit are of about the same length

    def encode(unit: range) -> dict[str, torch.Tensor]:
        rows = sorted(
            iterate_text_embeddings(
                model, processor, [unique[i] for i in unit], batch_size=batch_size, max_length=max_length
            ),
            key=lambda row: row[0],
        )
        return {
            "embeds": torch.stack([embedding for _, embedding, _ in rows]),
            "was_cut": torch.tensor([was_cut for _, _, was_cut in rows]),
        }

    length = max_length or max_text_length(model, getattr(processor, "tokenizer", processor))
    kept = _cache(model, processor, "text", cache, model_fingerprint, max_length=length)
    digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest() for text in unique]
    result = _embed_units(encode, TextEmbeddings._fields, digests, kept, progress, "text")
    order = torch.tensor([places[text] for text in texts], dtype=torch.int64)
    embeddings = TextEmbeddings(result["embeds"][order], result["was_cut"][order])
    if warn and rank() == 0:
        warn_of_cut_texts(int(embeddings.was_cut.sum()), len(texts), length)
    return embeddings


def embed_images(
    model: PreTrainedModel,
    processor: Any,
    images: Sequence[ImageSource],
    *,
    names: Sequence[str] | None = None,
    digests: Sequence[str] | None = None,
    cache: str | os.PathLike | None = None,
    batch_size: int = 32,
    model_fingerprint: str | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """
    Encodes images as `encode_images` does, with the processes and the cache of [`embed_texts`].

    Args:
        model: A dual encoder, as `load_model` gives it.
        processor: Its processor.
        images: N images.
        names: [N] what errors call them; by default their paths or places.
        digests: [N] of what they hold, if known from [`image_digests`].
        cache: As in [`embed_texts`].
        batch_size: Images in a batch.
        model_fingerprint: The model's ([`~lotlip_hf.store.fingerprint`], of images), if it is known already.
        progress: Whether to show a progress bar.

    Returns:
        [N, P] in the order of `images`, normalised, float32 on the CPU.

    Raises:
        ValueError: if there are no images.
        IncompleteDataError: if images cannot be read, after all others are computed and kept; it names them.
        OSError: if the cache cannot be written.
    """
    if not len(images):
        raise ValueError("`images` is empty: there is nothing to encode.")
    names = image_names(images) if names is None else names
    digests = image_digests(images, names=names, progress=progress) if digests is None else digests
    unreadable: list[str] = []

    def encode(unit: range) -> dict[str, torch.Tensor]:
        rows: dict[int, torch.Tensor] = {}
        sources = [images[i] for i in unit]
        for index, result in iterate_image_embeddings(model, processor, sources, batch_size=batch_size):
            if isinstance(result, ImageError):
                unreadable.append(f"{names[unit[index]]}: {result.reason}")
                logger.warning("%s; the others are encoded and kept, but not scored without it.", unreadable[-1])
            else:
                rows[index] = result
        if len(rows) < len(unit):
            return {}
        return {"embeds": torch.stack([rows[index] for index in range(len(unit))])}

    kept = _cache(model, processor, "image", cache, model_fingerprint)
    return _embed_units(encode, ("embeds",), digests, kept, progress, "image", unreadable)["embeds"]


def image_names(images: Sequence[ImageSource]) -> list[str]:
    """What messages call images that were given no names: their paths, or their places."""
    return [
        os.fspath(image) if isinstance(image, str | os.PathLike) else f"images[{place}]"
        for place, image in enumerate(images)
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
    for place in tqdm(own, desc="Reading images", unit="image", disable=not progress or rank() > 0):
        image = images[place]
        digest = hashlib.blake2b(digest_size=16)
        try:
            if isinstance(image, str | os.PathLike):
                digest.update(read_image_bytes(image))
            elif isinstance(image, bytes):
                digest.update(image)
            else:
                for background in (WHITE, None):  # processors have either
                    upright = load_image(image, names[place], background=background)
                    digest.update(f"{upright.size}".encode() + upright.tobytes())
        except ImageError as error:
            errors.append(f"{names[place]}: {error.reason}")
        digests.append(digest.hexdigest())
    _refuse(gather_lists(errors), len(images))
    shares = iter(gather_lists(digests))
    ordered = [""] * len(images)
    for first in range(world_size()):
        for place in range(first, len(images), world_size()):
            ordered[place] = next(shares)
    return ordered


def _refuse(errors: list[str], count: int) -> None:
    if errors:
        more = f"\n  ... and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise IncompleteDataError(
            f"{len(errors)} of {count} images cannot be read, and nothing is scored on the others alone; put whole "
            "files in their place:\n  " + "\n  ".join(map(printable, sorted(errors)[:10])) + more
        )


class _Cache(NamedTuple):
    """The cache's folder for one model, modality and settings."""

    root: Path
    name: str

    def file(self, digests: Sequence[str]) -> Path:
        """The file of the unit with these digests."""
        name = hashlib.blake2b("\n".join(digests).encode(), digest_size=16).hexdigest()
        return self.root / self.name / f"{name}.safetensors"

    def kept(self, digests: Sequence[str], names: Collection[str]) -> dict[str, torch.Tensor] | None:
        """A unit's tensors, if they are there and whole."""
        file = self.file(digests)
        try:
            part = load(read_regular(file, MAX_UNIT_BYTES))
            if part.keys() == set(names) and all(_is_whole(one, len(digests)) for one in part.values()):
                return part
            reason = "it holds other tensors"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error)
        logger.warning("%s is damaged (%s): its embeddings are computed again.", file, reason)
        return None

    def keep(self, digests: Sequence[str], part: dict[str, torch.Tensor]) -> None:
        """Keeps a unit, whole or not at all."""
        try:
            own_folder(self.root, self.name)
            with replacing(self.file(digests)) as file:
                file.write(save(part))
        except OSError as error:
            cause = error if error.errno is not None else error.__cause__  # of `replacing`
            raise OSError(
                f"{self.root / self.name}: cannot keep embeddings there ({getattr(cause, 'strerror', error)}); choose "
                "a folder that can be written to (--cache DIR), or none (--no-cache)."
            ) from error


def _is_whole(values: torch.Tensor, count: int) -> bool:
    """Whether these are finite embeddings [count, P] or booleans [count]."""
    if values.dtype == torch.bool:
        return values.shape == (count,)
    return (
        values.dtype == torch.float32 and values.ndim == 2 and len(values) == count and bool(values.isfinite().all())
    )


def _cache(
    model: PreTrainedModel,
    processor: Any,
    modality: Literal["image", "text"],
    cache: str | os.PathLike | None,
    model_fingerprint: str | None,
    **settings: Any,
) -> _Cache | None:
    if cache is None:
        return None
    made_by = [model_fingerprint or fingerprint(model, processor, modality), model.device.type]
    made_by += [f"{name}={value}" for name, value in settings.items()]
    return _Cache(Path(cache), "-".join([modality, *made_by]))


def _embed_units(
    encode: Callable[[range], dict[str, torch.Tensor]],
    names: Collection[str],
    digests: Sequence[str],
    cache: _Cache | None,
    progress: bool,
    modality: str,
    errors: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """
    The tensors of these names that `encode` makes of the things with these digests, in their order, from all
    processes. `errors` is what `encode` met, in this process; a unit with an error has no tensors.
    """
    units = [range(start, min(start + UNIT_SIZE, len(digests))) for start in range(0, len(digests), UNIT_SIZE)]
    # turn by turn: the units of long texts come first
    own = units[rank() :: world_size()]
    parts: list[dict[str, torch.Tensor]] = []
    with tqdm(
        total=sum(map(len, own)), desc=f"Encoding {modality}s", unit=modality, disable=not progress or rank() > 0
    ) as bar:
        for unit in own:
            own_digests = [digests[i] for i in unit]
            part = cache.kept(own_digests, names) if cache is not None else None
            if part is None:
                part = encode(unit)
                if part and cache is not None:
                    cache.keep(own_digests, part)
            parts.append(part)
            bar.update(len(unit))
    _refuse(gather_lists(list(errors)), len(digests))
    # all units of the first process, then those of the second, ...
    order = [i for first in range(world_size()) for unit in units[first :: world_size()] for i in unit]
    places = torch.tensor(order, dtype=torch.int64).argsort()
    parts = gather_lists(parts)
    if cache is not None and len(widths := {part["embeds"].shape[1] for part in parts}) > 1:
        raise ValueError(f"{cache.root / cache.name}: holds embeddings of {sorted(widths)} dimensions: remove it.")
    return {key: torch.cat([part[key] for part in parts])[places] for key in (parts[0] if parts else {})}
