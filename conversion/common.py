"""What the converters share: their error, reading configurations, loading strictly, and writing all or nothing."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lotlip_hf import (
    LoTLIPConfig,
    LoTLIPModel,
    LoTLIPTextConfig,
    LoTLIPTextModel,
    LoTLIPTextModelWithProjection,
    LoTLIPVisionConfig,
    LoTLIPVisionModel,
    LoTLIPVisionModelWithProjection,
    files,
)
from lotlip_hf.files import parse_json, printable, read_regular
from lotlip_hf.loading import check_config, check_shards, naming_damage
from lotlip_hf.modeling.loading_lotlip import checked_download

# By its configuration, what a checkpoint may be; the first where the configuration does not say which
MODEL_CLASSES: dict[type[PreTrainedConfig], list[type[PreTrainedModel]]] = {
    LoTLIPConfig: [LoTLIPModel],
    LoTLIPTextConfig: [LoTLIPTextModel, LoTLIPTextModelWithProjection],
    LoTLIPVisionConfig: [LoTLIPVisionModel, LoTLIPVisionModelWithProjection],
}


class ConversionError(ValueError):
    """A checkpoint or configuration that cannot be converted exactly. The message says what is wrong and where."""


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and reports of transformers; what they report, the converters check."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same in type, shape and every bit, NaNs included."""
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def read_json(path: Path) -> dict[str, Any]:
    """
    A JSON file's object.

    Raises:
        ConversionError: if the file is missing or holds something else.
    """
    if not path.is_file():
        raise ConversionError(f"{path}: no such file.")
    try:
        content = parse_json(read_regular(path))
    except ValueError as error:
        raise ConversionError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: expected a JSON object, got a {type(content).__name__}.")
    return content


def section(config: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    """A section of an open_clip model configuration, which must be there."""
    found = config.get(key)
    if not isinstance(found, dict):
        raise ConversionError(f"{source}: not an open_clip model configuration, it has no {key}.")
    return found


def option(options: Mapping[str, Any], key: str, default: Any, known: Sequence[Any], source: str) -> Any:
    """A setting for which only some values are known; `default` is what open_clip takes if it is left out."""
    value = options.get(key, default)
    if value not in known:
        given = repr(value) if key in options else f"{value!r} (open_clip's default)"
        raise ConversionError(f"{source}: {key} is {given}; this converter knows {' and '.join(map(repr, known))}.")
    return value


def whole(options: Mapping[str, Any], key: str, default: int | None, source: str, least: int = 1) -> int:
    """A setting that must be a whole number from `least` up."""
    value = options.get(key, default)
    if type(value) is not int or value < least:
        raise ConversionError(f"{source}: {key} is {value!r}; expected a whole number from {least} up.")
    return value


def check_output(output: str | Path) -> Path:
    """
    The whole path of the folder to make.

    Raises:
        ConversionError: if there is something already, or the path leads through a file.
    """
    try:
        files.check_output(output, folder=True)
    except OSError as error:
        raise ConversionError(f"--output {error}") from error
    return Path(output).resolve()


def local_folder(model: str | Path) -> Path:
    """
    The folder of a checkpoint: itself, or of a Hub id what has been fetched.

    Raises:
        ConversionError: if there is no such folder or repository.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1:
        raise ConversionError(f"{model}: no such folder.")
    try:
        with checked_download(model):
            return Path(snapshot_download(str(model)))
    except Exception as error:  # no id, no such repository, no connection: each client has its own
        raise ConversionError(
            f"{model}: no such folder, and not to be had from the Hub ({one_line(error)})."
        ) from error


def load_checkpoint(folder: str | Path) -> PreTrainedModel:
    """
    A LoTLIP model, or one of its towers, with no tensor missing or left over, in the precision it was saved in.

    Raises:
        ConversionError: if the folder does not hold one.
    """
    if not Path(folder).is_dir():
        raise ConversionError(f"{folder}: no such folder.")
    try:
        with naming_damage(str(folder)):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            classes = MODEL_CLASSES.get(type(config))
            if classes is None:
                raise ConversionError(f"{folder}: a {config.model_type!r} checkpoint, not a LoTLIP one.")
            check_config(config, folder)
            check_shards(folder)
            named = [one for one in classes if one.__name__ in (config.architectures or ())]
            with quiet():
                loaded: Any = (named or classes)[0].from_pretrained(
                    folder, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
                )
    except (ConversionError, MemoryError):
        raise
    except Exception as error:  # of a damaged file safetensors, torch and transformers each raise their own
        raise ConversionError(f"{folder}: not a LoTLIP checkpoint ({one_line(error)}).") from error
    model, info = loaded
    problems = [f"{kind}: {key}" for kind, keys in info.items() for key in sorted(map(str, keys))]
    if problems:
        listed = "\n  ".join(map(printable, problems))
        raise ConversionError(f"{folder}: not a complete LoTLIP checkpoint:\n  {listed}")
    return model
