"""Texts and images to normalised embeddings, in batches, with any dual encoder that has CLIP's feature functions."""

import itertools
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.file_download import repo_folder_name
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .engines.onnx import FILES as ONNX_FILES
from .engines.onnx import LoTLIPOnnxModel
from .files import MAX_CHARACTERS
from .images import ImageError, ImageSource, background_of, load_image, load_pixels, processed_size
from .loading import check_config, check_processor, check_shards, naming_damage
from .modeling.calls_lotlip import for_one_call, free_of_calls
from .modeling.loading_lotlip import checked_download
from .modeling.modeling_lotlip import LoTLIPModel
from .modeling.tokenization_lotlip import LoTLIPTokenizer

logger = logging.getLogger(__name__)

# Texts are tokenised and sorted by length this many at a time.
TEXT_CHUNK = 4096
# A batch of as many tokens keeps a processor busy; in a larger one no text is much shorter than the longest.
ENOUGH_TOKENS = 1024
# On a CPU a larger one costs more: what a layer of BERT-base computes is then so large (32 MB) that the memory for it
# comes fresh from the system each time.
CPU_TOKENS = 2048
SIMILAR_LENGTH = 0.9
NOT_SET = 1_000_000  # transformers has 1e30 for a limit that is not set
# Two special tokens and a word.
MIN_LENGTH = 3
# SigLIP's text tower reads the last position and takes no mask, and open_clip's add all their positions: such texts
# are always padded to the full length.
FULL_LENGTH_MODEL_TYPES = ("siglip", "siglip2", "open_clip")
# These number a text's positions from `pad_token_id + 1` on, and what is before is none of its length.
POSITIONS_AFTER_PADDING = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "mpnet"),
    "altclip_text_model",
)
# How names of open_clip's models begin
OPEN_CLIP = "open_clip:"


