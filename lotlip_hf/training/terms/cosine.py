"""The cosine term of DCLIP's student: embeddings have the direction of the teacher's."""

import torch
from torch.nn import functional as F

from ...distributed import world_size
from .taught import Taught
from .views import Views


class Cosine(Taught):
    """
    The cosine distance from the teacher's embeddings, with which DCLIP (https://arxiv.org/abs/2505.21549) trains its
    student: 1 - cosine, averaged over the texts of a sample and over the samples of all processes.

    Args:
        of (`str`, *optional*, defaults to `"text"`): `"text"`, `"image"`, or `"both"`, the sum of these.
    """

    def forward(self, views: Views) -> torch.Tensor:
        distances = [(1 - F.cosine_similarity(*pair, dim=-1)).mean(1).sum() for pair in self.compared(views)]
        return torch.stack(distances).sum() * world_size() / views.num_samples
