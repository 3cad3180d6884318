"""The instance term of ProCLIP: embeddings are near the teacher's embeddings of the same texts or images."""

import torch

from ...distributed import world_size
from .taught import Taught
from .views import Views


class Instance(Taught):
    """
    The instance term of ProCLIP (https://arxiv.org/abs/2510.18795): the squared distances from the teacher's
    embeddings, summed over the texts of a sample and averaged over the samples of all processes.

    ProCLIP sums over the samples of a process instead, so its term is the batch size of a process times this term.

    Args:
        of (`str`, *optional*, defaults to `"text"`): `"text"` as in stage 1 of ProCLIP, `"image"` as in stage 2, or
            `"both"`, the sum of these.
    """

    def forward(self, views: Views) -> torch.Tensor:
        distances = [(student - teacher).square().sum() for student, teacher in self.compared(views)]
        return torch.stack(distances).sum() * world_size() / views.num_samples
