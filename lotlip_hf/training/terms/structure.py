"""The structure term of ProCLIP: embeddings have the same distances from each other as the teacher's."""

from typing import Literal

import torch
from torch.nn import functional as F

from ...distributed import world_size
from .taught import Of, Taught
from .views import Views

LOSSES = {"smooth_l1": F.smooth_l1_loss, "squared": F.mse_loss}


class Structure(Taught):
    """
    The structure term of ProCLIP (https://arxiv.org/abs/2510.18795): the differences between the distances of two
    short texts, or two images, and the distances of the teacher's embeddings, summed over all pairs and divided by the
    number of samples.

    The pairs are those of all processes, so the term does not depend on the number of processes. ProCLIP sums over the
    pairs of a process instead. In one process, its term is the batch size times this term.

    Args:
        distance (`str`, *optional*, defaults to `"smooth_l1"`): Function of a difference: `"smooth_l1"` as in the code
            of ProCLIP, or `"squared"` as in its paper.
        of (`str`, *optional*, defaults to `"text"`): `"text"` as in stage 1 of ProCLIP, `"image"` as in stage 2, or
            `"both"`, the sum of these.
    """

    def __init__(self, distance: Literal["smooth_l1", "squared"] = "smooth_l1", of: Of = "text") -> None:
        super().__init__(of)
        self.loss = LOSSES[distance]

    def forward(self, views: Views) -> torch.Tensor:
        sums = []
        for own, every in zip(self.compared(views), self.compared(views, gathered=True), strict=True):
            student, teacher = (distances(rows[:, 0], columns[:, 0]) for rows, columns in zip(own, every, strict=True))
            # Each process compares its embeddings with all embeddings, so every pair occurs twice.
            sums.append(self.loss(student, teacher, reduction="sum") / 2)
        return torch.stack(sums).sum() * world_size() / views.num_samples


def distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """
    Returns the Euclidean distances [b, N] of vectors [b, dim] and [N, dim]. The gradient of a distance 0 is 0.

    The gradient of `torch.cdist` needs memory for b x N x dim numbers on a GPU, this one for b x N.
    """
    centre = columns.detach().mean(0)  # rounding errors are relative to the norms
    rows, columns = rows - centre, columns - centre
    squares = rows.square().sum(1, keepdim=True) + columns.square().sum(1) - 2 * rows @ columns.t()
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
