"""SigLIP's term: every pair of an image and a text is a yes-or-no question of its own."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .pairs import Pairs, Sets, tiles_of


class Sigmoid(Pairs):
    """
    SigLIP's loss (https://arxiv.org/abs/2303.15343, algorithm 1). It trains `logit_bias`, for the many pairs that do
    not match.

    Args:
        short_loss_weight, long_loss_weight: see [`Pairs`].
    """

    def __init__(self, short_loss_weight: float = 1.0, long_loss_weight: float = 1.0) -> None:
        super().__init__(short_loss_weight, long_loss_weight)
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # SigLIP's first value

    def sums(self, image_sets: Sets, text_sets: Sets, own: slice) -> torch.Tensor:
        """See [`Pairs.sums`]. -logsigmoid(-x) = softplus(x) for the pairs that do not match, else softplus(x) - x."""
        sums = []
        bias = self.logit_bias.to(image_sets[0].dtype)
        for images, texts in zip(image_sets, text_sets, strict=True):
            tiles = [
                # computed again in the backward pass, not kept
                checkpoint(_softplus_sum, image_tile, text_tile, bias, use_reentrant=False, preserve_rng_state=False)
                for image_tile in tiles_of(images)
                for text_tile in tiles_of(texts)
            ]
            sums.append(torch.stack(tiles).sum() - ((images[own] * texts).sum() + len(texts) * bias))
        return torch.stack(sums)


def _softplus_sum(scaled_images: torch.Tensor, texts: torch.Tensor, logit_bias: torch.Tensor) -> torch.Tensor:
    return F.softplus(scaled_images @ texts.t() + logit_bias).sum()
