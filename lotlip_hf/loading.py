"""Checkpoints from outside: checks before they are loaded, and errors that name the file."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from .files import parse_json, printable, read_regular
from .images import background_of, checked_background
from .modeling.processing_lotlip import check_image_sizes

MAX_LAYERS = 1024
MAX_SIZE = 1 << 24
SWITCHES = ("output_attentions", "output_hidden_states", "return_dict")
SIZES = ("_size", "_dim", "_dims", "_embeddings", "_length")


def check_shards(folder: str | os.PathLike) -> None:
    """
    Checks that a checkpoint's weights are in files of its own folder.

    Args:
        folder (`str` or `os.PathLike`): the checkpoint's folder; nothing is looked at of a Hub id.

    Raises:
        ValueError: if a file lies elsewhere, or the index of the weights is damaged.
    """
    for path in sorted(Path(folder).glob("*.index.json")):
        try:
            names = parse_json(read_regular(path))["weight_map"].values()
            wrong = [
                name for name in names if not isinstance(name, str) or name != Path(name).name or name in ("", "..")
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: no index of weights ({type(error).__name__}: {error}).") from error
        if wrong:
            raise ValueError(f"{path}: names {wrong[0]!r}, which is no file of this folder.")


def check_config(config: PreTrainedConfig, name: str | os.PathLike) -> None:
    """
    Refuses a configuration whose model no machine has room for, or that transformers takes and later fails on.

    Args:
        config (`PreTrainedConfig`): the configuration.
        name (`str` or `os.PathLike`): what the error calls the checkpoint.

    Raises:
        ValueError: if a number of layers, heads, dimensions, ... is negative or too large, or a switch is no boolean.
    """

    def check(settings: dict[str, Any]) -> None:
        for key, value in settings.items():
            if isinstance(value, dict):
                check(value)
            elif key in SWITCHES and value not in (None, True, False):
                raise ValueError(f"{name}: config.json has {key} {value!r}; expected true or false.")
            elif str(key).startswith("num_") or str(key).endswith(SIZES):
                most = MAX_LAYERS if "layers" in key else MAX_SIZE
                numbers = value if isinstance(value, list | tuple) else [value]
                if any(isinstance(one, int) and not -1 <= one <= most for one in numbers):
                    raise ValueError(f"{name}: config.json has {key} {value!r}; expected at most {most}.")
                if str(key).startswith("num_") and -1 in numbers:
                    raise ValueError(f"{name}: config.json has {key} {value!r}; expected a number from 0 up.")

    check(config.to_dict())


def check_processor(processor: Any, name: str | os.PathLike) -> None:
    """
    Checks a processor's settings, and prepares a text and a picture: libraries notice wrong types only then.

    Args:
        processor (`ProcessorMixin`): the processor, or a tokenizer or an image processor alone.
        name (`str` or `os.PathLike`): what the error calls the checkpoint.

    Raises:
        ValueError: if a setting makes no sense. Libraries raise errors of other kinds, see [`naming_damage`].
    """
    checked_background(background_of(processor))
    if hasattr(processor, "image_processor"):
        check_image_sizes(processor.image_processor, os.fspath(name))
        with np.errstate(all="ignore"):
            pixels = processor.image_processor(images=[Image.new("RGB", (8, 8))], return_tensors="pt")["pixel_values"]
        if not torch.as_tensor(pixels).isfinite().all():
            raise ValueError(f"{name}: with the image processor's settings pixels are not finite.")
    if hasattr(processor, "tokenizer"):
        limit = processor.tokenizer.model_max_length
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"{name}: the tokenizer's model_max_length is {limit!r}, expected a number of tokens.")
        processor.tokenizer(["a"])


@contextlib.contextmanager
def naming_damage(name: str, revision: str | None = None) -> Iterator[None]:
    """
    Loading in this context ends, where files are damaged or of wrong types, with a `ValueError` that names the
    checkpoint and the file. Libraries raise errors of any kind there.

    Args:
        name (`str`): a checkpoint folder or a Hub id.
        revision (`str`, *optional*): branch, tag or commit of a Hub id.

    Raises:
        ValueError: if the checkpoint is damaged.
        OSError: if it cannot be read; the message names it.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError | ValueError) and name in str(error):
            raise
        if isinstance(error, OSError):
            raise OSError(f"{name}: {error}") from error
        file, reason = _damaged_file(Path(name)) or (_damaged_part(name, revision), error)
        raise ValueError(f"{name}: {file} cannot be used ({type(error).__name__}: {printable(reason)}).") from error


