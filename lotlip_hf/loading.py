"""Strict loading of checkpoints. Errors name the checkpoint and its problem."""

import contextlib
import logging
import math
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
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

# transformers 5.17 exports `AutoImageProcessor` only if torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging as transformers_logging

from . import auto as auto  # registers LoTLIP's classes
from .files import one_line, parse_json, printable, read_regular
from .images import background_of, check_image_sizes, checked_background
from .modeling.backbones_lotlip import VISION_BACKBONES
from .modeling.calls_lotlip import free_of_calls
from .modeling.modeling_lotlip import LoTLIPModel

logger = logging.getLogger(__name__)

MAX_LAYERS = 1024
MAX_SIZE = 1 << 24
SWITCHES = ("output_attentions", "output_hidden_states", "return_dict")
SIZES = ("_size", "_sizes", "_dim", "_dims", "_embeddings", "_length")
MODULES = ("layer", "group", "depths")  # parts of the names of settings that count modules, as `n_layers`
# timm's names of interpolations
RESAMPLING = {name.lower(): resample for name, resample in Image.Resampling.__members__.items()}
NOT_SET = 1_000_000  # transformers sets 1e30 for an unknown maximum length
# Model types whose positions start at `pad_token_id + 1`, so that the usable length is shorter.
POSITIONS_AFTER_PADDING = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "mpnet"),
    "altclip_text_model",
)


# Entries of transformers' loading info -> words in messages.
PROBLEMS = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "of another shape"}


class LoadingError(ValueError):
    """Raised for a checkpoint that cannot be loaded exactly. The message names the checkpoint and its problem."""


def load_model(
    name_or_path: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    image_token_centers: int | None = None,
    image_token_layer: int | None = None,
) -> tuple[PreTrainedModel, Any]:
    """
    Loads a dual encoder and its processor. Raises an error if the checkpoint is incomplete or does not fit.

    Args:
        name_or_path (`str` or `os.PathLike`): Folder or Hub id of a LoTLIP or of a stock dual encoder (CLIP, SigLIP,
            ...).
        device (`str` or `torch.device`, *optional*): Device of the model. Defaults to the accelerator, or the CPU.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Type of the weights. `"auto"` keeps the type
            in the checkpoint.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id. All files come from one commit, which is saved
            as `model.config._commit_hash`.
        image_token_centers (`int`, *optional*): Number of patches that the later layers of the image tower compute,
            see [`use_medoids`]. Defaults to what the checkpoint says, usually all.
        image_token_layer (`int`, *optional*): Layer from which on they are computed.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`: The model in evaluation mode, and its processor.

    Raises:
        `ValueError`: If the model has no image and text features; if a weight is missing, unknown or of another
            shape; if there is no tokenizer or image processor; if `device` is not available; if `revision` is passed
            for a folder; or if `image_token_centers` or `image_token_layer` do not fit the image tower.
        `OSError`: If the checkpoint is not found.
    """
    name = checkpoint_name(name_or_path, revision)
    device = usable_device(device)
    with naming_damage(name, revision):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        # Pin the commit, so that weights and processor match even if the branch moves in between.
        commit = None if os.path.isdir(name) else cached_commit(name, revision)
        revision = commit or revision
        model_class = AutoModel._model_mapping.get(type(config), None)
        if not (hasattr(model_class, "get_text_features") and hasattr(model_class, "get_image_features")):
            raise LoadingError(
                f"{name} is a {config.model_type!r} checkpoint, which does not encode images and texts. Pass a LoTLIP "
                "or another dual encoder, such as CLIP or SigLIP."
            )
        model = load_strict(AutoModel, name, config=config, revision=revision, trust_remote_code=False, dtype=dtype)
        model.config._commit_hash = commit  # as older versions of transformers do
        vision = getattr(config, "vision_config", None)
        if not isinstance(model, LoTLIPModel) and hasattr(vision, "image_token_centers"):  # a stock class ignores it
            use_medoids(model, vision.image_token_centers, getattr(vision, "image_token_layer", None))
        processor = load_processor(name, revision)
        for part in ("tokenizer", "image_processor"):
            if not hasattr(processor, part):
                raise LoadingError(
                    f"{name} has no {part}. Save the model's processor in this folder with "
                    "`processor.save_pretrained(folder)`."
                )
    if image_token_centers is not None or image_token_layer is not None:
        use_medoids(model, image_token_centers, image_token_layer)
    fit_tokenizer(model, processor.tokenizer)
    model.to(device=device)
    return model, processor


