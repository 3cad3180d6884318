"""ArcMargin of images and their captions, the term of MCIP."""

import torch
from torch import nn
from torch.nn import functional as F

from ...distributed import world_size
from .margin import check_margin, with_margin
from .rows import sum_of_rows
from .views import Views


class CaptionMargin(nn.Module):
    """
    The term that keeps the texts aligned while MCIP (https://arxiv.org/abs/2409.01936) trains an image tower for
    retrieval by images: each of an image's captions is told apart from the captions of other classes in the batch of
    all processes. Logits are scaled cosines, and the angle between the image and its caption is enlarged by `margin`
    (see [`Margin`]). The captions of a step are the short text and the long ones; a class is the `group` of a record,
    or the record alone if it has none. Other captions of the own class do not count.

    The loss is averaged over the captions of an image and over the images. MCIP adds it to [`Margin`]. The defaults
    are the numbers of ArcFace; those of MCIP are not known here.

    Args:
        margin (`float`, *optional*, defaults to 0.5): Angle in radians.
        scale (`float`, *optional*, defaults to 64.0): Factor of the cosines, instead of the logit scale.

    Raises:
        `ValueError`: If a number is out of range.
    """

    needs = frozenset({"image_embeds", "text_embeds", "groups"})

    def __init__(self, margin: float = 0.5, scale: float = 64.0) -> None:
        super().__init__()
        check_margin(margin, scale)
        self.margin, self.scale = margin, scale

    def forward(self, views: Views) -> torch.Tensor:
        texts, groups = views.all("text_embeds").unbind(1), views.all("groups")

        def of_rows(*similarities: torch.Tensor) -> torch.Tensor:
            *cosines, own = similarities  # T of [r, N], and the mask of the own record
            matches = torch.stack([each[own] for each in cosines], 1)  # [r, T]
            equal = groups[own.int().argmax(1)].unsqueeze(1) == groups
            least = torch.finfo(matches.dtype).min  # where a batch has one class, the sum below stays finite
            others = torch.cat([(self.scale * each).masked_fill(equal, least) for each in cosines], 1)
            margins = others.logsumexp(1, keepdim=True) - self.scale * with_margin(matches, self.margin)
            return F.softplus(margins).mean(1).sum()

        images = [views["image_embeds"]] * len(texts)
        return sum_of_rows(of_rows, images, texts, views.own.start) * world_size() / views.num_samples
