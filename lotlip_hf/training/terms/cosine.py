"""The cosine term of DCLIP's student: embeddings have the direction of the teacher's."""

import torch
from torch import nn
from torch.nn import functional as F

from ...distributed import world_size
from .taught import Of, compared, needs_of
from .views import Views


class Cosine(nn.Module):
    """
    The cosine distance from the teacher's embeddings, with which DCLIP (https://arxiv.org/abs/2505.21549) trains its
    student: 1 - cosine, averaged over the texts of a sample and over the samples of all processes.

    Args:
        of (`str`, *optional*, defaults to `"text"`): `"text"`, `"image"`, or `"both"`, the sum of these.
    """

    def __init__(self, of: Of = "text") -> None:
        super().__init__()
        self.of: Of = of
        self.needs = needs_of(of)

    def forward(self, views: Views) -> torch.Tensor:
        distances = [(1 - F.cosine_similarity(*pair, dim=-1)).mean(1).sum() for pair in compared(views, self.of)]
        return torch.stack(distances).sum() * world_size() / views.num_samples
