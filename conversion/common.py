"""Shared by the converters: errors, settings, renaming of tensors, and loading of LoTLIP checkpoints."""

import contextlib
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

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
from lotlip_hf.files import one_line, parse_json, printable, read_regular
from lotlip_hf.loading import checkpoint_name, load_strict, naming_damage
from lotlip_hf.modeling.backbones_lotlip import CLIPTextBackbone, NaFlexBackbone, pair

# Configuration class -> possible model classes. If a configuration has no class name, the first class is used.
MODEL_CLASSES: dict[type[PreTrainedConfig], list[type[PreTrainedModel]]] = {
    LoTLIPConfig: [LoTLIPModel],
    LoTLIPTextConfig: [LoTLIPTextModel, LoTLIPTextModelWithProjection],
    LoTLIPVisionConfig: [LoTLIPVisionModel, LoTLIPVisionModelWithProjection],
}


class ConversionError(ValueError):
    """Raised for a checkpoint or configuration that cannot be converted exactly. The message names both."""


@contextlib.contextmanager
def building(source: str | Path) -> Iterator[None]:
    """Context in which errors of building a model name the configuration."""
    try:
        yield
    except ConversionError:
        raise
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(f"{source}: transformers cannot build a model from it ({one_line(error)}).") from error


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in type, shape and every bit, also for NaNs."""
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that contains an object."""
    try:
        content = parse_json(read_regular(path))
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} contains a {type(content).__name__}. A JSON object is expected.")
    return content


