"""Trained and frozen parameters, the optimiser and its schedule."""

from collections.abc import Collection

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..modeling.modeling_lotlip import LoTLIPModel
from .config import TrainingConfig
from .fsdp import OBJECTIVE


def freeze(model: LoTLIPModel, config: TrainingConfig, needs: Collection[str]) -> None:
    """
    Freezes the image tower if `lock_vision`, but for its last `unlocked_vision_layers` layers and what follows them,
    and what `needs`, those of the objective, do not use.

    Raises:
        ValueError: if the tower has fewer layers than are unlocked.
    """
    model.requires_grad_(True)
    if config.lock_vision:
        _lock_vision(model, config)
    freeze_unused(model, needs, bool(config.num_long_texts))


def _lock_vision(model: LoTLIPModel, config: TrainingConfig) -> None:
    tower = model.vision_model
    num_layers = tower.backbone.config.num_hidden_layers
    if config.unlocked_vision_layers > num_layers:
        raise ValueError(
            f"`unlocked_vision_layers` is {config.unlocked_vision_layers}, but the image tower has {num_layers}."
        )
    tower.requires_grad_(False)
    if config.unlocked_vision_layers:
        (layers,) = [
            module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers
        ]
        first = next(iter(layers[num_layers - config.unlocked_vision_layers].parameters()))
        # parameters come in the order of the forward pass
        parameters = list(tower.parameters())
        start = next(index for index, parameter in enumerate(parameters) if parameter is first)
        for parameter in parameters[start:]:
            parameter.requires_grad_(True)


def freeze_unused(model: nn.Module, needs: Collection[str], has_long_texts: bool) -> None:
    """Freezes the parameters that give none of `needs`: `DistributedDataParallel` would wait for their gradients."""
    unused = ["mask_token"]
    if "image_embeds" not in needs:
        unused += ["vision_model.", "visual_projection."]
    if "text_embeds" not in needs and "corner_embeds" not in needs:
        unused += ["text_model.", "text_projection."]
    if "corner_embeds" not in needs or not has_long_texts:
        unused += ["text_model.corner_embeds"]
    for name, parameter in model.named_parameters():
        if any(part in name for part in unused):  # PEFT puts its own names around them
            parameter.requires_grad_(False)


def set_training_mode(model: nn.Module) -> None:
    """Sets training mode, but for modules whose parameters are all frozen: they run without dropout."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def make_optimizer(
    model: nn.Module, objective: nn.Module, config: TrainingConfig, max_steps: int, device: torch.device
) -> tuple[torch.optim.AdamW, LRScheduler]:
    """AdamW and its schedule: a learning rate for each tower, weight decay for matrices alone."""
    from transformers.optimization import get_scheduler  # imports PEFT and bitsandbytes, if installed

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
        # under FSDP no step takes matrices that are sharded together with the objective's, which are not
        groups.setdefault((rate, decay, name.startswith(f"{OBJECTIVE}.")), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay, _), params in groups.items()],
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=device.type in ("cpu", "cuda"),  # one pass over the memory
    )
    return optimizer, get_scheduler(config.lr_scheduler, optimizer, config.warmup_steps, max_steps)
