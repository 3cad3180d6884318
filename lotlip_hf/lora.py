"""Target layers of LoRA in LoTLIP models, whose backbones name their layers differently."""

from torch import nn

from .modeling.modeling_lotlip import LoTLIPTextModel, LoTLIPVisionModel


def lora_targets(model: nn.Module, *, skip_frozen: bool = False) -> list[str]:
    """
    Returns the attention projections of all towers of a model, for PEFT's `LoraConfig(target_modules=...)`. The names
    differ by backbone: BERT has layers `query` and `value`, CLIP, ViT and decoders have `q_proj` and `v_proj`, T5 has
    `q` and `v`, ModernBERT has `Wqkv`. In a tower without attention, such as ConvNeXt, all linear layers are returned.

    Args:
        model (`nn.Module`): [`LoTLIPModel`], one of its towers, or a module that contains one, such as a
            `SentenceTransformer`.
        skip_frozen (`bool`, *optional*, defaults to `False`): Whether to leave out layers with frozen weights, such as
            those of a locked tower.

    Returns:
        `list[str]`: Full names of the layers.

    Raises:
        `ValueError`: If the model has no tower, or if a tower has no layer that supports LoRA.

    Example:

    ```python
    >>> from peft import LoraConfig, get_peft_model
    >>> from lotlip_hf import LoTLIPModel, lora_targets

    >>> model = LoTLIPModel.from_pretrained("checkpoint")
    >>> lora = get_peft_model(model, LoraConfig(target_modules=lora_targets(model)))
    ```
    """
    towers = {name: m for name, m in model.named_modules() if isinstance(m, LoTLIPTextModel | LoTLIPVisionModel)}
    if not towers:
        raise ValueError(f"`model` is a {type(model).__name__} without a LoTLIP tower. Pass a LoTLIPModel or a tower.")
    targets = []
    for prefix, tower in towers.items():
        linear = {name: layer for name, layer in tower.named_modules() if _is_linear(layer)}
        layers = {name: layer for name, layer in linear.items() if _is_of_attention(name)} or linear
        if not layers:
            raise ValueError(
                f"{type(tower).__name__}: the {type(tower.backbone).__name__} has no linear layer. List its layers in "
                "`target_modules`."
            )
        targets += [
            f"{prefix}.{name}".lstrip(".")
            for name, layer in layers.items()
            if not (skip_frozen and not layer.weight.requires_grad)
        ]
    return targets


def _is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear and called; `nn.MultiheadAttention` never calls its layers."""
    return isinstance(layer, nn.Linear) and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _is_of_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.lower().split(".")[:-1])
