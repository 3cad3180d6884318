"""SigLIP's term: every pair of an image and a text is a yes-or-no question of its own."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .infonce import TILE_SIZE, check_options, split_texts, weighted_shares
from .views import Views


class Sigmoid(nn.Module):
    """
    SigLIP's loss (https://arxiv.org/abs/2303.15343, algorithm 1) of the images with the short and the long texts, over
    the whole batch of all processes and in tiles. It trains `logit_bias`, for the many pairs that do not match.

    Args:
        short_loss_weight (`float`, *optional*, defaults to 1.0): weight of the short texts' share.
        long_loss_weight (`float`, *optional*, defaults to 1.0): weight of the long texts' share.
        tile_size (`int`, *optional*, defaults to 4096): images and texts in a tile of similarities.

    Raises:
        ValueError: if an option is out of range.
    """

    needs = frozenset({"image_embeds", "text_embeds", "corner_embeds"})

    def __init__(
        self, short_loss_weight: float = 1.0, long_loss_weight: float = 1.0, tile_size: int = TILE_SIZE
    ) -> None:
        super().__init__()
        check_options(short_loss_weight, long_loss_weight, tile_size)
        self.short_loss_weight, self.long_loss_weight = short_loss_weight, long_loss_weight
        self.tile_size = tile_size
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # SigLIP's first value

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """The arguments and the result are those of [`InfoNCE`]."""
        images, own = views.logit_scale * views.all("image_embeds"), views.own
        bias = self.logit_bias.to(images.dtype)
        sums = []
        # -logsigmoid(-x) = softplus(x) for pairs that do not match, and -logsigmoid(x) = softplus(x) - x for others
        for texts in split_texts(views):
            tiles = [
                # computed again in the backward pass, not kept
                checkpoint(_softplus_sum, image_tile, text_tile, bias, use_reentrant=False, preserve_rng_state=False)
                for image_tile in images.split(self.tile_size)
                for text_tile in texts.split(self.tile_size)
            ]
            sums.append(torch.stack(tiles).sum() - ((images[own] * texts).sum() + len(texts) * bias))
        return weighted_shares(torch.stack(sums), len(images), self.short_loss_weight, self.long_loss_weight)


def _softplus_sum(scaled_images: torch.Tensor, texts: torch.Tensor, logit_bias: torch.Tensor) -> torch.Tensor:
    return F.softplus(scaled_images @ texts.t() + logit_bias).sum()