def section(config: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    """Returns a section of open_clip's configuration of a model, or raises an error."""
    found = config.get(key)
    if not isinstance(found, dict):
        raise ConversionError(f"{source} has no {key}. Pass an open_clip configuration of a model.")
    return found


def option(options: Mapping[str, Any], key: str, default: Any, known: Sequence[Any], source: str) -> Any:
    """Returns a setting that must be one of the `known` values. `default` is open_clip's default."""
    value = options.get(key, default)
    if value not in known:
        given = repr(value) if key in options else f"{value!r} (open_clip's default)"
        values = " or ".join(map(repr, known))
        raise ConversionError(f"{source}: {key} is {given}. This converter supports only {values}.")
    return value


def whole(options: Mapping[str, Any], key: str, default: int | None, source: str, least: int = 1) -> int:
    """Returns a setting that must be a whole number of at least `least`."""
    value = options.get(key, default)
    if type(value) is not int or value < least:
        raise ConversionError(f"{source}: {key} is {value!r}. Use a whole number of at least {least}.")
    return value


def size_of(state_dict: Mapping[str, torch.Tensor], name: str, dim: int, num_dims: int, source: str) -> int:
    """Returns a size of a tensor that must exist and have `num_dims` dimensions."""
    shape = list(state_dict[name].shape) if name in state_dict else []
    if len(shape) != num_dims or 0 in shape:
        raise ConversionError(
            f"{source}: {name} is missing or has a wrong shape ({shape}). This converter does not support the model."
        )
    return shape[dim]


def rename_tensors(
    state_dict: Mapping[str, torch.Tensor],
    layout: Mapping[str, Sequence[str]],
    own: Mapping[str, torch.Tensor],
    source: str,
    transposed: Container[str] = (),
    problems: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """
    Renames the tensors of a checkpoint to those of a model with the state dict `own`. `layout` maps each name in the
    checkpoint to one name in the model, or to several that are stacked along the first dimension. The matrices in
    `transposed` are transposed. The error lists unknown, missing and misshapen tensors and other `problems`.
    """
    problems = [f"unknown: {name}" for name in state_dict if name not in layout] + list(problems)
    converted: dict[str, torch.Tensor] = {}
    for theirs, names in layout.items():
        tensor = state_dict.get(theirs)
        if tensor is None:
            problems.append(f"missing: {theirs}")
            continue
        expected = list(own[names[0]].shape)
        if len(names) > 1:
            expected[0] = sum(len(own[name]) for name in names)
        if theirs in transposed:
            expected.reverse()
        if list(tensor.shape) != expected:
            problems.append(f"misshapen: {theirs} has {list(tensor.shape)}, expected {expected}")
            continue
        tensor = tensor.t() if theirs in transposed else tensor
        parts = [tensor] if len(names) == 1 else tensor.split([len(own[name]) for name in names])
        converted.update(zip(names, parts, strict=True))
    if problems:
        listed = "\n  ".join(map(printable, problems))
        raise ConversionError(f"{source}: {len(problems)} tensors do not fit the configuration:\n  {listed}")
    return converted


def check_output(output: str | Path) -> Path:
    """Returns the absolute path of a new folder or file, or raises an error if it exists and is not empty."""
    files.check_output(output, folder=True)
    return Path(output).resolve()


def local_folder(model: str | Path) -> Path:
    """Returns the folder of a checkpoint. A Hub id is downloaded."""
    name = checkpoint_name(model)
    with naming_damage(name):
        return Path(name if Path(name).is_dir() else snapshot_download(name))


def load_checkpoint(folder: str | Path) -> PreTrainedModel:
    """Loads a LoTLIP model, or one of its towers, strictly and in its saved precision."""
    with naming_damage(checkpoint_name(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    classes = MODEL_CLASSES.get(type(config))
    if classes is None:
        raise ConversionError(f"{folder} is a {config.model_type!r} checkpoint. Pass a LoTLIP checkpoint.")
    named = [one for one in classes if one.__name__ in (config.architectures or ())]
    return load_strict((named or classes)[0], folder, config=config)


def checked_length(config: LoTLIPTextConfig) -> int:
    """Length of the longest texts with which a conversion is checked: the model's, but at most 512 tokens."""
    return min(config.max_position_embeddings, 512)


def random_texts(
    config: LoTLIPTextConfig, shapes: Sequence[tuple[int, int]], padding_side: str = "right"
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random token ids and masks of each shape [texts, tokens]. All texts except the first are padded."""
    generator = torch.Generator().manual_seed(0)
    end = None
    if isinstance(config.family, CLIPTextBackbone):
        # CLIP pools at [EOT]. Old configurations have the wrong id 2, and CLIP then pools at the highest id.
        end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    padding = 0 if config.pad_token_id is None else config.pad_token_id
    words = torch.tensor([word for word in range(config.vocab_size) if word not in (padding, end)])
    batches = []
    for batch_size, length in shapes:
        longest = min(length, config.max_position_embeddings)
        lengths = torch.linspace(longest, 1, batch_size).long().unsqueeze(1)
        positions = torch.arange(length).expand(batch_size, -1)
        if padding_side == "left":
            positions = positions - (length - lengths)
        attention_mask = ((positions >= 0) & (positions < lengths)).long()
        input_ids = words[torch.randint(len(words), (batch_size, length), generator=generator)]
        if end is not None:
            input_ids[positions == lengths - 1] = end
        if config.placeholder_token_id is not None:
            input_ids[positions == 0] = config.placeholder_token_id
        batches.append((input_ids.where(attention_mask.bool(), padding), attention_mask))
    return batches


def random_images(config: LoTLIPVisionConfig, batch_size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random inputs of an image tower: images of its size, or padded rows of patches for SigLIP 2 NaFlex."""
    generator = torch.Generator().manual_seed(0)
    if not isinstance(config.family, NaFlexBackbone):
        shape = (batch_size, *config.family.image_shape(config.backbone_config))
        return {"pixel_values": torch.randn(shape, generator=generator).to(dtype)}
    sides = torch.arange(batch_size) % math.isqrt(config.num_patches) + 1
    spatial_shapes = torch.stack([sides, config.num_patches // sides], dim=1)
    width = config.num_channels * math.prod(pair(config.patch_size))
    mask = torch.arange(config.num_patches) < spatial_shapes.prod(1, keepdim=True)
    return {
        "pixel_values": torch.randn(*mask.shape, width, generator=generator).to(dtype),
        "pixel_attention_mask": mask.long(),
        "spatial_shapes": spatial_shapes,
    }
