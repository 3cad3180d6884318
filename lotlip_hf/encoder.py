"""Encodes texts and images as embeddings, with any engine."""

import hashlib
import itertools
import json
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from .engines import OPEN_CLIP, Modality
from .engines.exported import is_exported, load_exported
from .files import MAX_CHARACTERS
from .images import Background, ImageError, ImageSource, is_image_source
from .terminal import progress_bar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .engines.torch import TorchEngine
    from .modeling.modeling_lotlip import LoTLIPModel

logger = logging.getLogger(__name__)

# Number of texts that are tokenised and sorted by length together.
TEXT_CHUNK = 4096
# Batches with this many tokens use the processor fully. Larger batches contain only texts of similar length.
ENOUGH_TOKENS = 1024
# Activations of a BERT-base layer for more tokens (32 MB) are allocated from the system each time, which is slower.
CPU_TOKENS = 2048
# A batch has at most `batch_size` times as many tokens. A few long texts use a device as well as many short ones.
FULL_LENGTH = 512
SIMILAR_LENGTH = 0.9
# Two special tokens and one word.
MIN_LENGTH = 3
# Versions in all fingerprints. Increase the version if a change of the code changes embeddings.
FORMAT_VERSIONS: dict[Modality, int] = {"image": 3, "text": 1}
NOT_POOLED = ("_projection.", "corner_embeds")  # weights that do not change the pooled states of a tower


class Engine(Protocol):
    """
    Methods and attributes that an [`Encoder`] needs. Inputs and results are NumPy arrays, so that an engine may work
    without PyTorch. [`~lotlip_hf.engines.torch.TorchEngine`] describes them.
    """

    name: str
    revision: str | None
    libraries: tuple[str, ...]
    max_text_length: int
    pads_to_full_length: bool
    background: Background  # behind transparent images

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def tokenize(self, texts: list[str], max_length: int) -> tuple[dict[str, list[list[int]]], list[bool]]: ...

    def pad(self, encoded: dict[str, list[list[int]]]) -> dict[str, np.ndarray]: ...

    def open(self, image: ImageSource, name: str) -> Image.Image: ...

    def pixels(self, image: ImageSource, name: str | None = None) -> dict[str, np.ndarray]: ...

    def embed(self, modality: Modality, inputs: Mapping[str, np.ndarray], pooled: bool = False) -> Any: ...

    def fetch(self, batch: Any) -> np.ndarray: ...

    def features(self, modality: Modality, inputs: Mapping[str, np.ndarray]) -> np.ndarray: ...

    def settings(self, modality: Modality) -> dict[str, Any]: ...

    def weights(self, modality: Modality) -> Iterator[tuple[str, Any]]: ...


