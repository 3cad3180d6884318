"""Both linear projections in closed form, from the states of two frozen towers: the start of `head_start` ridge."""

from collections.abc import Mapping

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.nn import functional as F

from ..modeling.modeling_lotlip import LoTLIPModel
from ..states import FrozenStates
from .config import TrainingConfig
from .frozen import KeyedRecords
from .linear_heads import PairStates, pair_states, sampled

STRENGTH = 0.1  # of the regularisation, as a share of the mean variance of the image states
# AdamW with weight decay trains the projections. The scale of a cosine is free, so that the same steps change larger
# weights less.
GAIN = 100.0


def check_projections(model: LoTLIPModel) -> None:
    """Raises a `ValueError` if a model lacks one of the two linear projections that [`start_projections`] sets."""
    other_size = "Leave out `text_projection`, and set `projection_dim` to another size than that of the text encoder"
    for name, head, advice in (
        ("text", model.text_projection, other_size),
        ("image", model.visual_projection, "Start a new model from two encoders"),
    ):
        if not isinstance(head, nn.Linear):
            found = "none" if isinstance(head, nn.Identity) else "a residual_mlp"
            raise ValueError(
                f"`head_start` ridge needs two linear projections, but the {name} tower has {found}. {advice}, or set "
                "`head_start` to random."
            )


@torch.no_grad()
def start_projections(
    model: LoTLIPModel,
    records: KeyedRecords,
    states: Mapping[str, FrozenStates],
    config: TrainingConfig,
    device: torch.device,
) -> None:
    """
    Sets both projections of a model to those of [`ridge_projections`] for the records, or a sample of them. Every
    process must call it.

    Args:
        model (`LoTLIPModel`): The model, on `device`.
        records (`KeyedRecords`): Training records, from [`~lotlip_hf.training.frozen.fill_images`].
        states (`Mapping[str, FrozenStates]`): The states of both towers, by modality.
        config (`TrainingConfig`): Options of the run. Only `captioners`, `splitter` and `seed` are used.
        device (`torch.device`): Device of this process.

    Raises:
        `ValueError`: If no two records that can be read have different images.
    """
    readable = {key for key in records.keys if isinstance(key, str)}
    if len(readable) < 2:
        broken = next((f" ({str(key).rstrip('.')})" for key in records.keys if isinstance(key, Exception)), "")
        raise ValueError(
            f"`head_start` ridge needs two different pictures that can be read, but {len(records):,} records have "
            f"{len(readable)}{broken}."
        )
    rows = sampled(len(records), config.seed)
    chosen = KeyedRecords(records.records.select(rows), [records.keys[row] for row in rows])
    pairs = pair_states(chosen, states, config, device)
    weights = ridge_projections(pairs, model.config.projection_dim, config.seed)
    for head, weight in zip((model.visual_projection, model.text_projection), weights, strict=True):
        head.weight.copy_(broadcast(weight.to(device)))


def ridge_projections(pairs: PairStates, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes a projection of images and one of texts in closed form. The projection of texts removes the common
    direction of all texts, which a projection without bias cannot subtract, and keeps their angles otherwise; below
    their width it keeps their first principal components. The projection of images is a ridge regression onto the
    texts, the mean of the normalised short and long captions.

    Args:
        pairs (`PairStates`): States of N images [N, V] and of their captions [N, T], in float32 on the CPU.
        dim (`int`): Size of the embeddings (D).
        seed (`int`, *optional*, defaults to 0): Seed of the basis if D is above T. The global random generators do not
            change.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Weights of the projection of images [D, V] and of that of texts [D, T].

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.training.linear_heads import PairStates
    >>> from lotlip_hf.training.ridge import ridge_projections

    >>> texts = torch.randn(20, 8)
    >>> image, text = ridge_projections(PairStates(texts @ torch.randn(8, 12), texts, texts), 16)
    >>> image.shape, text.shape
    (torch.Size([16, 12]), torch.Size([16, 8]))
    ```
    """
    images = pairs.image
    texts = (F.normalize(pairs.short, dim=-1) + F.normalize(pairs.long, dim=-1)) / 2
    x, y = images.mean(0), texts.mean(0)
    images, texts = images - x, texts - y
    width = images.shape[1]
    ridge = STRENGTH * images.square().sum() / width * torch.eye(width)
    regression = torch.linalg.solve(images.T @ images + ridge, images.T @ texts)
    basis = _basis(texts, dim, seed)
    return GAIN * _without(basis @ regression.T, x), _without(basis, y)


def _basis(texts: torch.Tensor, dim: int, seed: int) -> torch.Tensor:
    """A matrix [D, T] with orthonormal columns, or, below T, with the principal components of the texts as rows."""
    width = texts.shape[1]
    if dim == width:
        return torch.eye(width)
    if dim < width:
        return torch.linalg.eigh(texts.T @ texts).eigenvectors[:, -dim:].T.flip(0)
    return torch.linalg.qr(torch.randn(dim, width, generator=torch.Generator().manual_seed(seed))).Q


def _without(weight: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """The weight of a projection after removal of a direction."""
    unit = F.normalize(direction, dim=0)
    return weight - (weight @ unit)[:, None] * unit
