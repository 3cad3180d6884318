"""CLIP's text tower: more positions for longer texts, and stock classes out of LoTLIP's own."""

from typing import Literal, get_args

import torch
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from ..modeling.modeling_lotlip import LoTLIPModel, LoTLIPTextModel, LoTLIPTextModelWithProjection

Stretch = Literal["knowledge-preserved", "linear"]

# Long-CLIP (https://arxiv.org/abs/2403.15378, section 3.2): CLIP's first 20 positions are its well trained ones.
KEPT_POSITIONS = 20


def stretch_positions(
    positions: torch.Tensor, max_positions: int, stretch: Stretch = "knowledge-preserved"
) -> torch.Tensor:
    """
    A longer table of position embeddings. `"knowledge-preserved"` is Long-CLIP's recipe: the first 20 positions stay
    as they are and the rest is interpolated; `"linear"` interpolates all. Behind the last old position the line
    through the last two goes on, as in Long-CLIP's code.

    Args:
        positions: [N, hidden_size], the old table.
        max_positions: Number of positions M of the new one, N or more; 248 in Long-CLIP.
        stretch: How.

    Returns:
        [M, hidden_size] in the dtype of `positions`, on its device.

    Raises:
        ValueError: if `max_positions` is below N, or N too few, or `stretch` unknown.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.diffusion.stretch import stretch_positions

    >>> stretch_positions(torch.arange(77.0).unsqueeze(1), 248)[[0, 19, 20, 21, 247], 0]
    tensor([ 0.0000, 19.0000, 20.0000, 20.2500, 76.7500])
    ```
    """
    if stretch not in get_args(Stretch):
        raise ValueError(f"`stretch` must be one of {', '.join(get_args(Stretch))}, got {stretch!r}.")
    num_positions = len(positions)
    kept = KEPT_POSITIONS if stretch == "knowledge-preserved" else 0
    if max_positions < num_positions:
        raise ValueError(f"`max_positions` is {max_positions}, fewer than the {num_positions} that are there.")
    if max_positions == num_positions:
        return positions.clone()
    if num_positions < kept + 2:
        raise ValueError(
            f"stretch={stretch!r} interpolates what follows the first {kept} positions and needs {kept + 2} or more; "
            f"there are {num_positions}."
        )
    new = torch.arange(max_positions, dtype=torch.float64, device=positions.device)
    places = kept + (new - kept) * (num_positions - kept) / (max_positions - kept)
    places = torch.where(new < kept, new, places)
    left = places.long().clamp(max=num_positions - 2)  # the last pair also serves what lies behind it
    weight = (places - left).unsqueeze(1)
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
    Gives a CLIP text tower more positions, in place; see [`stretch_positions`]. The table is a new parameter: make
    optimizers after it.

    Args:
        model: A stock CLIP or its text model, or a LoTLIP model over CLIP's text tower.
        max_positions: The new number of positions.
        stretch: How the new table is made.

    Raises:
        ValueError: if the model has no CLIP text tower, or as [`stretch_positions`].
    """
    tower = _clip_tower(model)
    embeddings = tower.embeddings
    old = embeddings.position_embedding.weight
    table = stretch_positions(old.detach(), max_positions, stretch)
    embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=not old.requires_grad)
    embeddings.position_ids = torch.arange(max_positions, device=old.device).unsqueeze(0)
    for config in (tower.config, model.config, getattr(model, "text_model", model).config):
        # the stock classes have one configuration; LoTLIP's keeps the number with its backbone's
        config = getattr(config, "text_config", config)
        getattr(config, "backbone_config", config).max_position_embeddings = max_positions


def clip_text_model(
    model: LoTLIPModel | LoTLIPTextModel | LoTLIPTextModelWithProjection, with_projection: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """
    The stock transformers text encoder with the weights of a LoTLIP over CLIP's text tower. Corner tokens are left
    out: no text token sees them, so every output is the same. Weights are shared with `model`, not copied.

    Args:
        model: A LoTLIP model whose text tower is CLIP's.
        with_projection: Whether to give `CLIPTextModelWithProjection`, whose `text_embeds` are
            `get_text_features(...).pooler_output`.

    Raises:
        ValueError: if the text tower is not CLIP's.
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
    stock_tower.embeddings.position_ids = tower.embeddings.position_ids  # which no state dict has
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
        raise ValueError(f"{type(model).__name__} has no CLIP text tower: its text encoder is {type(tower).__name__}.")
    return tower
