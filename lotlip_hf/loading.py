"""Checkpoints from outside: loaded strictly, with errors that name the checkpoint and what is wrong with it."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from . import auto as auto  # registers LoTLIP's classes
from .files import one_line, parse_json, printable, read_regular
from .images import background_of, checked_background
from .modeling.calls_lotlip import free_of_calls

logger = logging.getLogger(__name__)

MAX_LAYERS = 1024
MAX_SIZE = 1 << 24
SWITCHES = ("output_attentions", "output_hidden_states", "return_dict")
SIZES = ("_size", "_dim", "_dims", "_embeddings", "_length")
# No image tower takes more pixels a side; larger settings are an error, or fill the memory on purpose.
MAX_IMAGE_SIDE = 4096
NOT_SET = 1_000_000  # transformers has 1e30 for a limit that is not set
# Positions of these start at `pad_token_id + 1`, so the usable length is shorter.
POSITIONS_AFTER_PADDING = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "mpnet"),
    "altclip_text_model",
)


# Of transformers' loading info, in messages
PROBLEMS = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "of another shape"}


class LoadingError(ValueError):
    """A checkpoint that does not fit; the message names it and what is wrong."""


def load_model(
    name_or_path: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """
    Loads a dual encoder of transformers and its processor, and refuses a checkpoint that does not fit.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A checkpoint folder or a Hub id: LoTLIP, or a stock dual encoder (CLIP, SigLIP, ...).
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
            `device` is not available, or `revision` is given for a folder.
        OSError: if the checkpoint is not found.
    """
    name = checkpoint_name(name_or_path, revision)
    device = usable_device(device)
    with naming_damage(name, revision):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        # Weights and processor are of the same commit, even if the branch moves in between.
        commit = None if os.path.isdir(name) else cached_commit(name, revision)
        revision = commit or revision
        model_class = AutoModel._model_mapping.get(type(config), None)
        if not (hasattr(model_class, "get_text_features") and hasattr(model_class, "get_image_features")):
            raise LoadingError(
                f"{name} is a {config.model_type!r} checkpoint, which does not encode both images and texts; expected "
                "LoTLIP or another dual encoder such as CLIP or SigLIP."
            )
        model = load_strict(AutoModel, name, config=config, revision=revision, trust_remote_code=False, dtype=dtype)
        model.config._commit_hash = commit  # where older transformers kept it
        processor = load_processor(name, revision)
        for part in ("tokenizer", "image_processor"):
            if not hasattr(processor, part):
                raise LoadingError(
                    f"{name} has no {part}: save the model's processor beside it with "
                    "`processor.save_pretrained(folder)`."
                )
    fit_tokenizer(model, processor.tokenizer)
    model.to(device=device)
    return model, processor


def load_strict(
    model_class: Any,
    path: str | os.PathLike,
    *,
    allow_unexpected: bool = False,
    allow_missing: str | None = None,
    subfolder: str = "",
    **kwargs: Any,
) -> PreTrainedModel:
    """
    Loads a model whose weights are all in the checkpoint, with none left over.

    Args:
        model_class (`type[PreTrainedModel]`): the class.
        path (`str` or `os.PathLike`): a checkpoint folder or a Hub id.
        allow_unexpected (`bool`, *optional*, defaults to `False`):
            Whether the checkpoint may hold more, as a whole model does of which one tower is loaded.
        allow_missing (`str`, *optional*): weights with this in their names may be missing.
        subfolder (`str`, *optional*): folder of the model in the checkpoint.
        kwargs: passed to `from_pretrained`.

    Returns:
        `PreTrainedModel`: the model in evaluation mode, by default in the precision of the checkpoint.

    Raises:
        LoadingError: if weights are missing, unexpected or of another shape, or a file is damaged; the message names
            the checkpoint.
        OSError: if the checkpoint is not found.
    """
    name = os.path.join(path, subfolder) if subfolder else os.fspath(path)
    check_shards(name)
    if "config" in kwargs:
        check_config(kwargs["config"], name)
    kwargs = {"dtype": "auto", "subfolder": subfolder, **kwargs}
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a damaged file safetensors, torch and transformers each raise their own
        kind, reason = OSError if isinstance(error, OSError) else LoadingError, printable(one_line(error))
        raise kind(f"{name}: the weights cannot be read ({reason}).") from error
    problems = []
    for kind, keys in info.items():
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
        if kind == "missing_keys" and allow_missing:
            names = [name for name in names if allow_missing not in name]
        if names and not (allow_unexpected and kind == "unexpected_keys"):
            more = ", ..." if len(names) > 5 else ""
            problems.append(f"{len(names)} {PROBLEMS.get(kind, kind)}: {', '.join(map(printable, names[:5]))}{more}")
    if problems:
        raise LoadingError(f"{name}: the weights do not fit a {type(model).__name__} ({'; '.join(problems)}).")
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
        LoadingError: if there is no tokenizer, or its files are damaged.
    """
    try:
        with quiet():
            tokenizer = tokenizer_class.from_pretrained(path, subfolder=subfolder, trust_remote_code=False)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise LoadingError("it has special tokens alone")  # what some classes make of no file
        return tokenizer
    except Exception as error:  # of a damaged tokenizer.json the tokenizers library raises a bare `Exception`
        name, reason = os.path.join(path, subfolder) if subfolder else os.fspath(path), one_line(error)
        raise LoadingError(f"{name}: no tokenizer can be loaded ({printable(reason)}); {advice}.") from error


