"""InfoNCE with softened negatives, after LightCLIP."""

import torch
from torch.nn import functional as F

from ...distributed import gather
from .pairs import Pairs, Sets
from .rows import sum_of_rows
from .views import Views


class SoftLabels(Pairs):
    """
    InfoNCE whose targets give a share to the negatives, after LightCLIP (https://arxiv.org/abs/2312.00674): the more,
    the more similar the model finds them. The targets are constants: 1 - `share` for the match, and `share` times the
    softmax of the scaled similarities for the negatives. Use it instead of [`InfoNCE`], which it equals with share 0.

    LightCLIP lets the share grow in training; its numbers are not known here. `share` is constant in a run.

    Args:
        share (`float`, *optional*, defaults to 0.1): Share of the negatives.
        short_loss_weight, long_loss_weight (`float`, *optional*, defaults to 1.0): See [`Pairs`].
    """

    def __init__(self, share: float = 0.1, short_loss_weight: float = 1.0, long_loss_weight: float = 1.0) -> None:
        super().__init__(short_loss_weight, long_loss_weight)
        if not 0 <= share < 1:
            raise ValueError(f"`share` must be at least 0 and below 1, got {share}.")
        self.share = share

    def sums(self, image_sets: Sets, text_sets: Sets, positives: Sets, views: Views) -> torch.Tensor:
        sums, own = [], views.own
        for images, texts in zip(image_sets, text_sets, strict=True):
            of_images = sum_of_rows(self.loss, [images[own]], [gather(texts)], own.start)
            of_texts = sum_of_rows(self.loss, [texts], [images], own.start)
            sums.append((of_images + of_texts) / 2)
        return torch.stack(sums)

    def loss(self, logits: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Returns the cross entropy of rows of logits [r, N], summed; `own` marks the match of each row."""
        negatives = logits.detach().masked_fill(own, -torch.inf).softmax(1).nan_to_num()  # a batch of 1 has none
        return F.cross_entropy(logits, torch.where(own, 1 - self.share, self.share * negatives), reduction="sum")