def use_medoids(model: PreTrainedModel, num_centers: int | None, layer: int | None = None) -> None:
    """
    Makes the later layers of an image tower compute only some patches: the medoids of clusters. The numbers become
    fields of `model.config.vision_config`, which LoTLIP checkpoints keep.

    Args:
        model (`PreTrainedModel`): LoTLIP, or a stock dual encoder of a ViT, DINOv2, CLIP or SigLIP.
        num_centers (`int`): Number K of patches. Images of at most K patches are computed as before.
        layer (`int`, *optional*): First of these layers, counted from 0. Defaults to the middle one.

    Raises:
        `ValueError`: If a number does not fit the image tower, or its family is not supported.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.loading import use_medoids

    >>> encoder = load_encoder("checkpoint")
    >>> use_medoids(encoder.engine.model, num_centers=8)
    ```
    """
    config = getattr(model.config, "vision_config", None)
    is_lotlip = isinstance(model, LoTLIPModel)
    family = config.family if is_lotlip else VISION_BACKBONES.get(getattr(config, "model_type", ""))
    if family is None or (family.layers_know_positions and not is_lotlip):
        name = getattr(config, "model_type", model.config.model_type)
        raise ValueError(f"`image_token_centers` does not fit the image tower {name} of a stock model. Remove it.")
    family.check_medoids(config.backbone_config if is_lotlip else config, num_centers, layer)
    family.use_medoids(model.vision_model.backbone if is_lotlip else model.vision_model, num_centers, layer)
    config.image_token_centers, config.image_token_layer = num_centers, layer


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
    Loads a model and checks that the checkpoint has exactly its weights.

    Args:
        model_class (`type[PreTrainedModel]`): Class of the model.
        path (`str` or `os.PathLike`): Checkpoint folder or Hub id.
        allow_unexpected (`bool`, *optional*, defaults to `False`): Whether the checkpoint may have more weights, for
            example those of the other tower.
        allow_missing (`str`, *optional*): Weights whose names contain this string may be missing.
        subfolder (`str`, *optional*, defaults to `""`): Folder of the model in the checkpoint.
        **kwargs: Arguments of `from_pretrained`.

    Returns:
        `PreTrainedModel`: The model in evaluation mode, by default in the precision of the checkpoint.

    Raises:
        `LoadingError`: If weights are missing, unexpected or of another shape, or if a file is damaged.
        `OSError`: If the checkpoint is not found.
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
    except Exception as error:  # safetensors, torch and transformers raise different errors for damaged files
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
        path (`str` or `os.PathLike`): Folder or Hub id.
        advice (`str`): What to do if there is no tokenizer, for the error message.
        tokenizer_class (`type`, *optional*, defaults to `AutoTokenizer`): Class of the tokenizer.
        subfolder (`str`, *optional*, defaults to `""`): Folder of the tokenizer in `path`.

    Raises:
        `LoadingError`: If there is no tokenizer, or if its files are damaged.
    """
    try:
        with quiet():
            tokenizer = tokenizer_class.from_pretrained(path, subfolder=subfolder, trust_remote_code=False)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise LoadingError("it has only special tokens")  # as some classes load from a folder without files
        return tokenizer
    except Exception as error:  # the tokenizers library raises a plain `Exception` for a damaged tokenizer.json
        name, reason = os.path.join(path, subfolder) if subfolder else os.fspath(path), one_line(error)
        raise LoadingError(f"{name}: the tokenizer cannot be loaded ({printable(reason)}); {advice}.") from error


def load_processor(name: str, revision: str | None = None) -> Any:
    """Loads and checks the processor of a checkpoint, or its tokenizer or image processor if it has only one."""
    with naming_damage(name, revision):
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
        check_processor(processor, name)
    return processor


def checkpoint_name(name_or_path: str | os.PathLike, revision: str | None = None) -> str:
    """Returns a path or Hub id as a `str`. Raises an error if it cannot be a checkpoint."""
    name = os.fspath(name_or_path)
    if revision is not None and os.path.isdir(name):
        raise ValueError(f"`revision` {revision!r} needs a Hub id, but {name} is a folder. Leave `revision` out.")
    if os.path.isfile(name):
        raise ValueError(
            f"{name} is a file, not a checkpoint folder. Convert a model.pt with `lotlip convert official`."
        )
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(f"{name}: there is no checkpoint folder of this name. Check the path.")
    if not os.path.isfile(os.path.join(name, "config.json")):
        found = [*Path(name).glob("checkpoint-*/config.json"), *Path(name).glob("*/checkpoint-*/config.json")]
        runs = sorted((one.parent for one in found), key=lambda one: (one.parent, len(one.name), one))
        if runs:
            listed = " or ".join(map(str, runs[-4:]))
            raise ValueError(f"{name} is the folder of a run, not a checkpoint. Pass {listed}.")
    return name


def check_shards(folder: str | os.PathLike) -> None:
    """Raises an error if the index of a folder's weights is damaged or names files outside the folder."""
    for path in sorted(Path(folder).glob("*.index.json")):
        try:
            names = parse_json(read_regular(path))["weight_map"].values()
            wrong = [
                name for name in names if not isinstance(name, str) or name != Path(name).name or name in ("", "..")
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LoadingError(f"{path}: not an index of weights ({type(error).__name__}: {error}).") from error
        if wrong:
            raise LoadingError(f"{path}: {wrong[0]!r} is not the name of a file in this folder.")


def check_config(config: PreTrainedConfig, name: str | os.PathLike) -> None:
    """Raises an error for a configuration of a model that fits in no memory, or with values that fail later."""

    def check(settings: dict[str, Any]) -> None:
        for key, value in settings.items():
            if isinstance(value, dict):
                check(value)
            elif key in SWITCHES and value not in (None, True, False):
                raise LoadingError(f"{name}: `{key}` in config.json is {value!r}. Use true or false.")
            is_size = str(key).startswith("num_") or str(key).endswith(SIZES)
            counts_modules = any(part in str(key) for part in MODULES)  # a layer may also be counted from the end
            if is_size or counts_modules:
                least, most = -1 if is_size else -MAX_LAYERS, MAX_LAYERS if counts_modules else MAX_SIZE
                numbers = value if isinstance(value, list | tuple) else [value]
                if any(isinstance(one, int) and not least <= one <= most for one in numbers):
                    raise LoadingError(f"{name}: `{key}` in config.json is {value!r}. Use at most {most}.")
                if str(key).startswith("num_") and -1 in numbers:
                    raise LoadingError(f"{name}: `{key}` in config.json is {value!r}. Use 0 or more.")

    check(config.to_dict())


def load_image_processor(name_or_path: str | os.PathLike) -> Any:
    """
    Loads and checks the image processor of an image encoder, for a new model. The processors of DINOv3 and timm need
    torchvision. They are replaced by a `ViTImageProcessorPil` or `CLIPImageProcessorPil` with the same settings, which
    gives the same pixels on every machine. These differ from the replaced ones by rounding to 8 bits (DINOv3).

    Args:
        name_or_path (`str` or `os.PathLike`): Folder or Hub id of the image encoder.

    Raises:
        `ValueError`: If a size is not an integer from 1 to 4096, or if timm crops in a way that has no replacement.
        `OSError`: If there is no image processor.
    """
    from transformers import ViTImageProcessorPil  # a late import: it takes seconds

    name = os.fspath(name_or_path)
    config, _ = PreTrainedConfig.get_config_dict(name)
    settings = {} if "pretrained_cfg" in config else ImageProcessingMixin.get_image_processor_dict(name)[0]
    if "pretrained_cfg" in config:
        image_processor = _from_timm(config["pretrained_cfg"], name)
    elif str(settings.get("image_processor_type")).startswith("DINOv3ViTImageProcessor"):
        own = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD, **settings}
        names = ("size", "resample", "image_mean", "image_std", "do_center_crop", "crop_size")
        given = {name: own[name] for name in names if own.get(name) is not None}
        image_processor = ViTImageProcessorPil(**given)
    else:
        image_processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    check_image_sizes(image_processor, name)
    return image_processor


