"""Target layers of LoRA: the encoders of a LoTLIP name their layers differently."""

from torch import nn

from .modeling.modeling_lotlip import LoTLIPTextModel, LoTLIPVisionModel


def lora_targets(model: nn.Module, *, skip_frozen: bool = False) -> list[str]:
    """
    The attention projections of every tower of a model, for PEFT's `LoraConfig(target_modules=...)`. A list such as
    `["q_proj", "v_proj"]` reaches a CLIP or a ViT and no BERT, `["query", "value"]` the BERT alone.

    Args:
        model (`nn.Module`):
            A [`LoTLIPModel`], one of its towers, or what holds one, such as a `SentenceTransformer`.
        skip_frozen (`bool`, *optional*, defaults to `False`):
            Whether to leave out layers whose weights are frozen, as those of a locked tower are.

    Returns:
        `list[str]`: the full names of the layers.

    Raises:
        ValueError: if the model has no tower, or one has no attention layer that LoRA can be put on.

    Example:

    ```python
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import AutoModel
    >>> from lotlip_hf import lora_targets

    >>> model = AutoModel.from_pretrained("lotlip-vit-b-16")
    >>> lora = get_peft_model(model, LoraConfig(target_modules=lora_targets(model)))
    ```
    """
    towers = {name: m for name, m in model.named_modules() if isinstance(m, LoTLIPTextModel | LoTLIPVisionModel)}
    if not towers:
        raise ValueError(f"`model` is a {type(model).__name__}: it holds no tower of a LoTLIP.")
    targets = []
    for prefix, tower in towers.items():
        layers = {name: layer for name, layer in tower.named_modules() if _is_projection(name, layer)}
        if not layers:
            raise ValueError(
                f"{type(tower).__name__} over {type(tower.backbone).__name__}: no linear layer is named as one of an "
                "attention; name the layers in `target_modules` yourself."
            )
        targets += [
            f"{prefix}.{name}".lstrip(".")
            for name, layer in layers.items()
            if not (skip_frozen and not layer.weight.requires_grad)
        ]
    return targets


def _is_projection(name: str, layer: nn.Module) -> bool:
    """Whether a layer is a projection of attention; those in torch's own (SigLIP's pooler) are read and not called."""
    if not isinstance(layer, nn.Linear) or isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return any("attn" in part or "attention" in part for part in name.lower().split(".")[:-1])
