"""Searches a folder of images with a description. An index stores the embeddings of the images."""

import hashlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .encoder import Encoder, warn_of_cut_texts
from .images import ImageError, find_images, image_extensions
from .store import EmbeddingStore

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

INDEX_FOLDER = ".lotlip"


@dataclass(frozen=True)
class SearchResult:
    """
    One ranked image.

    Args:
        path (`Path`): Image file.
        score (`float`): Cosine similarity of the image and the description, from -1 to 1.
    """

    path: Path
    score: float


@dataclass
class ImageIndex:
    """
    The search index of a folder of images, returned by [`build_index`].

    Args:
        folder (`Path`): Folder of images.
        files (`list[str]`): Paths of the N images, relative to the folder and sorted.
        locations (`list[int]`): Location of each image's embedding in the store.
        store (`EmbeddingStore`): Store of the embeddings.
        skipped (`dict[str, str]`): Reason for each image without an embedding, by its path relative to the folder.
    """

    folder: Path
    files: list[str]
    locations: list[int]
    store: EmbeddingStore
    skipped: dict[str, str] = field(default_factory=dict)

    def search(self, query_embedding: "np.ndarray | torch.Tensor", top: int = 5) -> list[SearchResult]:
        """
        Ranks the images by their similarity to a query. Reads the embeddings from disk block by block.

        Args:
            query_embedding (`np.ndarray` or `torch.Tensor`): Embedding [P] by the model that made the index; see
                [`encode_query`].
            top (`int`, *optional*, defaults to 5): Maximum number of results.

        Returns:
            `list[SearchResult]`: The results, best first; equal scores are sorted by name.

        Raises:
            `ValueError`: If `top` is less than 1 or the embedding has another shape than those of the index.

        Example:

        ```python
        >>> from lotlip_hf import load_encoder
        >>> from lotlip_hf.search import build_index, encode_query

        >>> encoder = load_encoder("checkpoint")
        >>> index = build_index(encoder, "photos")
        >>> best, second = index.search(encode_query(encoder, "A cat sleeps on a red sofa."), top=2)
        >>> best.score >= second.score
        True
        ```
        """
        if top < 1:
            raise ValueError(f"`top` must be at least 1, got {top}.")
        if tuple(query_embedding.shape) != (self.store.dim,):
            raise ValueError(
                f"`query_embedding` must have the shape [{self.store.dim}] of the index, got "
                f"{list(query_embedding.shape)}."
            )
        with self.store as store:
            scores = store.similarities(self.locations, np.asarray(query_embedding, np.float32))
        # The scores of identical images may differ in the last bits.
        best = np.argsort(-scores.round(6), kind="stable")[:top]
        # A downloaded index may contain embeddings that are not normalised.
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
    Embeds the new and changed images of a folder, and returns the index of all its images.

    The index is saved in the hidden folder `.lotlip`. An embedding is reused while the weights of the image tower and
    the name, size and modification time of the file are the same. Every batch is saved at once, so the same call
    resumes after an interruption. Unreadable images are skipped and listed in `ImageIndex.skipped`.

    Args:
        encoder (`Encoder`): Dual encoder.
        folder (`str` or `os.PathLike`): Folder of images, searched with its subfolders except hidden ones.
        index_folder (`str` or `os.PathLike`, *optional*, defaults to `folder`): Folder to save the index in, for
            example if `folder` is read-only. Several image folders may share an `index_folder`.
        image_root (`str` or `os.PathLike`, *optional*, defaults to `folder`): Links to files outside of this folder
            are not followed.
        batch_size (`int`, *optional*, defaults to 32): Number of images in a batch.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        [`ImageIndex`]: The index.

    Raises:
        `NotADirectoryError`: If `folder` is not a folder.
        `ValueError`: If the folder has no readable image.
        `OSError`: If the index cannot be written.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.search import build_index

    >>> index = build_index(load_encoder("checkpoint"), "photos")
    >>> index.files
    ['cat.png', 'dog.png']
    ```
    """
    folder = Path(folder)
    files, skipped = find_images(folder, image_root)
    if not files and not skipped:
        extensions = ", ".join(
            sorted(image_extensions() & {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tiff", ".bmp"})
        )
        raise ValueError(f"{folder}: no images in the folder or its subfolders (files ending in {extensions}, ...).")
    stamps = {name: f"{status.st_size}:{status.st_mtime_ns}" for name, status in files.items()}
    root, name = folder, INDEX_FOLDER
    advice = "pass a writable folder with --index DIR (`index_folder`)"
    if index_folder is not None:
        advice = "pass a writable folder"
        # Keys are relative paths, so each folder needs a separate index.
        digest = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
        root, name = Path(index_folder), f"{folder.resolve().name or 'root'}-{digest}"
    with EmbeddingStore(root / name, encoder.fingerprint("image"), encoder.dim, root=root, advice=advice) as store:
        held = store.held(stamps)
        outdated = [name for name, stamp in stamps.items() if held.stamps.get(name) != stamp]
        try:
            with store.adding(batch_size) as add:
                for index, result in encoder.image_rows(
                    [folder / name for name in outdated], batch_size=batch_size, progress=progress and bool(outdated)
                ):
                    name = outdated[index]
                    if not isinstance(result, ImageError):
                        add(name, result, stamps[name])
                    elif result.transient:
                        skipped[name] = result.reason
                    else:
                        store.add_error(name, result.reason, stamps[name])
        except KeyboardInterrupt:
            kept = len(store.held(stamps).locations)
            logger.warning(
                "Interrupted: %d embeddings are kept in %s. Run the same command to resume.", kept, store.path
            )
            raise
        if outdated:
            store.keep(stamps)
            held = store.held(stamps)
        skipped = {**held.errors, **skipped}
        found = [name for name in stamps if name not in skipped]
        locations = [held.locations[name] for name in found]
        index = ImageIndex(folder, found, locations, store, dict(sorted(skipped.items())))
    if not index.files:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(index.skipped.items())[:5])
        raise ValueError(f"{folder}: all {len(index.skipped)} images are unreadable ({reasons}).")
    return index


def encode_query(encoder: Encoder, text: str) -> np.ndarray:
    """
    Encodes the description to search for.

    Args:
        encoder (`Encoder`): Dual encoder.
        text (`str`): Description.

    Returns:
        `np.ndarray`: Embedding [P].

    Raises:
        `ValueError`: If the description is empty.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.search import encode_query

    >>> query = encode_query(load_encoder("checkpoint"), "A cat sleeps on a red sofa.")
    ```
    """
    if not text.strip():
        raise ValueError("The description is empty. Pass a text to search for.")
    ((_, embedding, was_cut),) = encoder.text_rows([text])
    warn_of_cut_texts(was_cut, 1, encoder.max_text_length)
    return embedding
