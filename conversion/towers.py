"""Shared by the exports of towers: towers as modules, and inputs with which an export is compared with PyTorch."""

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lotlip_hf import LoTLIPModel, LoTLIPTextConfig, LoTLIPVisionConfig
from lotlip_hf.images import load_pixels
from lotlip_hf.loading import fit_tokenizer, naming_damage, quiet
from lotlip_hf.options import Parser

from .common import ConversionError, checked_length, load_checkpoint, local_folder, random_texts

# Largest accepted difference from PyTorch's features, relative to a feature's norm.
TOLERANCE = 1e-4
# Smallest accepted cosine between quantised features and PyTorch's.
LEAST_COSINE = 0.98
INPUTS = {"text": ("input_ids", "attention_mask"), "vision": ("pixel_values",)}
OUTPUTS = {"text": "text_embeds", "vision": "image_embeds"}


@dataclass(frozen=True)
class ExportedTower:
    """
    A tower that `lotlip convert onnx` or `lotlip convert openvino` wrote.

    Args:
        file (`str`): Name of the file with the graph.
        size (`int`): Size of graph and weights in bytes.
        difference (`float`): Largest difference between the features before quantisation and PyTorch's, relative to a
            feature's norm.
        cosine (`float`, *optional*): Smallest cosine between quantised features and PyTorch's.
    """

    file: str
    size: int
    difference: float
    cosine: float | None = None

    def __str__(self) -> str:
        precision = "float32" if self.cosine is None else f"int8, cosines to float32 from {self.cosine:.4f} up"
        return f"{self.file}: {self.size / 1e6:,.1f} MB, {precision}"


class Tower(nn.Module):
    """A tower as a module that maps its inputs, in order, to features [B, P]."""

    def __init__(self, model: PreTrainedModel, tower: str) -> None:
        super().__init__()
        self.model = model
        self.tower = tower
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        named = dict(zip(INPUTS[self.tower], inputs, strict=True))
        if isinstance(self.model, LoTLIPModel):
            function = self.model.get_text_features if self.tower == "text" else self.model.get_image_features
            return function(**named, pooled_only=True).pooler_output
        outputs = self.model(**named)
        name = OUTPUTS[self.tower]
        return outputs[name] if name in outputs else outputs.pooler_output


def check_packages(kind: str, hint: str, *names: str) -> None:
    """Raises a `ConversionError` with a hint if packages are missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConversionError(f"{kind} needs {', '.join(missing)}: {hint}")


def load_towers(model: str | Path, towers: Sequence[str], kind: str) -> tuple[PreTrainedModel, list[Any], list[str]]:
    """Loads a checkpoint in float32, its processors, and the names of those of its `towers` that can be exported."""
    folder = local_folder(model)
    lotlip = load_checkpoint(folder).float().eval()
    configs = tower_configs(lotlip)
    chosen = [tower for tower in configs if tower in towers]
    if not chosen:
        raise ConversionError(f"{model} is a {type(lotlip).__name__} without a {' or '.join(towers)} tower.")
    for tower in chosen:
        if configs[tower].family.no_onnx:
            encoder = configs[tower].backbone_config.model_type
            others = [f"--{name}-only" for name in configs if not configs[name].family.no_onnx]
            advice = f" Export the other tower with {others[0]}." if others else ""
            raise ConversionError(f"{encoder} cannot be exported to {kind}: {configs[tower].family.no_onnx}.{advice}")
    if "vision" in chosen and configs["vision"].image_token_centers is not None:
        raise ConversionError(f"`image_token_centers` cannot be exported to {kind}. Set it to null in config.json.")
    processors = _load_processors(folder)
    for tokenizer in (getattr(processor, "tokenizer", processor) for processor in processors):
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            fit_tokenizer(lotlip, tokenizer)
    return lotlip, processors, chosen


def write_settings(lotlip: PreTrainedModel, processors: Sequence[Any], folder: Path) -> None:
    """Creates the folder of an export, with the configuration, the tokenizer and the image processor."""
    folder.mkdir()
    lotlip.config.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    # Remove model classes from `auto_map`: the folder contains only the code of the configuration.
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if part and "auto_map" in part:
            part["auto_map"] = {"AutoConfig": part["auto_map"]["AutoConfig"]}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tower_configs(lotlip: PreTrainedModel) -> dict[str, Any]:
    """Configurations of the model's towers."""
    config = lotlip.config
    if isinstance(config, LoTLIPTextConfig):
        return {"text": config}
    if isinstance(config, LoTLIPVisionConfig):
        return {"vision": config}
    return {"text": config.text_config, "vision": config.vision_config}


def _load_processors(folder: Path) -> list[Any]:
    """Loads the checkpoint's processor, or its tokenizer and image processor."""
    classes = {"processor_config.json": AutoProcessor}
    if not (folder / "processor_config.json").is_file():
        classes = {"tokenizer_config.json": AutoTokenizer, "preprocessor_config.json": AutoImageProcessor}
    with naming_damage(str(folder)):
        return [one.from_pretrained(folder) for name, one in classes.items() if (folder / name).is_file()]


@contextlib.contextmanager
def without_messages() -> Iterator[None]:
    """Context without messages of the exporter and the quantiser; logging is left as it was."""
    disabled, level, filters = logging.root.manager.disable, logging.root.level, logging.root.filters[:]
    handler = logging.NullHandler()  # keeps the quantiser from adding handlers
    logging.root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        logging.root.removeHandler(handler)
        logging.root.setLevel(level)  # OpenVINO's exporter raises it, and after an error does not set it back
        logging.root.filters[:] = filters


