"""The term of UniME's stage 1: embeddings are as similar to each other as the teacher's."""

import torch
from torch.nn import functional as F

from ...distributed import world_size
from .rows import sum_of_rows
from .taught import Of, Taught
from .views import Views


class Similarities(Taught):
    """
    The distillation of UniME's stage 1 (https://arxiv.org/abs/2504.17432): the Kullback-Leibler divergence of the
    softmax over each row of similarities from that of the teacher. A row has the cosines of a text with the texts of
    the same kind, or of an image with the images, in the batch of all processes, itself included. The term is averaged
    over rows, and over the short and long texts of a sample.

    Args:
        temperature (`float`, *optional*, defaults to 0.02): Divisor of the cosines of both.
        of (`str`, *optional*, defaults to `"text"`): `"text"`, `"image"`, or `"both"`, the sum of these.
    """

    def __init__(self, temperature: float = 0.02, of: Of = "text") -> None:
        super().__init__(of)
        if temperature <= 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature}.")
        self.temperature = temperature

    def forward(self, views: Views) -> torch.Tensor:
        means = []
        for own, every in zip(self.compared(views), self.compared(views, gathered=True), strict=True):
            kinds = zip(*(each.unbind(1) for each in (*own, *every)), strict=True)  # short texts, long texts
            sums = [sum_of_rows(self.divergence, kind[:2], kind[2:], views.own.start) for kind in kinds]
            means.append(torch.stack(sums).mean())
        return torch.stack(means).sum() * world_size() / views.num_samples

    def divergence(self, student: torch.Tensor, teacher: torch.Tensor, _own: torch.Tensor) -> torch.Tensor:
        """Returns the divergence of rows of cosines [r, N], summed."""
        student, teacher = ((each / self.temperature).log_softmax(1) for each in (student, teacher))
        return F.kl_div(student, teacher, reduction="sum", log_target=True)
