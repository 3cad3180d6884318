"""Texts and images to normalised embeddings, whatever computes them."""

import hashlib
import itertools
import json
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import PreTrainedModel

from .engines.onnx import LoTLIPOnnxModel, OnnxEngine, is_onnx, load_onnx
from .engines.open_clip import OPEN_CLIP, load_open_clip
from .engines.torch import Modality, TorchEngine
from .files import MAX_CHARACTERS
from .images import Background, ImageError, ImageSource
from .loading import load_model
from .terminal import progress_bar

logger = logging.getLogger(__name__)

# Texts are tokenised and sorted by length this many at a time.
TEXT_CHUNK = 4096
# A batch of as many tokens keeps a processor busy; in a larger one no text is much shorter than the longest.
ENOUGH_TOKENS = 1024
# Beyond it a layer's activations of BERT-base (32 MB) are allocated from the system each time, which costs more.
CPU_TOKENS = 2048
SIMILAR_LENGTH = 0.9
# Two special tokens and a word.
MIN_LENGTH = 3
# Part of every fingerprint. Raised when the same model comes to give another embedding of the same file or text.
FORMAT_VERSIONS: dict[Modality, int] = {"image": 3, "text": 1}


class Engine(Protocol):
    """What an [`Encoder`] asks of a model: see [`~lotlip_hf.engines.torch.TorchEngine`] for each member."""

    name: str
    revision: str | None
    libraries: tuple[str, ...]
    max_text_length: int
    pads_to_full_length: bool
    background: Background  # behind transparent images

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def tokenize(self, texts: list[str], max_length: int) -> tuple[dict[str, list[list[int]]], list[bool]]: ...

    def pad(self, encoded: dict[str, list[list[int]]]) -> dict[str, torch.Tensor]: ...

    def open(self, image: ImageSource, name: str) -> Image.Image: ...

    def pixels(self, image: ImageSource, name: str | None = None) -> dict[str, torch.Tensor]: ...

    def text_features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor: ...

    def image_features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor: ...

    def settings(self, modality: Modality) -> dict[str, Any]: ...

    def weights(self, modality: Modality) -> Iterator[tuple[str, torch.Tensor]]: ...