class Encoder:
    """
    A dual encoder that computes embeddings of texts and images. [`load_encoder`] loads an encoder from a checkpoint.

    Args:
        model (`PreTrainedModel`): LoTLIP, or a model with CLIP's `get_text_features` and `get_image_features`. The
            device and the training mode of the model do not change.
        processor (`ProcessorMixin`): Processor of the model, or only a tokenizer or an image processor.

    Example:

    ```python
    >>> from lotlip_hf import Encoder, LoTLIPModel, LoTLIPProcessor

    >>> encoder = Encoder(LoTLIPModel.from_pretrained("checkpoint"), LoTLIPProcessor.from_pretrained("checkpoint"))
    >>> texts = encoder.encode_texts(["a dog", "a cat"], progress=False)
    >>> images = encoder.encode_images(["photos/cat.png"], progress=False)
    >>> (texts @ images.T).shape  # cosine similarities
    torch.Size([2, 1])
    ```
    """

    def __init__(self, model: "PreTrainedModel", processor: Any) -> None:
        from .engines.torch import TorchEngine

        self.engine: Engine = TorchEngine(model, processor)
        self._dim: int | None = None

    @classmethod
    def from_engine(cls, engine: Engine) -> "Encoder":
        """Returns an encoder that uses an [`Engine`]."""
        encoder = cls.__new__(cls)
        encoder.engine = engine
        encoder._dim = None
        return encoder

    @property
    def name(self) -> str:
        """Folder or Hub id of the model."""
        return self.engine.name

    @property
    def revision(self) -> str | None:
        """Commit of the model on the Hub, or `None` for a folder."""
        return self.engine.revision

    @property
    def versions(self) -> dict[str, str]:
        """Names and versions of the libraries that compute features, in addition to PyTorch and transformers."""
        return {name: sys.modules[name].__version__ for name in self.engine.libraries if name in sys.modules}

    @property
    def device(self) -> "torch.device":
        """Device of the model."""
        import torch

        return torch.device(self.engine.device)

    @property
    def dtype(self) -> "torch.dtype":
        """Type of the weights."""
        import torch

        return getattr(torch, self.engine.dtype)

    @property
    def max_text_length(self) -> int:
        """Maximum length of a text in tokens, special tokens included. Longer texts are cut."""
        return self.engine.max_text_length

    @property
    def dim(self) -> int:
        """Number P of dimensions of the embeddings. The first access may encode a text to find it."""
        if self._dim is None:
            self._dim = len(next(self.text_rows(["a"]))[1])
        return self._dim

    def encode_texts(
        self, texts: Iterable[str], *, batch_size: int = 64, max_length: int | None = None, progress: bool = True
    ) -> "torch.Tensor":
        """
        Encodes texts as embeddings.

        Texts of similar length are encoded together to avoid padding. An embedding does not depend on the other texts.
        Texts longer than the model's maximum length are cut, with a warning that counts them.

        Args:
            texts (`Iterable[str]`): Texts.
            batch_size (`int`, *optional*, defaults to 64): Maximum number of texts per batch, if they have the maximum
                length or 512 tokens. A batch of shorter or longer texts contains as many tokens.
            max_length (`int`, *optional*): Maximum length of a text in tokens. Defaults to the maximum of the model.
            progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

        Returns:
            `torch.Tensor`: Embeddings [N, P] in the order of `texts`, normalised, in float32 on the CPU.

        Raises:
            `TypeError`: If `texts` is not a list (or other iterable) of strings.
            `ValueError`: If a text is not valid Unicode, if the features are not finite, or if `max_length` exceeds
                the maximum of the model.
        """
        import torch

        rows: dict[int, np.ndarray] = {}
        cut = 0
        for index, embedding, was_cut in self.text_rows(
            texts, batch_size=batch_size, max_length=max_length, progress=progress
        ):
            rows[index] = embedding
            cut += was_cut
        warn_of_cut_texts(cut, len(rows), max_length or self.max_text_length)
        if not rows:
            return torch.zeros(0, self.dim)
        return torch.from_numpy(np.stack([rows[index] for index in range(len(rows))]))

    def encode_images(
        self, images: Iterable[ImageSource], *, batch_size: int = 32, progress: bool = True
    ) -> "torch.Tensor":
        """
        Encodes images as embeddings. Threads read and prepare the files.

        Args:
            images (`Iterable`): Images: paths, bytes of image files, PIL images or arrays, see
                [`~lotlip_hf.images.load_image`].
            batch_size (`int`, *optional*, defaults to 32): Number of images per batch.
            progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

        Returns:
            `torch.Tensor`: Embeddings [N, P] in the order of `images`, normalised, in float32 on the CPU.

        Raises:
            `TypeError`: If `images` is not a list (or other iterable) of images.
            `ImageError`: If an image cannot be read. The message names it.
        """
        import torch

        rows = []
        for _, result in self.image_rows(images, batch_size=batch_size, progress=progress):
            if isinstance(result, ImageError):
                raise result
            rows.append(result)
        if not rows:  # encode an image to find the width
            return self.encode_images([Image.new("RGB", (1, 1))], progress=False)[:0]
        return torch.from_numpy(np.stack(rows))

    def iterate_texts(
        self,
        texts: Iterable[str],
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        progress: bool = False,
        total: int | None = None,
        pooled: bool = False,
    ) -> Iterator[tuple[int, "torch.Tensor", bool]]:
        """
        Encodes texts and yields each embedding as soon as it is computed. Has the other arguments and the errors of
        [`encode_texts`].

        Args:
            total (`int`, *optional*): Number of texts for the progress bar, if `texts` has no length.
            pooled (`bool`, *optional*, defaults to `False`): Whether to yield the pooled states [pooled_size] of the
                text tower, before its projection, instead of embeddings. Only for LoTLIP.

        Yields:
            `tuple[int, torch.Tensor, bool]`: Index of the text in `texts`, its embedding [P], and whether the text was
            cut. The order is not that of `texts`.
        """
        import torch

        for index, row, was_cut in self.text_rows(
            texts, batch_size=batch_size, max_length=max_length, progress=progress, total=total, pooled=pooled
        ):
            yield index, torch.from_numpy(row), was_cut

    def text_rows(
        self,
        texts: Iterable[str],
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        progress: bool = False,
        total: int | None = None,
        pooled: bool = False,
    ) -> Iterator[tuple[int, np.ndarray, bool]]:
        """Does what [`iterate_texts`] does, without PyTorch: yields the embeddings as NumPy arrays."""
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise TypeError(f"`texts` must be a list of strings, got a {type(texts).__name__}. Pass [text].")
        _check_batch_size(batch_size)
        longest = self.max_text_length
        if max_length is None:
            max_length = longest
        elif not MIN_LENGTH <= max_length <= longest:
            raise ValueError(
                f"`max_length` is {max_length}. Use {MIN_LENGTH} to {longest} tokens, the maximum length of the model."
            )
        total = _length(texts) if total is None else total
        with progress_bar(total=total, desc="Encoding texts", unit="text", shown=progress) as bar:
            batches = self._text_batches(texts, batch_size, max_length)
            for batch, embeddings in self._embed_batches("text", batches, pooled):
                bar.update(len(batch))
                for (index, was_cut), embedding in zip(batch, embeddings, strict=True):
                    yield index, embedding, was_cut

    def _text_batches(
        self, texts: Iterable[str], batch_size: int, max_length: int
    ) -> Iterator[tuple[list[tuple[int, bool]], dict[str, np.ndarray]]]:
        """Batches of texts of similar length: index of each text and whether it was cut, and the model's inputs."""
        engine = self.engine
        tokens = batch_size * min(max_length, FULL_LENGTH)
        if engine.device == "cpu":
            tokens = min(tokens, CPU_TOKENS)
        count, remaining = 0, iter(texts)
        while chunk := list(itertools.islice(remaining, TEXT_CHUNK)):
            for index, text in enumerate(chunk, count):
                _check_text(text, index)
            encoded, was_cut = engine.tokenize(chunk, max_length)
            lengths = [len(ids) for ids in encoded["input_ids"]]
            # Encode the longest texts first: if memory is too small, the first batch fails.
            order = sorted(range(len(chunk)), key=lambda index: -lengths[index])
            while order:
                width = self.max_text_length if engine.pads_to_full_length else lengths[order[0]]
                rows = max(1, tokens // max(1, width))
                if not engine.pads_to_full_length:
                    rows = _rows_of_similar_length([lengths[index] for index in order[:rows]])
                batch, order = order[:rows], order[rows:]
                inputs = engine.pad({key: [values[index] for index in batch] for key, values in encoded.items()})
                yield [(count + index, was_cut[index]) for index in batch], inputs
            count += len(chunk)

    def iterate_images(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int = 32,
        progress: bool = False,
        total: int | None = None,
        pooled: bool = False,
    ) -> Iterator[tuple[int, "torch.Tensor | ImageError"]]:
        """
        Encodes images and yields each embedding as soon as it is computed. Has the other arguments of
        [`encode_images`].

        Args:
            total (`int`, *optional*): Number of images for the progress bar, if `images` has no length.
            pooled (`bool`, *optional*, defaults to `False`): Whether to yield the pooled states [pooled_size] of the
                image tower, before its projection, instead of embeddings. Only for LoTLIP.

        Yields:
            `tuple[int, torch.Tensor | ImageError]`: Index of the image in `images` and its embedding [P], or the error
            if it cannot be read. Embeddings are in the order of `images`, but errors may precede them.
        """
        import torch

        for index, result in self.image_rows(
            images, batch_size=batch_size, progress=progress, total=total, pooled=pooled
        ):
            yield index, result if isinstance(result, ImageError) else torch.from_numpy(result)

    def image_rows(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int = 32,
        progress: bool = False,
        total: int | None = None,
        pooled: bool = False,
    ) -> Iterator[tuple[int, np.ndarray | ImageError]]:
        """Does what [`iterate_images`] does, without PyTorch: yields the embeddings as NumPy arrays."""
        if is_image_source(images) or not isinstance(images, Iterable):
            raise TypeError(f"`images` must be a list of images, got a {type(images).__name__}. Pass [image].")
        _check_batch_size(batch_size)
        engine = self.engine

        def opened() -> Iterator[tuple[int, ImageSource | ImageError]]:
            # Threads open files, but not images in memory: two threads could load the same PIL image.
            for index, source in enumerate(images):
                if isinstance(source, str | os.PathLike | bytes):
                    yield index, source
                    continue
                try:
                    yield index, engine.open(source, f"images[{index}]")
                except ImageError as error:
                    yield index, error

        def read(item: tuple[int, ImageSource | ImageError]) -> tuple[int, dict[str, np.ndarray] | ImageError]:
            index, source = item
            if isinstance(source, ImageError):
                return index, source
            name = None if isinstance(source, str | os.PathLike) else f"images[{index}]"
            try:
                return index, engine.pixels(source, name)
            except ImageError as error:
                return index, error

        ready: list[tuple[int, dict[str, np.ndarray]]] = []

        def embed_ready() -> Iterator[tuple[int, np.ndarray]]:
            batch, ready[:] = list(ready), []
            inputs = {key: np.concatenate([values[key] for _, values in batch]) for key in batch[0][1]}
            ((_, embeddings),) = self._embed_batches("image", [(batch, inputs)], pooled)
            for (index, _), embedding in zip(batch, embeddings, strict=True):
                bar.update()
                yield index, embedding

        total = _length(images) if total is None else total
        with progress_bar(total=total, desc="Encoding images", unit="image", shown=progress) as bar:
            for index, result in _map_ahead(read, opened(), ahead=2 * batch_size):
                if isinstance(result, ImageError):
                    bar.update()
                    yield index, result
                    continue
                ready.append((index, result))
                if len(ready) == batch_size:
                    yield from embed_ready()
            if ready:
                yield from embed_ready()

    def fingerprint(self, modality: Modality, *, pooled: bool = False) -> str:
        """
        Returns a hash of everything that determines a modality's embeddings: the tower's weights and configuration,
        and the preparation of its inputs. The hash depends on the dtype of the model, but not on its folder.

        Args:
            modality (`str`): `"image"` or `"text"`.
            pooled (`bool`, *optional*, defaults to `False`): Whether to hash what determines the pooled states of the
                tower: not its projection, nor the values of the corner tokens.

        Returns:
            `str`: 32 hexadecimal digits.
        """
        settings = {"version": FORMAT_VERSIONS[modality], "modality": modality, **self.engine.settings(modality)}
        if pooled:
            settings["config"] = {
                name: value for name, value in settings["config"].items() if not name.startswith("projection")
            }
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
        for description, content in self.engine.weights(modality):
            if pooled and any(part in description for part in NOT_POOLED):
                continue
            digest.update(description.encode())
            digest.update(content)
        return digest.hexdigest()

    def fingerprints(self) -> dict[str, str]:
        """Returns the fingerprints of images and of texts, by modality."""
        return {"image": self.fingerprint("image"), "text": self.fingerprint("text")}

    def pooled_dim(self, modality: Modality) -> int:
        """
        Returns the number of dimensions of the pooled states of a LoTLIP's tower, before its projection.

        Args:
            modality (`str`): `"image"` or `"text"`.

        Raises:
            `ValueError`: If the model is not a LoTLIP.
        """
        config = self.lotlip()[1].config
        return (config.text_config if modality == "text" else config.vision_config).pooled_size

    def lotlip(self) -> "tuple[TorchEngine, LoTLIPModel]":
        """Returns the engine and the model. Raises a `ValueError` if the model is not a LoTLIP in PyTorch."""
        from .engines.torch import TorchEngine
        from .modeling.modeling_lotlip import LoTLIPModel

        if not isinstance(self.engine, TorchEngine) or not isinstance(self.engine.model, LoTLIPModel):
            raise ValueError(
                f"{self.name} is not a LoTLIP checkpoint, which patches, attentions and pooled states need. Convert a "
                "CLIP with `lotlip convert clip`."
            )
        return self.engine, self.engine.model

    def _embed_batches(
        self, modality: Modality, batches: Iterable[tuple[Any, dict[str, np.ndarray]]], pooled: bool
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """
        Embeddings [B, P] of each batch, in order, or pooled states [B, pooled_size]. A batch starts before the
        previous one is copied to the CPU.
        """
        if pooled:
            self.lotlip()  # raises an error for other models
        waiting: list[tuple[Any, Any]] = []
        ahead = 0 if self.engine.device == "cpu" else 1

        def fetched() -> tuple[Any, np.ndarray]:
            batch, started = waiting.pop(0)
            embeddings = self.engine.fetch(started)
            if not np.isfinite(embeddings).all():
                raise ValueError(
                    f"The features of the model are not finite in {self.engine.dtype}. Try another dtype."
                )
            self._dim = self._dim if pooled else embeddings.shape[1]
            return batch, embeddings

        try:
            for batch, inputs in batches:
                waiting.append((batch, self.engine.embed(modality, inputs, pooled)))
                if len(waiting) > ahead:
                    yield fetched()
        except Exception:
            # Yield the batches that were computed before the error.
            while waiting:
                yield fetched()
            raise
        while waiting:
            yield fetched()


def load_encoder(
    name_or_path: str | os.PathLike,
    *,
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype" = "auto",
    revision: str | None = None,
    image_token_centers: int | None = None,
    image_token_layer: int | None = None,
) -> Encoder:
    """
    Loads a dual encoder and its processor. Raises an error if the checkpoint is incomplete or does not fit.

    Args:
        name_or_path (`str` or `os.PathLike`): Folder or Hub id of a LoTLIP or of a stock dual encoder (CLIP, SigLIP,
            ...); an exported folder, see [`~lotlip_hf.engines.exported.load_exported`]; or a model of open_clip, such
            as `"open_clip:ViT-B-32-quickgelu/openai"`, see [`~lotlip_hf.engines.open_clip.load_open_clip`].
        device (`str` or `torch.device`, *optional*): Device of the model. Defaults to the accelerator, or the CPU.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Type of the weights. `"auto"` keeps the type
            in the checkpoint.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        image_token_centers (`int`, *optional*): Number of patches that the later layers of the image tower compute,
            see [`~lotlip_hf.loading.use_medoids`]. Not for exported folders and open_clip.
        image_token_layer (`int`, *optional*): Layer from which on they are computed. Defaults to the middle one.

    Returns:
        [`Encoder`]: The encoder.

    Raises:
        `ValueError`: As [`~lotlip_hf.loading.load_model`], or if `revision` is passed for a folder or open_clip, or
            `image_token_centers` for an exported folder or open_clip.
        `OSError`: If the checkpoint is not found.
        `ImportError`: If open_clip, or the library of an exported folder, is not installed.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder

    >>> encoder = load_encoder("checkpoint")
    >>> len(encoder.encode_texts(["a dog", "a cat"], progress=False))
    2
    ```
    """
    name = os.fspath(name_or_path)
    medoids = {"image_token_centers": image_token_centers, "image_token_layer": image_token_layer}
    given = [option for option, value in medoids.items() if value is not None]
    if given and (name.startswith(OPEN_CLIP) or (revision is None and is_exported(name))):
        raise ValueError(f"{name}: `{given[0]}` needs a checkpoint of transformers, not of open_clip or exported.")
    if name.startswith(OPEN_CLIP):
        if revision is not None:
            raise ValueError(
                f"{name}: open_clip does not support `revision` {revision!r}. Download it (hf download ORG/NAME "
                f"--revision {revision} --local-dir FOLDER) and load {OPEN_CLIP}local-dir:FOLDER."
            )
        from .engines.open_clip import load_open_clip

        return Encoder.from_engine(load_open_clip(name, device, dtype))
    if revision is None and is_exported(name):
        return Encoder.from_engine(load_exported(name, device, dtype))
    from .loading import load_model, skip_padding

    model, processor = load_model(name, device=device, dtype=dtype, revision=revision, **medoids)
    encoder = Encoder(model, processor)
    if encoder.max_text_length > FULL_LENGTH:
        skip_padding(model)
    return encoder


def warn_of_cut_texts(cut: int, count: int, max_length: int) -> None:
    """Logs how many of `count` texts were cut at `max_length` tokens."""
    if cut:
        logger.warning("%d of %d texts were cut at %d tokens.", cut, count, max_length)


def _length(items: Iterable[Any]) -> int | None:
    return len(items) if hasattr(items, "__len__") else None  # pyright: ignore[reportArgumentType]


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size!r}. Use a whole number of at least 1.")


def _check_text(text: Any, index: int) -> None:
    if not isinstance(text, str):
        raise TypeError(f"texts[{index}] must be a string, got {type(text).__name__}.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"texts[{index}] has {len(text):,} characters. The maximum is {MAX_CHARACTERS:,}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"texts[{index}] is not valid Unicode at character {error.start} ({error.reason})."
        ) from error


def _rows_of_similar_length(lengths: list[int]) -> int:
    """Number of texts to encode together, given lengths from long to short: more texts would need much padding."""
    longest = max(1, lengths[0])
    enough = -(-ENOUGH_TOKENS // longest)
    return next((row for row in range(enough, len(lengths)) if lengths[row] < SIMILAR_LENGTH * longest), len(lengths))


def _map_ahead(function: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """`map` in threads, in order, with at most `ahead` results that wait to be yielded."""
    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
