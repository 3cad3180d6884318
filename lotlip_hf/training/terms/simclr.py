"""The first self-supervised term of A-CLIP: SimCLR's contrast between two views of an image."""

import torch
from torch import nn

from ...distributed import all_sizes, gather, rank, world_size
from .heads import make_head
from .rows import sum_of_rows
from .views import Views


class SimCLR(nn.Module):
    """
    The loss of SimCLR (https://arxiv.org/abs/2002.05709) on a head of three layers: each view of an image finds the
    other view among both views of all images, over all processes. A-CLIP's code passes the first view twice; here the
    views are two.

    Args:
        temperature (`float`, *optional*, defaults to 0.1): Temperature of the cosines.
        width (`int`, *optional*, defaults to 4096): Width of both hidden layers of the head.
        output (`int`, *optional*, defaults to 256): Width of the head's output.
        projection_dim (`int`, *optional*, defaults to 512): Size of the embeddings.

    Raises:
        `ValueError`: If `temperature` is not above 0, or a width is below 1.
    """

    needs = frozenset({"image_embeds", "image_embeds_2"})

    def __init__(
        self, temperature: float = 0.1, width: int = 4096, output: int = 256, projection_dim: int = 512
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature}.")
        self.temperature = temperature
        self.head = make_head([projection_dim, width, width, output], bias=True)

    def forward(self, views: Views) -> torch.Tensor:
        features = self.head(torch.cat([views["image_embeds"], views["image_embeds_2"]]))
        return self.loss(*nn.functional.normalize(features, dim=-1).chunk(2))

    def loss(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Returns the share of this process for normalised features [b, output] of both views."""
        sizes = all_sizes(first)
        every = [gather(each.contiguous(), sizes) for each in (first, second)]
        sums = [
            sum_of_rows(self._of_rows, [own, own], columns, sum(sizes[: rank()]))
            for own, columns in ((first, every[::-1]), (second, every))
        ]
        return (sums[0] + sums[1]) * world_size() / (2 * sum(sizes))

    def _of_rows(self, others: torch.Tensor, own_views: torch.Tensor, is_own: torch.Tensor) -> torch.Tensor:
        """Sums cross entropies from cosines [r, N] with the other views and with the views of the same kind."""
        others, own_views = others / self.temperature, own_views / self.temperature
        logits = torch.cat([others, own_views.masked_fill(is_own, -torch.inf)], dim=1)
        return logits.logsumexp(1).sum() - others[is_own].sum()