def _from_timm(pretrained_cfg: dict[str, Any], name: str) -> Any:
    """The image transform that timm uses to evaluate a model, as a `CLIPImageProcessorPil`."""
    from transformers import CLIPImageProcessorPil  # a late import: it takes seconds

    mode = pretrained_cfg.get("crop_mode") or "center"
    height, width = (pretrained_cfg.get("input_size") or (3, 224, 224))[1:]
    resample = RESAMPLING.get(pretrained_cfg.get("interpolation") or "bicubic")
    if mode not in ("center", "squash") or (mode == "center" and height != width) or resample is None:
        raise LoadingError(
            f"{name}: `pretrained_cfg` has crop_mode {mode!r}, input_size {[height, width]} and interpolation "
            f"{pretrained_cfg.get('interpolation')!r}, which the image processors of transformers do not support."
        )
    share = pretrained_cfg.get("crop_pct") or 0.875
    sides = math.floor(height / share), math.floor(width / share)
    return CLIPImageProcessorPil(
        size={"shortest_edge": sides[0]} if mode == "center" else {"height": sides[0], "width": sides[1]},
        crop_size={"height": height, "width": width},
        resample=resample,
        image_mean=list(pretrained_cfg.get("mean") or IMAGENET_DEFAULT_MEAN),
        image_std=list(pretrained_cfg.get("std") or IMAGENET_DEFAULT_STD),
    )


