"""Frozen parameters, the optimiser and the learning rate schedule."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..modeling.modeling_lotlip import LoTLIPModel
from .config import TrainingConfig
from .fsdp import OBJECTIVE


def freeze(model: LoTLIPModel, config: TrainingConfig, needs: Collection[str]) -> None:
    """
    Freezes the parameters that a run does not train: with `lock_vision` the image tower up to its last
    `unlocked_vision_layers` layers, with `lock_text` the text tower except its corner tokens, and the parameters that
    no tensor in `needs` depends on. Sets `text_dtype`.

    Raises:
        `ValueError`: If the tower has fewer than `unlocked_vision_layers` layers.
    """
    model.requires_grad_(True)
    if config.lock_vision:
        _lock_vision(model, config)
    if config.lock_text:
        for parameter in model.text_model.backbone.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(getattr(torch, config.text_dtype))
    freeze_unused(model, needs, bool(config.num_long_texts))


def _lock_vision(model: LoTLIPModel, config: TrainingConfig) -> None:
    tower = model.vision_model
    layers = tower.config.family.layers(tower.backbone)
    num_layers = len(layers)
    if config.unlocked_vision_layers > num_layers:
        raise ValueError(
            f"`unlocked_vision_layers` is {config.unlocked_vision_layers}, but the image tower has {num_layers} "
            "layers. Reduce it."
        )
    tower.requires_grad_(False)
    if config.unlocked_vision_layers:
        first = next(iter(layers[num_layers - config.unlocked_vision_layers].parameters()))
        # Parameters are in the order of the forward pass.
        parameters = list(tower.parameters())
        start = next(index for index, parameter in enumerate(parameters) if parameter is first)
        for parameter in parameters[start:]:
            parameter.requires_grad_(True)


def freeze_unused(model: Any, needs: Collection[str], has_long_texts: bool) -> None:
    """Freezes the parameters that `needs` do not depend on, as `DistributedDataParallel` waits for every gradient."""
    vision = model.config.vision_config
    unused = ["mask_token"]
    if vision.pooling != "pooler":
        unused += [f"vision_model.backbone.{name}." for name in vision.family.pooler_modules]
    if "image_embeds" not in needs:
        unused += ["vision_model.", "visual_projection."]
    if "text_embeds" not in needs and "corner_embeds" not in needs:
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
    model: nn.Module, objective: nn.Module, config: TrainingConfig, max_steps: int, device: torch.device
) -> tuple[torch.optim.AdamW, LRScheduler]:
    """Creates AdamW, with a learning rate per tower and weight decay only for matrices, and its schedule."""
    from transformers.optimization import get_scheduler  # slow: imports PEFT and bitsandbytes, if installed

    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in (*model.named_parameters(), *objective.named_parameters(prefix=OBJECTIVE)):
        if not parameter.requires_grad:
            continue
        rate = None
        if name.startswith(("text_model.", "text_projection.")):
            rate = config.text_learning_rate
        elif name.startswith(("vision_model.", "visual_projection.")):
            rate = config.image_learning_rate
        rate = config.learning_rate if rate is None else rate
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        # Under FSDP, AdamW cannot step sharded parameters together with those of the objective, which are not sharded.
        groups.setdefault((rate, decay, name.startswith(f"{OBJECTIVE}.")), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay, _), params in groups.items()],
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=device.type in ("cpu", "cuda"),
    )
    return optimizer, get_scheduler(config.lr_scheduler, optimizer, config.warmup_steps, max_steps)