class Encoder:
    """
    A dual encoder: texts and images to embeddings. [`load_encoder`] makes one from a checkpoint.

    Args:
        model (`PreTrainedModel`):
            LoTLIP, or any model with CLIP's `get_text_features` and `get_image_features`. It is used where it is: on
            its device, its mode left as it was.
        processor (`ProcessorMixin`): the model's processor, or its tokenizer or image processor alone.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder

    >>> encoder = load_encoder("path/to/checkpoint")  # doctest: +SKIP
    >>> texts = encoder.encode_texts(["a dog", "a cat"])  # doctest: +SKIP
    >>> scores = texts @ encoder.encode_images(["dog.jpg"]).T  # doctest: +SKIP
    ```
    """

    def __init__(self, model: PreTrainedModel | LoTLIPOnnxModel, processor: Any) -> None:
        engine = OnnxEngine if isinstance(model, LoTLIPOnnxModel) else TorchEngine
        self.engine: Engine = engine(model, processor)
        self._dim: int | None = None

    @classmethod
    def from_engine(cls, engine: Engine) -> "Encoder":
        """An encoder on any [`Engine`]."""
        encoder = cls.__new__(cls)
        encoder.engine = engine
        encoder._dim = None
        return encoder

    @property
    def name(self) -> str:
        """The folder or Hub id that the model was loaded from."""
        return self.engine.name

    @property
    def revision(self) -> str | None:
        """The commit on the Hub that the model was loaded from; `None` for a model from a folder."""
        return self.engine.revision

    @property
    def versions(self) -> dict[str, str]:
        """Versions of what computes the features beside PyTorch and transformers, by name."""
        return {name: sys.modules[name].__version__ for name in self.engine.libraries if name in sys.modules}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.engine.dtype

    @property
    def max_text_length(self) -> int:
        """The longest text that is not cut, in tokens, special ones included."""
        return self.engine.max_text_length

    @property
    def dim(self) -> int:
        """The number of dimensions P of the embeddings; of an encoder that is new, by encoding a text."""
        if self._dim is None:
            self._dim = self.encode_texts(["a"], progress=False).shape[1]
        return self._dim

    def encode_texts(
        self, texts: Iterable[str], *, batch_size: int = 64, max_length: int | None = None, progress: bool = True
    ) -> torch.Tensor:
        """
        Encodes texts as normalised embeddings.

        Texts are encoded with others of similar length, so that little is padded, and cut at the length the model
        takes; how many were cut is logged once. An embedding does not depend on the other texts.

        Args:
            texts (`Iterable[str]`): the texts.
            batch_size (`int`, *optional*, defaults to 64):
                Texts of full length in a batch, at most. Shorter texts share the same number of tokens, so more of
                them fit.
            max_length (`int`, *optional*): tokens to cut the texts at; by default as many as the model takes.
            progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

        Returns:
            `torch.Tensor`: float32 on the CPU, of shape [N, P], each row of length 1, in the order of `texts`.

        Raises:
            TypeError: if `texts` is not a list (or other iterable) of strings.
            ValueError:
                If a text is not valid Unicode, the features are not finite, or the model does not take `max_length`.
        """
        rows: dict[int, torch.Tensor] = {}
        cut = 0
        for index, embedding, was_cut in self.iterate_texts(
            texts, batch_size=batch_size, max_length=max_length, progress=progress
        ):
            rows[index] = embedding
            cut += was_cut
        warn_of_cut_texts(cut, len(rows), max_length or self.max_text_length)
        if not rows:
            return torch.zeros(0, self.dim)
        return torch.stack([rows[index] for index in range(len(rows))])

    def encode_images(
        self, images: Iterable[ImageSource], *, batch_size: int = 32, progress: bool = True
    ) -> torch.Tensor:
        """
        Encodes images as normalised embeddings. Files are read and prepared in threads.

        Args:
            images (`Iterable`):
                The images: paths, bytes of image files, PIL images or arrays; see [`~lotlip_hf.images.load_image`].
            batch_size (`int`, *optional*, defaults to 32): images in a batch.
            progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

        Returns:
            `torch.Tensor`: float32 on the CPU, of shape [N, P], each row of length 1, in the order of `images`.

        Raises:
            TypeError: if `images` is not a list (or other iterable) of images.
            ImageError: if an image cannot be read; the message names it.
        """
        rows = []
        for _, result in self.iterate_images(images, batch_size=batch_size, progress=progress):
            if isinstance(result, ImageError):
                raise result
            rows.append(result)
        if not rows:  # one image is encoded for the width
            return self.encode_images([Image.new("RGB", (1, 1))], progress=False)[:0]
        return torch.stack(rows)

    def iterate_texts(
        self,
        texts: Iterable[str],
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        progress: bool = False,
        total: int | None = None,
    ) -> Iterator[tuple[int, torch.Tensor, bool]]:
        """
        Encodes texts and yields each embedding as soon as it is computed. Arguments and errors as in `encode_texts`.

        Args:
            total (`int`, *optional*): number of texts, for the progress bar, if `texts` has no length.

        Yields:
            `tuple[int, torch.Tensor, bool]`: the text's index in `texts`, its embedding [P], and whether the text was
            cut; not in order.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise TypeError(f"`texts` must be a list of strings, got one {type(texts).__name__}: pass [text].")
        _check_batch_size(batch_size)
        longest = self.max_text_length
        if max_length is None:
            max_length = longest
        elif not MIN_LENGTH <= max_length <= longest:
            raise ValueError(
                f"`max_length` must be from {MIN_LENGTH} to the {longest} tokens that the model takes, "
                f"got {max_length}."
            )
        total = _length(texts) if total is None else total
        with progress_bar(total=total, desc="Encoding texts", unit="text", shown=progress) as bar:
            batches = self._text_batches(texts, batch_size, max_length)
            for batch, embeddings in self._embed_batches(self.engine.text_features, batches):
                bar.update(len(batch))
                for (index, was_cut), embedding in zip(batch, embeddings, strict=True):
                    yield index, embedding, was_cut

    def _text_batches(
        self, texts: Iterable[str], batch_size: int, max_length: int
    ) -> Iterator[tuple[list[tuple[int, bool]], dict[str, torch.Tensor]]]:
        """Batches of texts of similar length: each text's index, whether it was cut, and the model's inputs."""
        engine = self.engine
        tokens = batch_size * max_length
        if engine.device.type == "cpu":
            tokens = min(tokens, CPU_TOKENS)
        count, remaining = 0, iter(texts)
        while chunk := list(itertools.islice(remaining, TEXT_CHUNK)):
            for index, text in enumerate(chunk, count):
                _check_text(text, index)
            encoded, was_cut = engine.tokenize(chunk, max_length)
            lengths = [len(ids) for ids in encoded["input_ids"]]
            # Longest first: if memory does not suffice, it shows at once.
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
        self, images: Iterable[ImageSource], *, batch_size: int = 32, progress: bool = False
    ) -> Iterator[tuple[int, torch.Tensor | ImageError]]:
        """
        Encodes images and yields each embedding as soon as it is computed. Arguments as in `encode_images`.

        Yields:
            `tuple[int, torch.Tensor | ImageError]`: the image's index in `images` and its embedding [P], or the error
            if it cannot be read; errors come early, embeddings in order.
        """
        if isinstance(images, ImageSource) or not isinstance(images, Iterable):
            raise TypeError(f"`images` must be a list of images, got one {type(images).__name__}: pass [image].")
        _check_batch_size(batch_size)
        engine = self.engine

        def opened() -> Iterator[tuple[int, ImageSource | ImageError]]:
            # Files are read in the threads. An image in memory may be there twice, and PIL loads it on first use.
            for index, source in enumerate(images):
                if isinstance(source, str | os.PathLike | bytes):
                    yield index, source
                    continue
                try:
                    yield index, engine.open(source, f"images[{index}]")
                except ImageError as error:
                    yield index, error

        def read(item: tuple[int, ImageSource | ImageError]) -> tuple[int, dict[str, torch.Tensor] | ImageError]:
            index, source = item
            if isinstance(source, ImageError):
                return index, source
            name = None if isinstance(source, str | os.PathLike) else f"images[{index}]"
            try:
                return index, engine.pixels(source, name)
            except ImageError as error:
                return index, error

        ready: list[tuple[int, dict[str, torch.Tensor]]] = []

        def embed_ready() -> Iterator[tuple[int, torch.Tensor]]:
            batch, ready[:] = list(ready), []
            inputs = {key: torch.cat([values[key] for _, values in batch]) for key in batch[0][1]}
            embeddings = self._fetch(_normalized(engine.image_features(inputs)))
            for (index, _), embedding in zip(batch, embeddings, strict=True):
                bar.update()
                yield index, embedding

        with progress_bar(total=_length(images), desc="Encoding images", unit="image", shown=progress) as bar:
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

    def fingerprint(self, modality: Modality) -> str:
        """
        Names what makes the embeddings of a modality: that tower's weights and configuration, and how its input is
        prepared.

        The same weights give the same fingerprint wherever they lie; other weights, in another dtype too, never do.

        Args:
            modality (`str`): `"image"` or `"text"`.

        Returns:
            `str`: 32 hexadecimal digits.
        """
        settings = {"version": FORMAT_VERSIONS[modality], "modality": modality, **self.engine.settings(modality)}
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
        for name, tensor in self.engine.weights(modality):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _embed_batches(
        self,
        features: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        batches: Iterable[tuple[Any, dict[str, torch.Tensor]]],
    ) -> Iterator[tuple[Any, torch.Tensor]]:
        """Each batch's embeddings [B, P] on the CPU, in order.

        A device computes while Python goes on, so its results are fetched when the next batch is under way.
        """
        waiting: list[tuple[Any, torch.Tensor]] = []
        ahead = 0 if self.device.type == "cpu" else 1
        try:
            for batch, inputs in batches:
                waiting.append((batch, _normalized(features(inputs))))
                if len(waiting) > ahead:
                    batch, embeddings = waiting.pop(0)
                    yield batch, self._fetch(embeddings)
        except Exception:
            # What was computed before an error is not lost.
            for batch, embeddings in waiting:
                yield batch, self._fetch(embeddings)
            raise
        for batch, embeddings in waiting:
            yield batch, self._fetch(embeddings)

    def _fetch(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The embeddings on the CPU, as an ordinary tensor, which autograd takes."""
        embeddings = embeddings.cpu()
        self._dim = embeddings.shape[-1]
        if not torch.isfinite(embeddings).all():
            raise ValueError(f"The model's features are not finite (its dtype is {self.dtype}): try another dtype.")
        return embeddings.clone()


