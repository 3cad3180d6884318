"""The instance term of ProCLIP: texts are near the teacher's embeddings of the same texts."""

import torch
from torch import nn

from ...distributed import world_size
from .views import Views


class Instance(nn.Module):
    """
    The instance term of ProCLIP (https://arxiv.org/abs/2510.18795), stage 1: the squared distances of the texts from
    the teacher's embeddings, summed over the texts of a sample and averaged over the samples of all processes.

    ProCLIP sums over the samples of a process instead, so its term is the batch size of a process times this term.
    """

    needs = frozenset({"text_embeds", "teacher_text_embeds"})

    def forward(self, views: Views) -> torch.Tensor:
        distances = (views["text_embeds"] - views["teacher_text_embeds"]).square().sum()
        return distances * world_size() / views.num_samples
