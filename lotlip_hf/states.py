"""Keeps the pooled states or embeddings of a frozen tower, so that each image and text is computed once."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from huggingface_hub import constants

from .encoder import Encoder
from .engines import Modality
from .images import ImageError, ImageSource
from .store import CUT, LOOKED_UP, WHOLE, EmbeddingStore, text_digest

logger = logging.getLogger(__name__)

MEMORY = 1 << 30  # bytes of states in the memory of a process


class FrozenStates:
    """
    The pooled states of a tower (before its projection) or its embeddings, in the cache of embeddings on disk and, up
    to a limit, in memory. An entry belongs to the weights and the configuration of the tower, the preparation of its
    inputs, the type of device, and the content of the image or text.

    Args:
        encoder (`Encoder`): The encoder, a LoTLIP for pooled states. The weights of the tower must not change later.
        modality (`str`): `"image"` or `"text"`.
        folder (`str` or `os.PathLike`, *optional*): Folder of the cache. Defaults to `$HF_HOME/lotlip`.
        dtype (`str`, *optional*, defaults to `"float32"`): Type of the states on disk, `"float32"` or `"bfloat16"`.
        pooled (`bool`, *optional*, defaults to `True`): Whether to keep pooled states. Otherwise, embeddings are kept,
            also those of other dual encoders than LoTLIP.

    Raises:
        `ValueError`: If `pooled` is set and the encoder is not a LoTLIP.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.states import FrozenStates

    >>> states = FrozenStates(load_encoder("checkpoint"), "text", "cache")
    >>> keys = states.fill_texts(["A cat.", "A dog."])
    >>> len(states.read(keys))
    2
    ```
    """

    def __init__(
        self,
        encoder: Encoder,
        modality: Modality,
        folder: str | os.PathLike | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        *,
        pooled: bool = True,
    ) -> None:
        folder = Path(constants.HF_HOME, "lotlip") if folder is None else Path(folder)
        kind = "states" if pooled else "embeddings"
        made_by = f"{modality}-{kind}-{encoder.fingerprint(modality, pooled=pooled)}-{encoder.device.type}"
        dim = encoder.pooled_dim(modality) if pooled else encoder.dim
        advice = "pass a writable folder with --cache DIR"
        self.encoder = encoder
        self.pooled = pooled
        self.store = EmbeddingStore(folder, made_by, dim, dtype=dtype, advice=advice)
        self._has_warned = False
        self._rows: dict[str, torch.Tensor] = {}

    @property
    def row_bytes(self) -> int:
        """Size of a state on disk."""
        return self.store.dim * np.dtype(self.store.stored_as).itemsize

    def fill_images(
        self,
        keys: Sequence[str],
        source: Callable[[int], ImageSource],
        fail: Callable[[int, ImageError], None],
        *,
        batch_size: int = 32,
        progress: bool = True,
    ) -> int:
        """
        Computes the states of images that are not in the cache, and adds each batch to the cache at once.

        Args:
            keys (`Sequence[str]`): Digests of N images, see [`~lotlip_hf.images.image_digest`].
            source (`Callable`): Returns the image with an index. It is called for the missing images only.
            fail (`Callable`): Called with the index and the error of each image that cannot be read.
            batch_size (`int`, *optional*, defaults to 32): Number of images in a batch.
            progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

        Returns:
            `int`: Number of computed images.
        """
        with self.store as store:
            held = store.held(keys).locations
            new = [*{key: index for index, key in enumerate(keys) if key not in held}.values()]
            count = len(new)
            with store.adding(batch_size) as add:
                for number, state in self.encoder.image_rows(
                    map(source, new),
                    batch_size=batch_size,
                    progress=progress and bool(new),
                    total=len(new),
                    pooled=self.pooled,
                ):
                    if isinstance(state, ImageError):
                        count -= 1
                        fail(new[number], state)
                    else:
                        add(keys[new[number]], state)
        return count

    def fill_texts(self, texts: Iterable[str], *, batch_size: int = 64, progress: bool = False) -> list[str]:
        """
        Computes the states of texts that are not in the cache, and adds each batch to the cache at once.

        Args:
            texts (`Iterable[str]`): N texts.
            batch_size (`int`, *optional*, defaults to 64): Number of texts of maximum length in a batch.
            progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

        Returns:
            `list[str]`: Keys of the N texts, for [`read`].
        """
        texts = list(texts)
        keys = list(map(text_digest, texts))
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._rows}
        if not new:
            return keys
        with self.store as store:
            held = {key for part in _parts(list(new)) for key in store.held(part).locations}
            missing = [key for key in new if key not in held]
            with store.adding(batch_size) as add:
                for index, state, was_cut in self.encoder.text_rows(
                    [new[key] for key in missing],
                    batch_size=batch_size,
                    progress=progress and bool(missing),
                    pooled=self.pooled,
                ):
                    add(missing[index], state, CUT if was_cut else WHOLE)
                    if was_cut and not self._has_warned:
                        self._has_warned = True
                        logger.warning("Texts are cut at %d tokens.", self.encoder.max_text_length)
        return keys

    def read(self, keys: Sequence[str]) -> torch.Tensor:
        """
        Reads states that are in the cache.

        Args:
            keys (`Sequence[str]`): N keys.

        Returns:
            `torch.Tensor`: States [N, pooled_size] or embeddings [N, P], in float32 on the CPU.

        Raises:
            `OSError`: If a state is missing, because another process removed the file.
        """
        rows = {key: self._rows[key] for key in keys if key in self._rows}
        missing = [key for key in dict.fromkeys(keys) if key not in rows]
        if missing:
            with self.store as store:
                for part in _parts(missing):
                    locations = store.held(part).locations
                    if len(locations) < len(part):
                        raise OSError(f"{self.store.path}: states are missing. Run the same command again.")
                    rows |= zip(part, torch.from_numpy(store.vectors([locations[key] for key in part])), strict=True)
            if (len(self._rows) + len(missing)) * 4 * self.store.dim <= MEMORY:
                self._rows |= {key: rows[key] for key in missing}
        return torch.stack([rows[key] for key in keys])


def _parts(keys: list[str]) -> list[list[str]]:
    """Divides keys into parts of a size that the store looks up without reading all entries."""
    return [keys[start : start + LOOKED_UP] for start in range(0, len(keys), LOOKED_UP)]