def load_encoder(
    name_or_path: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
) -> Encoder:
    """
    Loads a dual encoder with its processor, and refuses a checkpoint that does not fit.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A checkpoint folder or a Hub id: LoTLIP, or a stock dual encoder (CLIP, SigLIP, ...); or a folder that
            `lotlip convert onnx` wrote; or a model of open_clip, such as
            `"open_clip:ViT-B-32-quickgelu/openai"` (names: [`~lotlip_hf.engines.open_clip.load_open_clip`]).
        device (`str` or `torch.device`, *optional*):
            Where to put the model; by default the accelerator, if there is one.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Of the weights; `"auto"` keeps the checkpoint's.
        revision (`str`, *optional*): branch, tag or commit of a Hub id.

    Returns:
        [`Encoder`]: the encoder.

    Raises:
        ValueError, OSError: as [`~lotlip_hf.loading.load_model`], and if `revision` is of something that has none.
        ImportError: if open_clip or ONNX Runtime is missing; the message says what to install.
    """
    name = os.fspath(name_or_path)
    if name.startswith(OPEN_CLIP):
        if revision is not None:
            raise ValueError(
                f"{name}: open_clip takes the main branch, not `revision` {revision!r}. Fetch it (hf download "
                f"ORG/NAME --revision {revision} --local-dir FOLDER) and load {OPEN_CLIP}local-dir:FOLDER."
            )
        return Encoder.from_engine(load_open_clip(name, device, dtype))
    if revision is None and is_onnx(name):
        return Encoder.from_engine(load_onnx(name, device, dtype))
    return Encoder(*load_model(name, device=device, dtype=dtype, revision=revision))


