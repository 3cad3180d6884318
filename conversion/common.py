"""What the converters share: their error, settings, tensors under other names, and loading LoTLIP checkpoints."""

import contextlib
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

# By its configuration, what a checkpoint may be; the first where the configuration does not say which
MODEL_CLASSES: dict[type[PreTrainedConfig], list[type[PreTrainedModel]]] = {
    LoTLIPConfig: [LoTLIPModel],
    LoTLIPTextConfig: [LoTLIPTextModel, LoTLIPTextModelWithProjection],
    LoTLIPVisionConfig: [LoTLIPVisionModel, LoTLIPVisionModelWithProjection],
}


class ConversionError(ValueError):
    """A checkpoint or configuration that cannot be converted exactly. The message says what is wrong and where."""


@contextlib.contextmanager
def building(source: str | Path) -> Iterator[None]:
    """Names the configuration that transformers cannot build a model from."""
    try:
        yield
    except ConversionError:
        raise
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(f"{source}: no model can be built from it ({one_line(error)}).") from error


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same in type, shape and every bit, NaNs included."""
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object."""
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


def size_of(state_dict: Mapping[str, torch.Tensor], name: str, dim: int, num_dims: int, source: str) -> int:
    """A size that a checkpoint's tensor says; the tensor must be there, with `num_dims` dimensions."""
    shape = list(state_dict[name].shape) if name in state_dict else []
    if len(shape) != num_dims or 0 in shape:
        raise ConversionError(
            f"{source} is of another architecture than this converter takes: {name} is missing or misshapen ({shape})."
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
    Tensors of another layout under a model's names. Each unknown, missing or misshapen one is named in an error.

    Args:
        state_dict: The tensors of the checkpoint.
        layout: Name in the checkpoint -> names in the model: one, or several stacked along the first dimension.
        own: The model's `state_dict()`, for the shapes.
        source: What to call the checkpoint in errors.
        transposed: Names in the checkpoint of matrices that are the transposed ones of the model's.
        problems: What else is wrong with the checkpoint.
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
    """The whole path of the folder or file to make, where nothing is yet."""
    files.check_output(output, folder=True)
    return Path(output).resolve()


def local_folder(model: str | Path) -> Path:
    """The folder of a checkpoint: itself, or of a Hub id what has been fetched."""
    name = checkpoint_name(model)
    with naming_damage(name):
        return Path(name if Path(name).is_dir() else snapshot_download(name))


def load_checkpoint(folder: str | Path) -> PreTrainedModel:
    """A LoTLIP model, or one of its towers, with no tensor missing or left over, in the precision it was saved in."""
    with naming_damage(checkpoint_name(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    classes = MODEL_CLASSES.get(type(config))
    if classes is None:
        raise ConversionError(f"{folder}: a {config.model_type!r} checkpoint, not a LoTLIP one.")
    named = [one for one in classes if one.__name__ in (config.architectures or ())]
    return load_strict((named or classes)[0], folder, config=config)


def random_texts(
    config: LoTLIPTextConfig, shapes: Sequence[tuple[int, int]], padding_side: str = "right"
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Seeded ids and masks of each shape [texts, tokens]: a first text as long as fits, the others shorter."""
    generator = torch.Generator().manual_seed(0)
    end = None
    if config.pooling == "eos":
        # CLIP reads a text's feature at its end; in configurations of old that is the highest id
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
        batches.append((input_ids.where(attention_mask.bool(), padding), attention_mask))
    return batches
