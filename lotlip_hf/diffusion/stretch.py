"""CLIP's text tower: more positions for longer texts, and conversion of a LoTLIP text tower to the stock classes."""

from typing import Literal, get_args

import torch
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from ..modeling.modeling_lotlip import LoTLIPModel, LoTLIPTextModel, LoTLIPTextModelWithProjection

Stretch = Literal["knowledge-preserved", "linear"]

# Only the first 20 positions of CLIP are well trained (Long-CLIP, https://arxiv.org/abs/2403.15378, section 3.2).
KEPT_POSITIONS = 20


def stretch_positions(
    positions: torch.Tensor, max_positions: int, stretch: Stretch = "knowledge-preserved"
) -> torch.Tensor:
    """
    Interpolates a longer table of position embeddings. Beyond the last old position, the last two old embeddings are
    extrapolated linearly, as in Long-CLIP's code.

    Args:
        positions (`torch.Tensor`): [N, hidden_size], the old table.
        max_positions (`int`): Number M of positions in the new table, at least N. Long-CLIP uses 248.
        stretch (`str`, *optional*, defaults to `"knowledge-preserved"`): `"knowledge-preserved"` keeps the first 20
            positions and interpolates the rest, as in Long-CLIP; `"linear"` interpolates all positions.

    Returns:
        `torch.Tensor`: [M, hidden_size], with the dtype and device of `positions`.

    Raises:
        `ValueError`: If `max_positions` is below N, N is too small to interpolate, or `stretch` is unknown.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.diffusion.stretch import stretch_positions

    >>> stretch_positions(torch.arange(77.0).unsqueeze(1), 248)[[0, 19, 20, 21, 247], 0]
    tensor([ 0.0000, 19.0000, 20.0000, 20.2500, 76.7500])
    ```
    """
    if stretch not in get_args(Stretch):
        raise ValueError(f"`stretch` is {stretch!r}. Pass one of {', '.join(map(repr, get_args(Stretch)))}.")
    num_positions = len(positions)
    kept = KEPT_POSITIONS if stretch == "knowledge-preserved" else 0
    if max_positions < num_positions:
        raise ValueError(f"`max_positions` is {max_positions}. Pass at least {num_positions}, the current number.")
    if max_positions == num_positions:
        return positions.clone()
    if num_positions < kept + 2:
        raise ValueError(
            f"`stretch`={stretch!r} needs at least {kept + 2} positions, but the table has {num_positions}. Pass "
            '`stretch="linear"`.'
        )
    new = torch.arange(max_positions, dtype=torch.float64, device=positions.device)
    old = kept + (new - kept) * (num_positions - kept) / (max_positions - kept)
    old = torch.where(new < kept, new, old)
    left = old.long().clamp(max=num_positions - 2)  # at the end, extrapolate from the last pair
    weight = (old - left).unsqueeze(1)
    table = positions.double()
    return torch.lerp(table[left], table[left + 1], weight).to(positions.dtype)


def stretch_text_model(
    model: CLIPModel
    | CLIPTextModel
    | CLIPTextModelWithProjection
    | LoTLIPModel
    | LoTLIPTextModel
    | LoTLIPTextModelWithProjection,
    max_positions: int,
    stretch: Stretch = "knowledge-preserved",
) -> None:
    """
    Gives a CLIP text tower more positions, in place, with [`stretch_positions`]. The table becomes a new parameter, so
    create optimizers afterwards.

    Args:
        model (`PreTrainedModel`): A stock CLIP, its text model, or a LoTLIP model with CLIP's text tower.
        max_positions (`int`): New number of positions.
        stretch (`str`, *optional*, defaults to `"knowledge-preserved"`): As in [`stretch_positions`].

    Raises:
        `ValueError`: If the text tower is not CLIP's, or an argument is invalid in [`stretch_positions`].
    """
    tower = _clip_tower(model)
    embeddings = tower.embeddings
    old = embeddings.position_embedding.weight
    table = stretch_positions(old.detach(), max_positions, stretch)
    embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=not old.requires_grad)
    embeddings.position_ids = torch.arange(max_positions, device=old.device).unsqueeze(0)
    for config in (tower.config, model.config, getattr(model, "text_model", model).config):
        # LoTLIP configurations store the number in `backbone_config`
        config = getattr(config, "text_config", config)
        getattr(config, "backbone_config", config).max_position_embeddings = max_positions


def clip_text_model(
    model: LoTLIPModel | LoTLIPTextModel | LoTLIPTextModelWithProjection, with_projection: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """
    Converts a LoTLIP model with CLIP's text tower to the stock text encoder of transformers. Model and encoder share
    weights. The stock encoder has no corner tokens and the same outputs, because no text token attends to them.

    Args:
        model (`LoTLIPModel` or `LoTLIPTextModel` or `LoTLIPTextModelWithProjection`): Model with CLIP's text tower.
        with_projection (`bool`, *optional*, defaults to `False`): Whether to return a `CLIPTextModelWithProjection`,
            whose `text_embeds` equal `model.get_text_features(...).pooler_output`.

    Returns:
        `CLIPTextModel` or `CLIPTextModelWithProjection`: The stock text encoder.

    Raises:
        `ValueError`: If the text tower is not CLIP's.
    """
    tower = _clip_tower(model)
    state_dict = dict(tower.state_dict())
    stock_class = CLIPTextModel
    config = type(tower.config).from_dict(tower.config.to_dict())
    if with_projection:
        projection: nn.Linear = model.text_projection  # pyright: ignore
        stock_class = CLIPTextModelWithProjection
        state_dict = {f"text_model.{name}": tensor for name, tensor in state_dict.items()}
        state_dict["text_projection.weight"] = projection.weight.detach()
        config.projection_dim = projection.out_features
    config.architectures = [stock_class.__name__]
    config.dtype = tower.dtype
    with torch.device("meta"):
        stock = stock_class(config)
    stock.load_state_dict(state_dict, assign=True)
    stock_tower = _clip_tower(stock)
    stock_tower.embeddings.position_ids = tower.embeddings.position_ids  # missing in state dicts
    for parameter, own in zip(stock_tower.parameters(), tower.parameters(), strict=True):
        parameter.requires_grad_(own.requires_grad)
    if with_projection:
        stock.text_projection.requires_grad_(projection.weight.requires_grad)
    stock.set_attn_implementation(tower.config._attn_implementation)
    return stock.train(model.training)


def _clip_tower(model: nn.Module) -> CLIPTextModel:
    tower = model
    for name in ("text_model", "backbone"):
        tower = getattr(tower, name, tower)
    if not isinstance(tower, CLIPTextModel):
        raise ValueError(f"{type(model).__name__} has a {type(tower).__name__}. Pass a model with CLIP's text tower.")
    return tower