def load_processor(name: str, revision: str | None = None) -> Any:
    """
    Loads and checks a checkpoint's processor, or what it has of one.

    Args:
        name (`str`): a checkpoint folder or a Hub id.
        revision (`str`, *optional*): branch, tag or commit of a Hub id.

    Returns:
        `ProcessorMixin`: the processor, or a tokenizer or an image processor alone.

    Raises:
        ValueError, OSError: if it cannot be used.
    """
    with naming_damage(name, revision):
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
        check_processor(processor, name)
    return processor


def checkpoint_name(name_or_path: str | os.PathLike, revision: str | None = None) -> str:
    """A checkpoint's folder or Hub id, if it can be one; else a `ValueError` or `FileNotFoundError`."""
    name = os.fspath(name_or_path)
    if revision is not None and os.path.isdir(name):
        raise ValueError(f"`revision` {revision!r} is of models on the Hub; {name} is a folder.")
    if os.path.isfile(name):
        raise ValueError(f"{name} is a file, not a checkpoint folder; `lotlip convert official` converts a model.pt.")
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(f"{name}: no such checkpoint folder.")
    return name


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
            raise LoadingError(f"{path}: no index of weights ({type(error).__name__}: {error}).") from error
        if wrong:
            raise LoadingError(f"{path}: names {wrong[0]!r}, which is no file of this folder.")


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
                raise LoadingError(f"{name}: config.json has {key} {value!r}; expected true or false.")
            elif str(key).startswith("num_") or str(key).endswith(SIZES):
                most = MAX_LAYERS if "layers" in key else MAX_SIZE
                numbers = value if isinstance(value, list | tuple) else [value]
                if any(isinstance(one, int) and not -1 <= one <= most for one in numbers):
                    raise LoadingError(f"{name}: config.json has {key} {value!r}; expected at most {most}.")
                if str(key).startswith("num_") and -1 in numbers:
                    raise LoadingError(f"{name}: config.json has {key} {value!r}; expected a number from 0 up.")

    check(config.to_dict())


def check_image_sizes(image_processor: Any, name: str) -> None:
    """
    Refuses an image processor that would make images of absurd sizes.

    Args:
        image_processor (`BaseImageProcessor`): the image processor.
        name (`str`): the checkpoint, for the error.

    Raises:
        ValueError: if a side of `size` or `crop_size` is not a whole number from 1 to 4096; names it and the value.
    """
    for setting in ("size", "crop_size"):
        for side, value in dict(getattr(image_processor, setting, None) or {}).items():
            if value is not None and not (type(value) is int and 1 <= value <= MAX_IMAGE_SIDE):
                raise ValueError(
                    f"{name}: `{setting}` in its processor_config.json or preprocessor_config.json has "
                    f"{side}={value!r}, which is no whole number of pixels from 1 to {MAX_IMAGE_SIDE}."
                )


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
            raise LoadingError(f"{name}: with the image processor's settings pixels are not finite.")
    if hasattr(processor, "tokenizer"):
        limit = processor.tokenizer.model_max_length
        if not isinstance(limit, int) or limit < 1:
            raise LoadingError(f"{name}: the tokenizer's model_max_length is {limit!r}, expected a number of tokens.")
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
    except (ImportError, MemoryError, torch.OutOfMemoryError, LoadingError):
        raise
    except Exception as error:
        if isinstance(error, OSError):
            raise OSError(f"{name}: {error}") from error
        file, reason = _damaged_file(Path(name)) or (_damaged_part(name, revision), error)
        raise LoadingError(f"{name}: {file} cannot be used ({type(error).__name__}: {printable(reason)}).") from error


def _damaged_file(folder: Path) -> tuple[str, Exception] | None:
    """The first file of settings in a folder that holds no JSON object, and the error."""
    for path in sorted(folder.glob("*.json")):
        try:
            content = parse_json(read_regular(path))
            if not isinstance(content, dict) and path.name != "modules.json":
                raise LoadingError(f"expected a JSON object, got a {type(content).__name__}")
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


def usable_device(device: str | torch.device | None) -> str | torch.device:
    """The device, by default the accelerator if there is one, or a `ValueError` if it is not to be had."""
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` {str(device)!r} cannot be used here ({str(error).splitlines()[0]}).") from error
    return device or "cpu"


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
