"""Frozen parameters, the optimiser and the learning rate schedule."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..modeling.backbones_lotlip import TEXT_BACKBONES
from ..modeling.modeling_lotlip import LoTLIPModel, LoTLIPTextModel, LoTLIPVisionModel
from .config import TrainingConfig
from .fsdp import OBJECTIVE
from .objective import IMAGE_EMBEDS, TEXT_EMBEDS

# What the names of the parameters contain that the options `<part>_learning_rate` are for
PARTS = {
    "text": ".text_model.backbone.",
    "image": ".vision_model.backbone.",
    "corner": ".text_model.corner_embeds",
    "logit_scale": ".logit_scale",
}


def freeze(model: LoTLIPModel, config: TrainingConfig, needs: Collection[str]) -> None:
    """
    Freezes the parameters that a run does not train: with `lock_vision` the image tower up to its last
    `unlocked_vision_layers` layers, with `lock_text` the text encoder up to its last `unlocked_text_layers` layers,
    and the parameters that no tensor in `needs` depends on. Sets `text_dtype`.

    Raises:
        `ValueError`: If an encoder has fewer layers than are to be unlocked.
    """
    model.requires_grad_(True)
    if config.lock_vision:
        _lock(model.vision_model, "unlocked_vision_layers", config.unlocked_vision_layers)
    if config.lock_text:
        _lock(model.text_model, "unlocked_text_layers", config.unlocked_text_layers)
        for parameter in model.text_model.backbone.parameters():
            parameter.data = parameter.data.to(getattr(torch, config.text_dtype))
    freeze_unused(model, needs, bool(config.num_long_texts))


def _lock(tower: LoTLIPTextModel | LoTLIPVisionModel, option: str, num_unlocked: int) -> None:
    """Freezes the encoder of a tower up to its last layers."""
    tower.backbone.requires_grad_(False)
    if not num_unlocked:
        return
    num_layers = len(tower.config.family.layers(tower.backbone))
    if num_unlocked > num_layers:
        raise ValueError(f"`{option}` is {num_unlocked}, but the encoder has {num_layers} layers. Reduce it.")
    for parameter, number in layers_above(tower, option).items():
        parameter.requires_grad_(number < num_unlocked)


def layers_above(tower: LoTLIPTextModel | LoTLIPVisionModel, option: str) -> dict[nn.Parameter, int]:
    """
    Returns the number of layers above each parameter of a tower's encoder: 0 for the last layer and what follows it,
    the number of layers for the embeddings and for what all layers use.

    Raises:
        `ValueError`: If the encoder has no layers, or it is unknown what its layers use. The message names `option`.
    """
    family, model_type = tower.config.family, tower.config.backbone_config.model_type
    layers = family.layers(tower.backbone)
    if family.used_by_layers is None:
        raise ValueError(
            f"`{option}` does not fit {model_type}. Remove it, or use one of {', '.join(TEXT_BACKBONES)}."
        )
    if not layers:
        raise ValueError(f"`{option}` does not fit {model_type}, which has no list of layers. Remove it.")
    numbers = {parameter: number for number, layer in enumerate(layers, 1) for parameter in layer.parameters()}
    above, passed = {}, 0
    for name, parameter in tower.backbone.named_parameters():  # in the order of the forward pass
        passed = numbers.get(parameter, passed)
        above[parameter] = len(layers) - (0 if name.startswith(family.used_by_layers) else passed)
    return above


def warmup_steps(config: TrainingConfig, max_steps: int) -> int:
    """Returns the steps of the warm-up. A share of `max_steps` is rounded up."""
    warmup = config.warmup_steps
    return math.ceil(round(warmup * max_steps, 6)) if warmup < 1 else int(warmup)


def learning_rates(model: LoTLIPModel, config: TrainingConfig) -> dict[str, float]:
    """
    Returns the learning rate of each trained parameter by its name, which may have the prefixes of PEFT: the rate of
    its part, multiplied in an encoder by `layer_decay` for each layer above it. Other parameters have `learning_rate`.

    Raises:
        `ValueError`: If `layer_decay` is set and does not fit an encoder that is trained.
    """
    towers = {"text": model.text_model, "image": model.vision_model}
    above: dict[str, dict[nn.Parameter, int]] = {}
    rates = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = next((part for part, mark in PARTS.items() if mark in f".{name}"), None)
        own = None if part is None else getattr(config, f"{part}_learning_rate")
        rates[name] = config.learning_rate if own is None else own
        if part in towers and config.layer_decay < 1:
            if part not in above:
                above[part] = layers_above(towers[part], "layer_decay")
            rates[name] *= config.layer_decay ** above[part][parameter]
    return rates


def freeze_unused(model: Any, needs: Collection[str], has_long_texts: bool) -> None:
    """Freezes the parameters that `needs` do not depend on, as `DistributedDataParallel` waits for every gradient."""
    vision = model.config.vision_config
    unused = ["mask_token"]
    if vision.pooling != "pooler":
        unused += [f"vision_model.backbone.{name}." for name in vision.family.pooler_modules]
    if not IMAGE_EMBEDS & set(needs):
        unused += ["vision_model.", "visual_projection."]
    if not TEXT_EMBEDS & set(needs):
        unused += ["text_model.", "text_projection."]
    if "corner_embeds" not in needs or not has_long_texts:
        unused += ["text_model.corner_embeds"]
    for name, parameter in model.named_parameters():
        if any(part in name for part in unused):  # PEFT adds prefixes to the names
            parameter.requires_grad_(False)


def set_training_mode(model: nn.Module) -> None:
    """Sets training mode. Modules with only frozen parameters stay in evaluation mode, without dropout."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def make_optimizer(
    model: LoTLIPModel, objective: nn.Module, config: TrainingConfig, max_steps: int, device: torch.device
) -> tuple[torch.optim.AdamW, LRScheduler]:
    """Creates AdamW, with [`learning_rates`] by part and weight decay only for matrices, and its schedule."""
    from transformers.optimization import get_scheduler  # slow: imports PEFT and bitsandbytes, if installed

    rates = learning_rates(model, config)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in (*model.named_parameters(), *objective.named_parameters(prefix=OBJECTIVE)):
        if not parameter.requires_grad:
            continue
        rate = rates.get(name, config.learning_rate)
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        # Under FSDP, AdamW cannot step sharded parameters together with those of the objective, which are not sharded.
        groups.setdefault((rate, decay, name.startswith(f"{OBJECTIVE}.")), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay, _), params in groups.items()],
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=device.type in ("cpu", "cuda"),
    )
    return optimizer, get_scheduler(config.lr_scheduler, optimizer, warmup_steps(config, max_steps), max_steps)
