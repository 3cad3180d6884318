"""What of a model is trained, and how: frozen parts, AdamW's groups, and the learning rates of a run."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..modeling.modeling_lotlip import LoTLIPModel
from .config import TrainingConfig


def freeze(model: LoTLIPModel, config: TrainingConfig) -> None:
    """
    Freezes what is not trained: with `lock_vision` the image tower, but for its last `unlocked_vision_layers` layers
    and what follows them; without long texts the corner tokens; and what the forward pass never uses. The projections
    stay trainable.

    Args:
        model: The model, changed in place.
        config: The options.

    Raises:
        ValueError: if more layers are to be unlocked than there are.
    """
    for name, parameter in model.named_parameters():
        unused = name.endswith("mask_token") or (name.endswith("corner_embeds") and not config.num_long_texts)
        parameter.requires_grad_(not unused)
    if not config.lock_vision:
        return
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


def set_training_mode(model: nn.Module) -> None:
    """Training mode, but for modules whose parameters are all frozen: these run as in inference, without dropout."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def make_optimizer(
    model: nn.Module, objective: nn.Module, config: TrainingConfig, max_steps: int, device: torch.device
) -> tuple[torch.optim.AdamW, LRScheduler]:
    """
    AdamW over what is trained, each tower with its own learning rate and without decay but of matrices, and the
    schedule of the rates.

    Args:
        model: A [`LoTLIPModel`].
        objective: Its parameters, if any, are trained too.
        config: The options.
        max_steps: Steps of the run.
        device: Where the run computes.

    Returns:
        The optimiser and its scheduler.
    """
    from transformers.optimization import get_scheduler  # imports PEFT and bitsandbytes, if installed

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in (*model.named_parameters(), *objective.named_parameters()):
        if not parameter.requires_grad:
            continue
        rate = None
        if name.startswith(("text_model.", "text_projection.")):
            rate = config.text_learning_rate
        elif name.startswith(("vision_model.", "visual_projection.")):
            rate = config.image_learning_rate
        rate = config.learning_rate if rate is None else rate
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=device.type in ("cpu", "cuda"),  # one pass over the memory
    )
    return optimizer, get_scheduler(config.lr_scheduler, optimizer, config.warmup_steps, max_steps)