def warn_of_cut_texts(cut: int, count: int, max_length: int) -> None:
    """Says how many of `count` texts were cut at `max_length` tokens, if any were."""
    if cut:
        logger.warning("%d of %d texts were cut at %d tokens.", cut, count, max_length)


def _length(items: Iterable[Any]) -> int | None:
    return len(items) if hasattr(items, "__len__") else None  # pyright: ignore[reportArgumentType]


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a whole number of at least 1, got {batch_size!r}.")


def _check_text(text: Any, index: int) -> None:
    if not isinstance(text, str):
        raise TypeError(f"texts[{index}] must be a string, got {type(text).__name__}.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"texts[{index}] has {len(text):,} characters, more than {MAX_CHARACTERS:,}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"texts[{index}] is not valid Unicode at character {error.start} ({error.reason})."
        ) from error


def _rows_of_similar_length(lengths: list[int]) -> int:
    """How many of these texts, the longest first, to encode together: more padding would cost more than a batch."""
    longest = max(1, lengths[0])
    enough = -(-ENOUGH_TOKENS // longest)
    return next((row for row in range(enough, len(lengths)) if lengths[row] < SIMILAR_LENGTH * longest), len(lengths))


def _normalized(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


def _map_ahead(function: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """`map` in threads, in order, with at most `ahead` results waiting."""
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
