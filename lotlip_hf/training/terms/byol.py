"""The second self-supervised term of A-CLIP: BYOL's prediction of the teacher's features."""

import copy

import torch
from torch import nn

from ...distributed import world_size
from .heads import make_head
from .views import Views


class BYOL(nn.Module):
    """
    The loss of BYOL (https://arxiv.org/abs/2006.07733) as A-CLIP uses it: from each of two views, a projection and a
    predictor predict the projection of the teacher's embedding. The loss is 2 - 2 * cosine, averaged over both views
    and the samples of all processes. The projection for the teacher is a moving average of that of the views, with
    the decay of `--teacher ema`. A-CLIP has weight 2.

    Args:
        width (`int`, *optional*, defaults to 4096): Width of the hidden layer of the projection and of the predictor.
        output (`int`, *optional*, defaults to 256): Width of their outputs.
        projection_dim (`int`, *optional*, defaults to 512): Size of the embeddings.

    Raises:
        `ValueError`: If a width is below 1.
    """

    needs = frozenset({"image_embeds", "image_embeds_2", "teacher_image_embeds"})

    def __init__(self, width: int = 4096, output: int = 256, projection_dim: int = 512) -> None:
        super().__init__()
        self.projection = make_head([projection_dim, width, output], bias=False)
        self.predictor = make_head([output, width, output], bias=False)
        self.target = copy.deepcopy(self.projection).requires_grad_(False)

    def forward(self, views: Views) -> torch.Tensor:
        features = self.predictor(self.projection(torch.cat([views["image_embeds"], views["image_embeds_2"]])))
        with torch.no_grad():
            targets = self.target(views["teacher_image_embeds"])
        return self.loss(features, targets) * world_size() / views.num_samples

    @staticmethod
    def loss(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the sum over b samples of the mean over their views: features [2 b, output], targets [b, output]."""
        return (1 - nn.functional.cosine_similarity(features, torch.cat([targets, targets]), dim=-1)).sum()

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Moves the projection for the teacher towards that of the views."""
        for average, own in zip(self.target.parameters(), self.projection.parameters(), strict=True):
            average.lerp_(own, 1 - decay)
