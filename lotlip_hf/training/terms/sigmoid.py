"""The term of SigLIP: binary classification of every pair of an image and a text."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .pairs import Pairs, Sets, tiles_of
from .views import Views


class Sigmoid(Pairs):
    """
    The loss of SigLIP (https://arxiv.org/abs/2303.15343, algorithm 1). The parameter `logit_bias` is trained, and
    offsets the many pairs that do not match.

    Args:
        short_loss_weight, long_loss_weight (`float`, *optional*, defaults to 1.0): See [`Pairs`].
    """

    def __init__(self, short_loss_weight: float = 1.0, long_loss_weight: float = 1.0) -> None:
        super().__init__(short_loss_weight, long_loss_weight)
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # SigLIP's initial value

    def sums(self, image_sets: Sets, text_sets: Sets, positives: Sets, views: Views) -> torch.Tensor:
        # The loss is -logsigmoid(x) = softplus(x) - x for a pair that matches, else -logsigmoid(-x) = softplus(x).
        sums = []
        bias = self.logit_bias.to(image_sets[0].dtype)
        for images, texts, matches in zip(image_sets, text_sets, positives, strict=True):
            tiles = [
                # The backward pass computes the tile again.
                checkpoint(_softplus_sum, image_tile, text_tile, bias, use_reentrant=False, preserve_rng_state=False)
                for image_tile in tiles_of(images)
                for text_tile in tiles_of(texts)
            ]
            sums.append(torch.stack(tiles).sum() - ((matches * texts).sum() + len(texts) * bias))
        return torch.stack(sums)


def _softplus_sum(scaled_images: torch.Tensor, texts: torch.Tensor, logit_bias: torch.Tensor) -> torch.Tensor:
    return F.softplus(scaled_images @ texts.t() + logit_bias).sum()