def check_processor(processor: Any, name: str | os.PathLike) -> None:
    """Checks a processor's settings and processes a text and an image, because libraries check types only then."""
    checked_background(background_of(processor))
    if hasattr(processor, "image_processor"):
        check_image_sizes(processor.image_processor, os.fspath(name))
        with np.errstate(all="ignore"):
            pixels = processor.image_processor(images=[Image.new("RGB", (8, 8))], return_tensors="pt")["pixel_values"]
        if not torch.as_tensor(pixels).isfinite().all():
            raise LoadingError(f"{name}: the image processor returns pixels that are not finite. Check its settings.")
    if hasattr(processor, "tokenizer"):
        limit = processor.tokenizer.model_max_length
        if not isinstance(limit, int) or limit < 1:
            raise LoadingError(f"{name}: `model_max_length` of the tokenizer is {limit!r}. Use a number of tokens.")
        processor.tokenizer(["a"])


@contextlib.contextmanager
def naming_damage(name: str, revision: str | None = None) -> Iterator[None]:
    """
    Context in which errors of damaged files become a `LoadingError` (or an `OSError`, if a file cannot be read) that
    names the checkpoint and the file. Libraries raise errors of many classes for damaged files.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError, LoadingError):
        raise
    except Exception as error:
        if isinstance(error, OSError):
            where = "" if os.path.exists(name) else "no such folder, and as a Hub id: "
            raise OSError(f"{name}: {where}{error}") from error
        file, reason = _damaged_file(Path(name)) or (_damaged_part(name, revision), error)
        raise LoadingError(f"{name}: {file} cannot be used ({type(error).__name__}: {printable(reason)}).") from error


def _damaged_file(folder: Path) -> tuple[str, Exception] | None:
    """The first JSON file in a folder that does not contain an object, and the error."""
    for path in sorted(folder.glob("*.json")):
        try:
            content = parse_json(read_regular(path))
            if not isinstance(content, dict) and path.name != "modules.json":
                raise LoadingError(f"it contains a {type(content).__name__}, not a JSON object")
        except (OSError, ValueError) as error:
            return path.name, error
    return None


def _damaged_part(name: str, revision: str | None) -> str:
    """The part of a checkpoint that fails if it is loaded separately."""
    for part, loader in (("config.json", AutoConfig), ("the processor (processor_config.json, ...)", AutoProcessor)):
        try:
            loader.from_pretrained(name, revision=revision, trust_remote_code=False)
        except Exception:  # see `naming_damage`
            return part
    return "config.json, the weights or the files of the processor"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context without progress bars and reports of transformers."""
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
    """The commit of a branch or tag when it was last downloaded (40 hexadecimal digits), or `None` if not cached."""
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))
    reference = folder / "refs" / (revision or "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def usable_device(device: str | torch.device | None) -> str | torch.device:
    """Returns `device`, by default the accelerator or the CPU. Raises a `ValueError` if it is not available."""
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` {str(device)!r} is not available ({str(error).splitlines()[0]}).") from error
    return device or "cpu"


def skip_padding(model: PreTrainedModel) -> None:
    """Computes texts without padding and without masks of whole texts, if the text tower of a LoTLIP can."""
    if isinstance(model, LoTLIPModel) and model.config.text_config.family.takes_rows:
        if model.text_model.backbone.config._attn_implementation == "sdpa":
            model.text_model.set_attn_implementation("unpadded")


def max_text_length(model: PreTrainedModel, tokenizer: Any) -> int:
    """
    Returns the maximum length of a text in tokens, special tokens included: the smaller one of
    `tokenizer.model_max_length` and the number of positions of the text tower.

    Raises:
        `ValueError`: If both numbers are unknown.
    """
    length = min(tokenizer.model_max_length, _positions(model) or tokenizer.model_max_length)
    if length > NOT_SET:
        raise ValueError("`tokenizer.model_max_length` is not set. Set it to the model's maximum length in tokens.")
    return length


def fit_tokenizer(model: PreTrainedModel, tokenizer: Any, max_length: int | None = None) -> None:
    """
    Sets `tokenizer.model_max_length`, at which all texts are truncated, and removes the settings of earlier calls.

    Args:
        model (`PreTrainedModel`): Model.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the model, which is changed in place.
        max_length (`int`, *optional*): Maximum length in tokens, special tokens included. Defaults to
            [`max_text_length`], if that is known.

    Raises:
        `ValueError`: If the model has fewer than `max_length` positions.
    """
    positions = _positions(model)
    if max_length is not None and positions and max_length > positions:
        raise ValueError(f"`max_text_length` is {max_length}. The model has {positions} positions: use at most those.")
    free_of_calls(tokenizer)
    configured = tokenizer.model_max_length
    if max_length is not None:
        tokenizer.model_max_length = max_length
    elif positions and configured > positions:
        tokenizer.model_max_length = positions
        if configured <= NOT_SET:
            logger.warning(
                "%s: the tokenizer's `model_max_length` is %d, but the model has %d positions. Texts are cut at %d.",
                getattr(model, "name_or_path", "") or type(model).__name__,
                configured,
                positions,
                positions,
            )


def _positions(model: PreTrainedModel) -> int | None:
    """Maximum number of tokens of the text tower, special tokens included; `None` if the configuration has none."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in POSITIONS_AFTER_PADDING:
        positions -= config.pad_token_id + 1
    return positions