def load_model(
    name_or_path: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """
    Loads a dual encoder and its processor, and refuses a checkpoint that does not fit.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A checkpoint folder or a Hub id: LoTLIP, or a stock dual encoder (CLIP, SigLIP, ...); or a folder that
            `lotlip convert onnx` wrote; or a model of open_clip's, such as
            `"open_clip:ViT-B-32-quickgelu/openai"` (names: [`~lotlip_hf.engines.open_clip.load_open_clip`]).
        device (`str` or `torch.device`, *optional*):
            Where to put the model; by default the accelerator, if there is one.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Of the weights; `"auto"` keeps the checkpoint's.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub id. Configuration, weights and processor are of one commit, which is kept as
            `model.config._commit_hash`.

    Returns:
        `tuple`: the model in evaluation mode, and its processor.

    Raises:
        ValueError:
            If the checkpoint is of an architecture without image and text features, if a weight is missing, unknown or
            of another shape, or if there is no tokenizer or no image processor; the message names the checkpoint. If
            `device` is not to be had, or `revision` is of something that has none.
        OSError: if the checkpoint is not found.
        ImportError: if open_clip or ONNX Runtime is needed and not there; the message says what to install.
    """
    name = os.fspath(name_or_path)
    if name.startswith(OPEN_CLIP):
        from .engines.open_clip import load_open_clip  # here, as it needs this module

        if revision is not None:
            raise ValueError(
                f"{name}: open_clip takes the main branch, not `revision` {revision!r}. Fetch it (hf download "
                f"ORG/NAME --revision {revision} --local-dir FOLDER) and load {OPEN_CLIP}local-dir:FOLDER."
            )
        model, processor = load_open_clip(name, _usable(device), dtype)
        # no PreTrainedModel, but with the methods that are called here
        return cast(PreTrainedModel, model), processor
    if revision is not None and os.path.isdir(name):
        raise ValueError(f"`revision` {revision!r} is of models on the Hub; {name} is a folder.")
    if os.path.isfile(name):
        raise ValueError(
            f"{name} is a file, not a checkpoint folder; `lotlip convert official` makes one of an official model.pt."
        )
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(f"{name}: no such checkpoint folder.")
    if any(os.path.isfile(os.path.join(name, file)) for file in ONNX_FILES.values()):
        with naming_damage(name):
            model, processor = LoTLIPOnnxModel.from_pretrained(name), _load_processor(name)
        try:
            model.to(device="cpu" if device is None else device)  # refuses all but the CPU
        except RuntimeError as error:
            raise ValueError(
                f"`device` {str(device)!r} cannot be used here ({str(error).splitlines()[0]})."
            ) from error
        if dtype != "auto":
            model.to(dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if "vision" in model.sessions and hasattr(processor, "image_processor"):
            made, taken = processed_size(processor.image_processor), tuple(model.image_shape[1:])
            if made != taken and all(isinstance(side, int) for side in taken):
                raise ValueError(
                    f"{name}: the image tower takes {taken[0]} x {taken[1]} pixels, the processor makes {made[0]} x "
                    f"{made[1]}: export the checkpoint again with `lotlip convert onnx`."
                )
        # no PreTrainedModel, but with the methods that are called here
        model = cast(PreTrainedModel, model)
        if hasattr(processor, "tokenizer"):
            fit_tokenizer(model, processor.tokenizer)
        return model, processor
    device = _usable(device)
    with naming_damage(name, revision), checked_download(name):
        return _load(name, device, dtype, revision)


def cached_commit(repo_id: str, revision: str | None = None) -> str | None:
    """
    The commit that a branch or tag stood for when something was last loaded from it.

    Args:
        repo_id: Of a model on the Hub.
        revision: Branch, tag or commit; by default the main branch.

    Returns:
        40 hexadecimal digits; `None` if the cache does not have it.
    """
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))
    reference = folder / "refs" / (revision or "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def _usable(device: str | torch.device | None) -> str | torch.device:
    """The device, by default the accelerator if there is one, or a `ValueError` if it is not to be had."""
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` {str(device)!r} cannot be used here ({str(error).splitlines()[0]}).") from error
    return device or "cpu"


def _load(
    name: str, device: str | torch.device, dtype: str | torch.dtype, revision: str | None
) -> tuple[PreTrainedModel, Any]:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except OSError as error:
        if name in str(error):
            raise
        raise OSError(f"{name}: no such checkpoint folder, and not to be had from the Hub ({error})") from error
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{name}: {error}") from error
    check_config(config, name)
    check_shards(name)
    # Weights and processor are of the same commit, even if somebody pushes in between.
    commit = None if os.path.isdir(name) else cached_commit(name, revision)
    revision = commit or revision
    model_class = AutoModel._model_mapping.get(type(config), None)
    needed = ("get_text_features", "get_image_features")
    if model_class is None or not all(hasattr(model_class, function) for function in needed):
        raise ValueError(
            f"{name} is a {config.model_type!r} checkpoint, which does not encode both images and texts; expected "
            "LoTLIP or another dual encoder such as CLIP or SigLIP."
        )

    # What does not fit is said once, by the error below, rather than by transformers' report as well.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, info = AutoModel.from_pretrained(
            name,
            config=config,
            revision=revision,
            trust_remote_code=False,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError):
        raise
    except Exception as error:  # safetensors and torch raise their own kinds on a damaged file
        raise ValueError(f"{name}: the weights cannot be read ({error}).") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    problems = [
        f"{len(keys)} {kind}: {', '.join(sorted(keys)[:5])}{', ...' if len(keys) > 5 else ''}"
        for kind, keys in {
            "missing": info["missing_keys"],
            "unexpected": info["unexpected_keys"],
            "of another shape": [key for key, *_ in info["mismatched_keys"]],
        }.items()
        if keys
    ]
    if problems:
        raise ValueError(f"{name}: the weights do not fit a {type(model).__name__} ({'; '.join(problems)}).")

    model.config._commit_hash = commit  # where older transformers kept it
    processor = _load_processor(name, revision)
    for part in ("tokenizer", "image_processor"):
        if not hasattr(processor, part):
            raise ValueError(
                f"{name} has no {part}: save the model's processor beside it (`processor.save_pretrained(folder)`)."
            )
    fit_tokenizer(model, processor.tokenizer)
    return model.to(device).eval(), processor


def _load_processor(name: str, revision: str | None = None) -> Any:
    processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    check_processor(processor, name)
    return processor


def encode_texts(
    model: PreTrainedModel,
    processor: Any,
    texts: Iterable[str],
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """
    Encodes texts as normalised embeddings.

    Texts are encoded with others of similar length, so that little is padded, and cut at the length the model takes;
    how many were cut is logged once. An embedding does not depend on the other texts. The model's mode is left as it
    was.

    Args:
        model (`PreTrainedModel`): LoTLIP, or any model with CLIP's `get_text_features`.
        processor (`ProcessorMixin`): the model's processor (or just its tokenizer).
        texts (`Iterable[str]`): the texts; it is not changed.
        batch_size (`int`, *optional*, defaults to 64):
            Texts of full length in a batch, at most. Shorter texts share the same number of tokens, so more of them
            fit.
        max_length (`int`, *optional*): tokens to cut the texts at; by default as many as the model takes.
        device (`str` or `torch.device`, *optional*): moves the model there first; by default it stays where it is.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        `torch.Tensor`: float32 on the CPU, of shape [N, P], each row of length 1, in the order of `texts`.

    Raises:
        TypeError: if `texts` is not a list (or other iterable) of strings.
        ValueError:
            If a text is not valid Unicode, the model's features are not finite, or it does not take `max_length`.

    Example:

    ```python
    >>> from lotlip_hf import encode_images, encode_texts
    >>> from lotlip_hf.encoder import load_model

    >>> model, processor = load_model("path/to/checkpoint")  # doctest: +SKIP
    >>> texts = encode_texts(model, processor, ["a dog", "a cat"])  # doctest: +SKIP
    >>> scores = texts @ encode_images(model, processor, ["dog.jpg"]).T  # doctest: +SKIP
    ```
    """
    rows: dict[int, torch.Tensor] = {}
    cut = 0
    for index, embedding, was_cut in iterate_text_embeddings(
        model, processor, texts, batch_size=batch_size, max_length=max_length, device=device, progress=progress
    ):
        rows[index] = embedding
        cut += was_cut
    if not rows:  # no texts: one is encoded for the width
        return encode_texts(model, processor, [""], device=device, progress=False)[:0]
    warn_of_cut_texts(cut, len(rows), max_length or max_text_length(model, getattr(processor, "tokenizer", processor)))
    return torch.stack([rows[index] for index in range(len(rows))])


def encode_images(
    model: PreTrainedModel,
    processor: Any,
    images: Iterable[ImageSource],
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """
    Encodes images as normalised embeddings.

    Images are read while the model runs, two batches ahead, so any number of paths takes no more memory than that.
    See [`~lotlip_hf.images.load_image`] for what can be read, and for how large JPEG files are read for the image
    processor; to have those decoded whole, pass `map(load_image, paths)`. The model's mode is left as it was.

    Args:
        model (`PreTrainedModel`): LoTLIP, or any model with CLIP's `get_image_features`.
        processor (`ProcessorMixin`): the model's processor (or just its image processor).
        images (`Iterable`): paths, PIL images or arrays; it is not changed.
        batch_size (`int`, *optional*, defaults to 32): images in a batch.
        device (`str` or `torch.device`, *optional*): moves the model there first; by default it stays where it is.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        `torch.Tensor`: float32 on the CPU, of shape [N, P], each row of length 1, in the order of `images`.

    Raises:
        ImageError: on the first image that cannot be read; the message names it. `iterate_image_embeddings` goes on.
        TypeError: if `images` is not a list (or other iterable) of images.
        ValueError: if the model's features are not finite.
    """
    rows: dict[int, torch.Tensor] = {}
    for index, result in iterate_image_embeddings(
        model, processor, images, batch_size=batch_size, device=device, progress=progress
    ):
        if isinstance(result, ImageError):
            raise result
        rows[index] = result
    if not rows:  # no images: one is encoded for the width
        return encode_images(model, processor, [Image.new("RGB", (1, 1))], device=device, progress=False)[:0]
    return torch.stack([rows[index] for index in range(len(rows))])


def iterate_text_embeddings(
    model: PreTrainedModel,
    processor: Any,
    texts: Iterable[str],
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    total: int | None = None,
) -> Iterator[tuple[int, torch.Tensor, bool]]:
    """
    Encodes texts and hands each embedding out as soon as it is computed. Arguments and errors as in `encode_texts`.

    Args:
        total (`int`, *optional*): number of texts, for the progress bar, if `texts` is an iterator without a length.

    Yields:
        `tuple[int, torch.Tensor, bool]`: the text's place in `texts`, its embedding [P], and whether the text was cut;
        not in order.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"`texts` must be a list of strings, got one {type(texts).__name__}: pass [text].")
    _check_batch_size(batch_size)
    if device is not None:
        model.to(torch.device(device))
    tokenizer = getattr(processor, "tokenizer", processor)
    longest = max_text_length(model, tokenizer)
    if max_length is None:
        max_length = longest
    elif not MIN_LENGTH <= max_length <= longest:
        raise ValueError(
            f"`max_length` must be from {MIN_LENGTH} to the {longest} tokens that the model takes, got {max_length}."
        )
    full_length = model.config.model_type in FULL_LENGTH_MODEL_TYPES

    def batches() -> Iterator[tuple[list[tuple[int, bool]], dict[str, torch.Tensor]]]:
        count, remaining = 0, iter(texts)
        while chunk := list(itertools.islice(remaining, TEXT_CHUNK)):
            for index, text in enumerate(chunk, count):
                _check_text(text, index)
            encoded, was_cut = _tokenize(tokenizer, chunk, max_length)
            lengths = [len(ids) for ids in encoded["input_ids"]]
            # Longest first: if memory does not suffice, it shows at once.
            order = sorted(range(len(chunk)), key=lambda index: -lengths[index])
            while order:
                width = longest if full_length else lengths[order[0]]
                tokens = batch_size * max_length
                if model.device.type == "cpu":
                    tokens = min(tokens, CPU_TOKENS)
                rows = max(1, tokens // max(1, width))
                if not full_length:
                    rows = _rows_of_similar_length([lengths[index] for index in order[:rows]])
                batch, order = order[:rows], order[rows:]
                inputs = _pad(
                    tokenizer,
                    {key: [values[index] for index in batch] for key, values in encoded.items()},
                    {"padding": "max_length", "max_length": longest} if full_length else {"padding": "longest"},
                )
                yield [(count + index, was_cut[index]) for index in batch], inputs
            count += len(chunk)

    with tqdm(
        total=_length(texts) if total is None else total, desc="Encoding texts", unit="text", disable=not progress
    ) as bar:
        for batch, embeddings in _embed_batches(model, "get_text_features", batches()):
            bar.update(len(batch))
            for (index, was_cut), embedding in zip(batch, embeddings, strict=True):
                yield index, embedding, was_cut


def iterate_image_embeddings(
    model: PreTrainedModel,
    processor: Any,
    images: Iterable[ImageSource],
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, torch.Tensor | ImageError]]:
    """
    Encodes images and hands each embedding out as soon as it is computed. Arguments as in `encode_images`.

    Yields:
        `tuple[int, torch.Tensor | ImageError]`: the image's place in `images` and its embedding [P], or the error if
        it cannot be read; errors come early, embeddings in order.
    """
    if isinstance(images, ImageSource) or not isinstance(images, Iterable):
        raise TypeError(f"`images` must be a list of images, got one {type(images).__name__}: pass [image].")
    _check_batch_size(batch_size)
    if device is not None:
        model.to(torch.device(device))
    settings: dict[str, Any] = {
        "image_processor": getattr(processor, "image_processor", processor),
        "background": background_of(processor),
    }

    def opened() -> Iterator[tuple[int, ImageSource | ImageError]]:
        # Files are read in the threads; what is in memory already may be there twice, and PIL loads it on first use.
        for index, source in enumerate(images):
            if isinstance(source, str | os.PathLike | bytes):
                yield index, source
                continue
            try:
                yield index, load_image(source, f"images[{index}]", **settings)
            except ImageError as error:
                yield index, error

    def read(item: tuple[int, ImageSource | ImageError]) -> tuple[int, dict[str, torch.Tensor] | ImageError]:
        index, source = item
        if isinstance(source, ImageError):
            return index, source
        name = None if isinstance(source, str | os.PathLike) else f"images[{index}]"
        try:
            return index, load_pixels(source, name, **settings)
        except ImageError as error:
            return index, error

    ready: list[tuple[int, dict[str, torch.Tensor]]] = []

    def embed_ready() -> Iterator[tuple[int, torch.Tensor]]:
        batch, ready[:] = list(ready), []
        inputs = {key: torch.cat([values[key] for _, values in batch]) for key in batch[0][1]}
        embeddings = _fetch(model, _embed(model, "get_image_features", inputs))
        for (index, _), embedding in zip(batch, embeddings, strict=True):
            bar.update()
            yield index, embedding

    with tqdm(total=_length(images), desc="Encoding images", unit="image", disable=not progress) as bar:
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


def max_text_length(model: PreTrainedModel, tokenizer: Any) -> int:
    """
    The longest text that a model takes, in tokens, special ones included.

    Args:
        model (`PreTrainedModel`): the model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.

    Returns:
        `int`: `tokenizer.model_max_length`, or the number of the text tower's positions if that is less.

    Raises:
        ValueError: if neither is known.
    """
    length = min(tokenizer.model_max_length, _positions(model) or tokenizer.model_max_length)
    if length > NOT_SET:
        raise ValueError("`tokenizer.model_max_length` is not set: set it to the number of tokens the model takes.")
    return length


def fit_tokenizer(model: PreTrainedModel, tokenizer: Any, max_length: int | None = None) -> None:
    """
    Makes a tokenizer and its model agree on the longest text: sets `tokenizer.model_max_length`, which decides
    wherever texts are cut, and removes the settings of earlier calls.

    Args:
        model (`PreTrainedModel`): the model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, changed in place.
        max_length (`int`, *optional*): tokens of the longest text, special ones included; by default what
            [`max_text_length`] gives, where that is known.

    Raises:
        ValueError: if the model takes fewer than `max_length` tokens.
    """
    positions = _positions(model)
    if max_length is not None and positions and max_length > positions:
        raise ValueError(f"`max_text_length` is {max_length}, but the model takes {positions} tokens.")
    free_of_calls(tokenizer)
    said = tokenizer.model_max_length
    if max_length is not None:
        tokenizer.model_max_length = max_length
    elif positions and said > positions:
        tokenizer.model_max_length = positions
        if said <= NOT_SET:
            logger.warning(
                "The tokenizer of %s says `model_max_length` %d, but the model takes %d tokens: texts are cut at %d.",
                getattr(model, "name_or_path", "") or type(model).__name__,
                said,
                positions,
                positions,
            )


def _positions(model: PreTrainedModel) -> int | None:
    """The tokens that a model's text tower has positions for, special ones included, if its configuration says so."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in POSITIONS_AFTER_PADDING:
        positions -= config.pad_token_id + 1
    return positions


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


def _tokenize(tokenizer: Any, texts: list[str], max_length: int) -> tuple[dict[str, list[list[int]]], list[bool]]:
    """Token ids of each text, not padded, and whether it was cut."""
    if isinstance(tokenizer, LoTLIPTokenizer) and "token_type_ids" not in tokenizer.model_input_names:
        input_ids, was_cut = tokenizer.encode_unpadded(texts, max_length)
        return {"input_ids": input_ids}, was_cut  # `pad` adds the masks
    encoded = for_one_call(tokenizer)(texts, truncation=True, max_length=max_length, verbose=False)
    if encoded.encodings is not None:
        return dict(encoded), [bool(encoding.overflowing) for encoding in encoded.encodings]
    # Tokenizers without the Rust backend do not tell what they cut: the full texts do.
    full = [index for index, ids in enumerate(encoded["input_ids"]) if len(ids) >= max_length]
    was_cut = [False] * len(texts)
    if full:
        whole = tokenizer([texts[index] for index in full], truncation=False, verbose=False)["input_ids"]
        for index, ids in zip(full, whole, strict=True):
            was_cut[index] = len(ids) > max_length
    return dict(encoded), was_cut


def _rows_of_similar_length(lengths: list[int]) -> int:
    """How many of these texts, the longest first, to encode together: more padding would cost more than a batch."""
    longest = max(1, lengths[0])
    enough = -(-ENOUGH_TOKENS // longest)
    return next((row for row in range(enough, len(lengths)) if lengths[row] < SIMILAR_LENGTH * longest), len(lengths))


def _pad(tokenizer: Any, encoded: dict[str, list[list[int]]], padding: dict[str, Any]) -> dict[str, torch.Tensor]:
    # `pad` advises calling the tokenizer instead, which cannot sort by length first.
    warned = tokenizer.deprecation_warnings.get("Asking-to-pad-a-fast-tokenizer", False)
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    try:
        padded = tokenizer.pad(encoded, **padding)
        # NumPy reads lists several times as fast as `return_tensors="pt"`.
        return {key: torch.from_numpy(np.asarray(rows, dtype=np.int64)) for key, rows in padded.items()}
    finally:
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = warned


def _embed_batches(
    model: PreTrainedModel, function: str, batches: Iterable[tuple[Any, dict[str, torch.Tensor]]]
) -> Iterator[tuple[Any, torch.Tensor]]:
    """Each batch's embeddings [B, P] on the CPU, in order.

    A device computes while Python goes on, so what it computed is fetched when the next batch is under way.
    """
    waiting: list[tuple[Any, torch.Tensor]] = []
    ahead = 0 if model.device.type == "cpu" else 1
    try:
        for batch, inputs in batches:
            waiting.append((batch, _embed(model, function, inputs)))
            if len(waiting) > ahead:
                batch, features = waiting.pop(0)
                yield batch, _fetch(model, features)
    except Exception:
        # What was computed before an error is not lost.
        for batch, features in waiting:
            yield batch, _fetch(model, features)
        raise
    for batch, features in waiting:
        yield batch, _fetch(model, features)


def _embed(model: PreTrainedModel, function: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Normalised features [B, P] in float32 on the model's device, the model's mode left as it was."""
    inputs = {
        key: values.to(model.device, model.dtype if values.is_floating_point() else None)
        for key, values in inputs.items()
    }
    in_training = [module for module in model.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        with torch.inference_mode():
            # of stock models every token's state is computed, though only the pooled one is asked for
            options = {"pooled_only": True} if isinstance(model, LoTLIPModel) else {}
            output = getattr(model, function)(**inputs, **options)
            features = output if isinstance(output, torch.Tensor) else output.pooler_output
            return torch.nn.functional.normalize(features.float(), dim=-1)
    finally:
        for module in in_training:
            module.training = True


def _fetch(model: PreTrainedModel, features: torch.Tensor) -> torch.Tensor:
    """The features on the CPU, as an ordinary tensor, which autograd takes."""
    features = features.cpu()
    if not torch.isfinite(features).all():
        raise ValueError(f"The model's features are not finite (its dtype is {model.dtype}): try another dtype.")
    return features.clone()


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
