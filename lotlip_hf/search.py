"""Search a folder of images with a description: an index of the folder, kept up to date, and its ranked results."""

import hashlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .encoder import Encoder
from .images import ImageError, find_images, image_extensions
from .store import EmbeddingStore

logger = logging.getLogger(__name__)

INDEX_FOLDER = ".lotlip"


@dataclass(frozen=True)
class SearchResult:
    """
    An image that was found.

    Args:
        path (`Path`): the file.
        score (`float`): cosine similarity of the image and the description, from -1 to 1.
    """

    path: Path
    score: float


@dataclass
class ImageIndex:
    """
    The embeddings of a folder's images. Made by [`build_index`].

    Args:
        folder (`Path`): the folder.
        files (`list[str]`): N images, relative to the folder, sorted.
        places (`list[int]`): N places: where in the store each file's embedding is.
        store (`EmbeddingStore`): the embeddings.
        skipped (`dict[str, str]`): images without an embedding, relative to the folder, and the reason.
    """

    folder: Path
    files: list[str]
    places: list[int]
    store: EmbeddingStore
    skipped: dict[str, str] = field(default_factory=dict)

    def search(self, query_embedding: torch.Tensor, top: int = 5) -> list[SearchResult]:
        """
        Ranks the images. The embeddings are read from the disk block by block.

        Args:
            query_embedding (`torch.Tensor`): normalised, of shape [P], from the model that made the index.
            top (`int`, *optional*, defaults to 5): how many images to return.

        Returns:
            `list[SearchResult]`: the best first, equal ones by name; all images if there are fewer than `top`.

        Raises:
            ValueError: if `top` is less than 1 or the embedding's shape does not fit the index.
        """
        if top < 1:
            raise ValueError(f"`top` must be at least 1, got {top}.")
        if tuple(query_embedding.shape) != (self.store.dim,):
            raise ValueError(
                f"`query_embedding` must have the shape [{self.store.dim}] of the index, got "
                f"{list(query_embedding.shape)}."
            )
        with self.store as store:
            scores = store.similarities(self.places, query_embedding.detach().cpu().float().numpy())
        # Copies of an image may differ in the last bits of their scores.
        best = np.argsort(-scores.round(6), kind="stable")[:top]
        # Embeddings that came with the folder may be of any length.
        return [SearchResult(self.folder / self.files[index], float(scores[index].clip(-1, 1))) for index in best]


def build_index(
    encoder: Encoder,
    folder: str | os.PathLike,
    *,
    index_folder: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> ImageIndex:
    """
    Embeds the images of a folder that are new or have changed, and returns the index of all.

    The index is kept in the folder's hidden `.lotlip`, known by the image tower's weights and by each file's name,
    size and modification time. Every batch is kept as soon as it is computed: after an interruption the same call
    goes on. An image that cannot be read is skipped, and listed in `ImageIndex.skipped`.

    Args:
        encoder ([`Encoder`]): the dual encoder.
        folder (`str` or `os.PathLike`): the folder; its subfolders belong to it, hidden ones do not.
        index_folder (`str` or `os.PathLike`, *optional*):
            Where to keep the index instead, for a folder that cannot be written to. It may hold those of many folders.
        image_root (`str` or `os.PathLike`, *optional*, defaults to `folder`):
            The folder that links in `folder` must not lead out of.
        batch_size (`int`, *optional*, defaults to 32): images in a batch.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        [`ImageIndex`]: the index.

    Raises:
        NotADirectoryError: if `folder` is not a folder.
        ValueError: if it has no images, or none that can be read.
        OSError: if the index cannot be written.
    """
    folder = Path(folder)
    files, skipped = find_images(folder, image_root)
    if not files and not skipped:
        extensions = ", ".join(
            sorted(image_extensions() & {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tiff", ".bmp"})
        )
        raise ValueError(f"{folder}: no images in this folder or below it (files that end in {extensions}, ...).")
    stamps = {name: f"{status.st_size}:{status.st_mtime_ns}" for name, status in files.items()}
    root, name = folder, INDEX_FOLDER
    advice = "name a folder that can be written to with --index DIR (`index_folder`)"
    if index_folder is not None:
        advice = "choose a folder that can be written to"
        # Files are known by their relative paths: indexes of several folders stay apart.
        digest = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
        root, name = Path(index_folder), f"{folder.resolve().name or 'root'}-{digest}"
    with EmbeddingStore(root / name, encoder.fingerprint("image"), encoder.dim, root=root, advice=advice) as store:
        held = store.held(stamps)
        outdated = [name for name, stamp in stamps.items() if held.stamps.get(name) != stamp]
        try:
            with store.adding(batch_size) as add:
                for index, result in encoder.iterate_images(
                    [folder / name for name in outdated], batch_size=batch_size, progress=progress and bool(outdated)
                ):
                    name = outdated[index]
                    if not isinstance(result, ImageError):
                        add(name, result.numpy(), stamps[name])
                    elif result.transient:
                        skipped[name] = result.reason
                    else:
                        store.add_error(name, result.reason, stamps[name])
        except KeyboardInterrupt:
            kept = len(store.held(stamps).places)
            logger.warning(
                "Interrupted: %d embeddings are kept in %s; the same command goes on from there.", kept, store.path
            )
            raise
        if outdated:
            store.keep(stamps)
            held = store.held(stamps)
        skipped = {**held.errors, **skipped}
        found = [name for name in stamps if name not in skipped]
        index = ImageIndex(folder, found, [held.places[name] for name in found], store, dict(sorted(skipped.items())))
    if not index.files:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(index.skipped.items())[:5])
        raise ValueError(f"{folder}: none of its {len(index.skipped)} images can be read ({reasons}).")
    return index


def encode_query(encoder: Encoder, text: str) -> torch.Tensor:
    """
    Encodes one description.

    Args:
        encoder ([`Encoder`]): the dual encoder.
        text (`str`): the description.

    Returns:
        `torch.Tensor`: its normalised embedding [P].

    Raises:
        ValueError: if the description is empty.
    """
    if not text.strip():
        raise ValueError("The description to search for is empty.")
    return encoder.encode_texts([text], progress=False)[0]
