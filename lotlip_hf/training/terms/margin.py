"""ArcMargin of images and classes, the first stage of 2SFT."""

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ...data.collator import group_key
from ...distributed import sum_over_ranks, world_size
from .tags import read_lines
from .views import Views

LEAST = 1e-6  # squared sine, whose root has a finite gradient


class Margin(nn.Module):
    """
    The loss with which 2SFT (https://arxiv.org/abs/2409.01936) trains an image tower for retrieval by images: cross
    entropy of the class of an image, where logits are scaled cosines of the image and a prototype of each class, and
    the angle to the own prototype is enlarged by `margin` (ArcFace, https://arxiv.org/abs/1801.07698). The class of a
    record is its `group`. Records with another group than those of the file, or none, are left out; the loss is
    averaged over the others of all processes.

    The defaults are the numbers of ArcFace; those of 2SFT are not known here.

    Args:
        classes (`Path`): Text file in UTF-8 with one group a line, at most 100,000 and 16 MiB.
        margin (`float`, *optional*, defaults to 0.5): Angle in radians. With 0 the loss is a plain softmax.
        scale (`float`, *optional*, defaults to 64.0): Factor of the cosines, instead of the logit scale.
        projection_dim (`int`, *optional*, defaults to 512): Size of the image embeddings.

    Raises:
        `ValueError`: If there is no file of classes, the file is too large, empty or not UTF-8, or a number is out of
            range.
    """

    needs = frozenset({"image_embeds", "groups"})
    digests: torch.Tensor

    def __init__(
        self, classes: Path | None = None, margin: float = 0.5, scale: float = 64.0, projection_dim: int = 512
    ) -> None:
        super().__init__()
        if classes is None:
            raise ValueError("`classes` is missing. Set it to a file with one group of the records a line.")
        check_margin(margin, scale)
        self.margin, self.scale = margin, scale
        digests = {group_key({"group": name}) for name in read_lines(classes, "classes")}
        # Saved with the prototypes, which are in this order.
        self.register_buffer("digests", torch.tensor(sorted(digests)))
        self.prototypes = nn.Parameter(torch.empty(len(digests), projection_dim))
        nn.init.normal_(self.prototypes, std=projection_dim**-0.5)

    def forward(self, views: Views) -> torch.Tensor:
        groups = views["groups"]
        classes = torch.searchsorted(self.digests, groups).clamp(max=len(self.digests) - 1)
        is_known = self.digests[classes] == groups
        cosines = views["image_embeds"] @ F.normalize(self.prototypes, dim=1).t()  # [b, C]
        own = cosines.gather(1, classes.unsqueeze(1))
        logits = self.scale * cosines.scatter(1, classes.unsqueeze(1), with_margin(own, self.margin))
        losses = F.cross_entropy(logits, classes, reduction="none")
        return (losses * is_known).sum() * world_size() / sum_over_ranks(is_known.sum()).clamp(min=1)


def with_margin(cosines: torch.Tensor, margin: float) -> torch.Tensor:
    """
    Returns cos(theta + margin) for cosines of theta. For a sum above pi, where the cosine would rise again, it is
    cos(theta) - margin sin(margin), as in ArcFace's code.
    """
    sines = (1 - cosines.square()).clamp(min=LEAST).sqrt()
    moved = cosines * math.cos(margin) - sines * math.sin(margin)
    return torch.where(cosines > -math.cos(margin), moved, cosines - margin * math.sin(margin))


def check_margin(margin: float, scale: float) -> None:
    """Raises a `ValueError` if a number is out of range."""
    if not 0 <= margin < math.pi or scale <= 0:
        raise ValueError(f"`margin` must be at least 0 and below pi and `scale` above 0, got {margin} and {scale}.")
