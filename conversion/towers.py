"""Shared by the exports of towers: towers as modules, and inputs with which an export is compared with PyTorch."""

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lotlip_hf import LoTLIPModel, LoTLIPTextConfig, LoTLIPVisionConfig
from lotlip_hf.images import load_pixels
from lotlip_hf.loading import fit_tokenizer, naming_damage, quiet

from .common import ConversionError, checked_length, load_checkpoint, local_folder, random_texts

# Largest accepted difference from PyTorch's features, relative to a feature's norm.
TOLERANCE = 1e-4
# Smallest accepted cosine between quantised features and PyTorch's.
LEAST_COSINE = 0.98
INPUTS = {"text": ("input_ids", "attention_mask"), "vision": ("pixel_values",)}
OUTPUTS = {"text": "text_embeds", "vision": "image_embeds"}


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
    """Context without messages of the exporter and the quantiser."""
    disabled = logging.root.manager.disable
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


def largest_difference(given: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest difference relative to a feature's norm, or NaN if a feature is not finite."""
    one, other = torch.cat(list(given)), torch.cat(list(expected))
    return ((one - other) / other.norm(dim=-1, keepdim=True)).abs().max().item()


def texts_to_check(config: LoTLIPTextConfig) -> list[tuple[torch.Tensor, ...]]:
    """Batches of ids and masks, padded on either side. If texts are short, the longest exceed the positions."""
    limit = checked_length(config)
    shapes = [(1, 1), (1, 2), (3, 2), (3, min(7, limit)), (5, limit // 2), (2, limit), (2, limit + 3)]
    return [batch for side in ("right", "left") for batch in random_texts(config, shapes, side)]


def images_to_check(config: Any, processors: Sequence[Any]) -> list[tuple[torch.Tensor, ...]]:
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