def torch_features(
    lotlip: PreTrainedModel, tower: str, processors: Sequence[Any]
) -> tuple[Tower, list[tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """A tower as a module, batches of inputs to compare an export with PyTorch, and the features [B, P] of each."""
    module = Tower(lotlip, tower)
    config = tower_configs(lotlip)[tower]
    batches = _texts_to_check(config) if tower == "text" else _images_to_check(config, processors)
    try:
        with torch.inference_mode():
            return module, batches, [module(*batch) for batch in batches]
    except ValueError as error:  # the processor makes images of a wrong size
        raise ConversionError(f"The {tower} tower does not accept its processor's outputs: {error}") from error


def example_of(module: Tower, batch: Sequence[torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], dict[int, str]]:
    """Inputs to trace a tower with, and the names of their axes that may have any size. The sizes are none that an
    exporter would fix: 0, 1, and for any size the configured size and squares."""
    config = tower_configs(module.model)[module.tower]
    if module.tower == "text":
        return tuple(torch.ones(2, 3, dtype=torch.long) for _ in INPUTS["text"]), {0: "batch", 1: "length"}
    if config.family.any_size_in_onnx:
        image = torch.zeros(2, config.num_channels, 5 * config.patch_size, 6 * config.patch_size)
        return (image,), {0: "batch", 2: "height", 3: "width"}
    return (torch.zeros(2, *batch[0].shape[1:]),), {0: "batch"}


def features_of(
    open_tower: Callable[[Path, str], Callable[[dict[str, np.ndarray]], np.ndarray]],
    folder: Path,
    tower: str,
    batches: Sequence[tuple[torch.Tensor, ...]],
) -> list[torch.Tensor]:
    """Features [B, P] of each batch from an exported tower."""
    run = open_tower(folder, tower)
    arrays = ([tensor.numpy() for tensor in batch] for batch in batches)
    return [torch.from_numpy(run(dict(zip(INPUTS[tower], batch, strict=True)))) for batch in arrays]


def check_difference(
    file: str,
    runtime: str,
    given: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    report: Callable[[str], None],
    advice: str = "",
) -> float:
    """Returns the largest difference relative to a feature's norm. Raises an error if it is large, or NaN."""
    one, other = torch.cat(list(given)), torch.cat(list(expected))
    difference = ((one - other) / other.norm(dim=-1, keepdim=True)).abs().max().item()
    report(f"  features differ from PyTorch's by at most {difference:.1e} of their norm")
    if not difference <= TOLERANCE:
        raise ConversionError(
            f"{file}: {runtime}'s features differ from PyTorch's by {difference:.1e} of their norm, more than "
            f"{TOLERANCE:.0e}. Nothing was written. Check that all weights are finite{advice}."
        )
    return difference


def check_cosine(
    file: str, given: torch.Tensor, expected: torch.Tensor, report: Callable[[str], None], advice: str = ""
) -> float:
    """Returns the smallest cosine between quantised features and PyTorch's, [B, P]. Raises an error if it is small."""
    cosine = nn.functional.cosine_similarity(given, expected).min().item()
    report(f"  int8: cosines to PyTorch's features of at least {cosine:.4f}")
    if not cosine >= LEAST_COSINE:
        raise ConversionError(
            f"{file}: a feature in int8 has a cosine of {cosine:.4f} to PyTorch's, less than {LEAST_COSINE}. Nothing "
            f"was written. Export without --quantize{advice}."
        )
    return cosine


def tower_parser(prog: str, description: str, quantize: str) -> tuple[Parser, Any]:
    """Returns a parser with the options of both exports, and its group. `quantize` describes int8."""
    flags = Parser(prog=prog, description=description)
    group = flags.add_argument_group("Conversion")
    group.add_argument(
        "--model", required=True, metavar="FOLDER", help="Folder of a LoTLIP or of one of its towers (required)"
    )
    group.add_argument("--output", required=True, metavar="FOLDER", help="Folder to write (required)")
    group.add_argument("--quantize", choices=("int8",), help=quantize)
    only = group.add_mutually_exclusive_group()
    only.add_argument(
        "--text-only", dest="towers", action="store_const", const=("text",), help="Convert only the text tower"
    )
    only.add_argument(
        "--vision-only", dest="towers", action="store_const", const=("vision",), help="Convert only the image tower"
    )
    flags.set_defaults(towers=tuple(INPUTS))
    return flags, group


def _texts_to_check(config: LoTLIPTextConfig) -> list[tuple[torch.Tensor, ...]]:
    """Batches of ids and masks, padded on either side. If texts are short, the longest exceed the positions."""
    limit = checked_length(config)
    shapes = [(1, 1), (1, 2), (3, 2), (3, min(7, limit)), (5, limit // 2), (2, limit), (2, limit + 3)]
    return [batch for side in ("right", "left") for batch in random_texts(config, shapes, side)]


def _images_to_check(config: Any, processors: Sequence[Any]) -> list[tuple[torch.Tensor, ...]]:
    """Batches [B, channels, height, width]: an image from the processor, and random images (of several sizes, if the
    tower accepts them)."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = config.family.image_shape(config.backbone_config)
    batches = []
    for image_processor in (getattr(one, "image_processor", one) for one in processors):
        if "pixel_values" in image_processor.model_input_names:
            noise = torch.randint(256, (64, 96, 3), generator=generator, dtype=torch.uint8)
            batches.append((load_pixels(noise, image_processor=image_processor)["pixel_values"],))
            height, width = batches[-1][0].shape[-2:]
    sizes = [(1, height, width), (5, height, width)]
    if config.family.any_size_in_onnx:
        sizes.append((2, height + config.patch_size, 3 * config.patch_size))
    for batch_size, height, width in sizes:
        batches.append((torch.randn(batch_size, channels, height, width, generator=generator),))
    return batches
