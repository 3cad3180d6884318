"""
Medoids inside an image tower, as in CenterCLIP (https://arxiv.org/abs/2205.00823), but of one image: before a layer,
the patches are clustered, and this layer and those after it compute only the medoid of each cluster.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .fast_paths_lotlip import Extension, extend, take

MAX_STEPS = 60  # of the clustering, which usually needs fewer than ten


@torch.no_grad()
def medoids(states: Tensor, num_centers: int) -> Tensor:
    """
    Clusters tokens by K-medoids with Euclidean distances.

    The first medoid is the token of the largest norm, and each further one is the farthest from those before it. Then
    tokens join their nearest medoid, and the token with the least sum of distances in a cluster becomes its medoid,
    until nothing changes. The clustering of an image does not depend on the other images.

    Args:
        states (`torch.Tensor`): Tokens [B, P, W].
        num_centers (`int`): Number K of medoids, from 1 to P.

    Returns:
        `torch.Tensor`: Indices [B, K] of different tokens, sorted.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.modeling.medoids_lotlip import medoids
    >>> medoids(torch.tensor([[[0.0], [1.0], [2.0], [9.0], [11.0], [10.0]]]), 2)
    tensor([[1, 5]])
    ```
    """
    points = states.detach().to(torch.promote_types(states.dtype, torch.float32))
    centred = points - points.mean(1, keepdim=True)  # a product of large numbers would round small distances
    distances = torch.cdist(centred, centred)  # [B, P, P]
    chosen = _farthest_first(points.norm(dim=-1), distances, num_centers)
    for _ in range(MAX_STEPS):
        moved = _move(distances, chosen)
        if torch.equal(moved, chosen):
            break
        chosen = moved
    return chosen.sort(dim=-1).values


def _farthest_first(norms: Tensor, distances: Tensor, num_centers: int) -> Tensor:
    """Norms [B, P] and distances [B, P, P] -> indices [B, K] of different tokens."""
    chosen = [norms.argmax(-1, keepdim=True)]
    nearest = torch.full_like(norms, torch.inf)  # distances to the nearest chosen token
    while len(chosen) < num_centers:
        nearest = nearest.minimum(take(distances, chosen[-1]).squeeze(1))
        nearest = nearest.scatter(1, chosen[-1], -1)  # also if all other tokens are equal to a chosen one
        chosen.append(nearest.argmax(-1, keepdim=True))
    return torch.cat(chosen, dim=1)


def _move(distances: Tensor, chosen: Tensor) -> Tensor:
    """Distances [B, P, P] and medoids [B, K] -> the medoids [B, K] of the tokens that are nearest to each."""
    own = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    cluster = take(distances, chosen).argmin(1).scatter(1, chosen, own)  # [B, P]; no cluster is empty
    is_member = nn.functional.one_hot(cluster, chosen.shape[1]).to(distances)  # [B, P, K]
    return (distances @ is_member).masked_fill(is_member == 0, torch.inf).argmin(1)


class Kept:
    """The patches [B, K] that one call computes, once a layer has chosen them."""

    index: Tensor | None = None


class MedoidLayer(Extension):
    """A layer of an image encoder that is before, at or after the layer that chooses medoids."""

    num_prefix_tokens = 0  # class token and registers, which are kept
    num_centers = 0  # number of medoids in the layer that chooses, and 0 in others
    is_after = False

    def forward(self, hidden_states: Tensor, *args: Any, kept: Kept | None = None, **kwargs: Any) -> Any:
        """Input [B, prefix + P, hidden_size]. The layer that chooses returns [B, prefix + K, hidden_size]."""
        index, prefix = kept.index if kept is not None and self.is_after else None, self.num_prefix_tokens
        if 0 < self.num_centers < hidden_states.shape[1] - prefix:
            patches = hidden_states[:, prefix:]
            index = medoids(patches, self.num_centers)
            hidden_states = torch.cat([hidden_states[:, :prefix], take(patches, index)], dim=1)
            if kept is not None:
                kept.index = index
        if index is not None and "position_embeddings" in kwargs:  # cos and sin [P, head_dim] or [B, 1, P, head_dim]
            kwargs["position_embeddings"] = tuple(_take(one, index) for one in kwargs["position_embeddings"])
        return super().forward(hidden_states, *args, **kwargs)


def _take(positions: Tensor, index: Tensor) -> Tensor:
    """Rotary positions of all images or of each image, and indices [B, K] -> [B, 1, K, head_dim]."""
    each = positions[index] if positions.dim() == 2 else take(positions.squeeze(1), index)
    return each.unsqueeze(1)


def choose_medoids(
    backbone: PreTrainedModel, layers: list[nn.Module], num_centers: int, first: int, num_prefix_tokens: int
) -> None:
    """Makes the layers from `first`, counted from 0, compute `num_centers` patches. A second call changes them."""
    for index, layer in enumerate(layers):
        if not isinstance(layer, MedoidLayer):
            extend(backbone, layer, MedoidLayer)
        layer.num_prefix_tokens = num_prefix_tokens
        layer.num_centers = num_centers if index == first else 0
        layer.is_after = index > first
