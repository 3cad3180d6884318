"""The contrastive term of A-CLIP: the texts match both views of their image."""

import torch

from .infonce import InfoNCE
from .views import Views


class TwoViews(InfoNCE):
    """
    The mean of [`InfoNCE`] for the first and for the second view of each image (`--image-views 2`), as in A-CLIP
    (https://arxiv.org/abs/2212.08653). The arguments are those of [`InfoNCE`].
    """

    needs = InfoNCE.needs | {"image_embeds_2"}

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        second = Views({**views, "image_embeds": views["image_embeds_2"]}, views.logit_scale)
        both = super().forward(views), super().forward(second)
        return {part: (both[0][part] + both[1][part]) / 2 for part in both[0]}