def _damaged_file(folder: Path) -> tuple[str, Exception] | None:
    """The first file of settings in a folder that holds no JSON object, and the error."""
    for path in sorted(folder.glob("*.json")):
        try:
            content = parse_json(read_regular(path))
            if not isinstance(content, dict) and path.name != "modules.json":
                raise ValueError(f"expected a JSON object, got a {type(content).__name__}")
        except (OSError, ValueError) as error:
            return path.name, error
    return None


def _damaged_part(name: str, revision: str | None) -> str:
    """The part of a checkpoint that does not load by itself."""
    for part, loader in (("config.json", AutoConfig), ("the processor (processor_config.json, ...)", AutoProcessor)):
        try:
            loader.from_pretrained(name, revision=revision, trust_remote_code=False)
        except Exception:  # of any kind, as above
            return part
    return "config.json, the weights or the files of the processor"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and reports of transformers."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_strict(
    model_class: Any, path: str | os.PathLike, *, allow_unexpected: bool = False, subfolder: str = "", **kwargs: Any
) -> PreTrainedModel:
    """
    Loads a model whose weights are all in the checkpoint, with none left over.

    Args:
        model_class (`type[PreTrainedModel]`): the class.
        path (`str` or `os.PathLike`): a checkpoint folder or a Hub id.
        allow_unexpected (`bool`, *optional*, defaults to `False`):
            Whether the checkpoint may hold more, as a whole model does of which one tower is loaded.
        subfolder (`str`, *optional*): folder of the model in the checkpoint.
        kwargs: passed to `from_pretrained`.

    Returns:
        `PreTrainedModel`: the model in evaluation mode, by default in the precision of the checkpoint.

    Raises:
        ValueError: if weights are missing, unexpected or of another shape, or a file is damaged; the message names
            the checkpoint.
        OSError: if the checkpoint is not found.
    """
    name = os.path.join(path, subfolder) if subfolder else os.fspath(path)
    kwargs = {"dtype": "auto", "subfolder": subfolder, **kwargs}
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a damaged file safetensors, torch and transformers each raise their own
        kind, reason = OSError if isinstance(error, OSError) else ValueError, printable(" ".join(str(error).split()))
        raise kind(f"{name}: no {model_class.__name__} can be loaded ({reason}).") from error
    problems = []
    for kind, keys in info.items():
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
        if names and not (allow_unexpected and kind == "unexpected_keys"):
            more = ", ..." if len(names) > 5 else ""
            problems.append(f"{len(names)} {kind}: {', '.join(map(printable, names[:5]))}{more}")
    if problems:
        raise ValueError(f"{name}: not a complete {model_class.__name__} ({'; '.join(problems)}).")
    return model.eval()


def load_tokenizer(
    path: str | os.PathLike, advice: str, *, tokenizer_class: Any = AutoTokenizer, subfolder: str = ""
) -> PreTrainedTokenizerBase:
    """
    Loads a tokenizer.

    Args:
        path (`str` or `os.PathLike`): a folder or a Hub id.
        advice (`str`): what to do if there is none, for the error.
        tokenizer_class (`type`, *optional*, defaults to `AutoTokenizer`): the class.
        subfolder (`str`, *optional*): folder of the tokenizer in `path`.

    Raises:
        ValueError: if there is no tokenizer, or its files are damaged.
    """
    try:
        with quiet():
            tokenizer = tokenizer_class.from_pretrained(path, subfolder=subfolder, trust_remote_code=False)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ValueError("it has special tokens alone")  # what some classes make of no file
        return tokenizer
    except Exception as error:  # of a damaged tokenizer.json the tokenizers library raises a bare `Exception`
        name, reason = os.path.join(path, subfolder) if subfolder else os.fspath(path), " ".join(str(error).split())
        raise ValueError(f"{name}: no tokenizer can be loaded ({printable(reason)}); {advice}.") from error
