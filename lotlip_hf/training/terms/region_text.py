"""The term of CLOC: the regions of the batch find their texts, and the texts their regions."""

import torch
from torch import nn

from ...distributed import sum_over_ranks, world_size
from ...regions import RegionPooler, overlaps, to_centres, to_corners
from .rows import sum_of_matches
from .views import PATCHES, Views, mask_of_patches


class RegionText(nn.Module):
    """
    The losses of CLOC (https://arxiv.org/abs/2410.02746) on the `regions` of records. A
    [`~lotlip_hf.regions.RegionPooler`] embeds each region, given its box. The part `contrast` is symmetric InfoNCE
    between the regions and their texts, over the regions of all images of all processes; regions with equal texts are
    not negatives of each other. The part `grounding` predicts the box, given the text: the distance of its centre and
    size (L1) plus 1 - generalised intersection over union. Both are averaged over the regions of all processes.

    Args:
        grounding (`float`, *optional*, defaults to 0.0): Weight of the part `grounding`.
        width (`int`, *optional*, defaults to 256): Width of the head.
        projection_dim (`int`, *optional*, defaults to 512): Size of the embeddings.

    Raises:
        `ValueError`: If a number is out of range.
    """

    needs = frozenset({"patch_embeds", "region_embeds", "region_keys", "boxes", "box_mask", *PATCHES})

    def __init__(self, grounding: float = 0.0, width: int = 256, projection_dim: int = 512) -> None:
        super().__init__()
        if grounding < 0:
            raise ValueError(f"`grounding` must be at least 0, got {grounding}.")
        self.grounding = grounding
        self.pooler = RegionPooler(projection_dim, width, locates=grounding > 0)

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        mask, patches, boxes = views["box_mask"], views["patch_embeds"], views["boxes"].to(views["patch_embeds"].dtype)
        texts, seen = views["region_embeds"], mask_of_patches(views)
        count = sum_over_ranks(mask.sum()).clamp(min=1)
        pair, keys = (self.pooler(patches, boxes, seen)[mask], texts[mask]), views["region_keys"][mask]
        sums = [sum_of_matches(*each, keys, views.logit_scale) for each in (pair, pair[::-1])]
        losses = {"contrast": torch.stack(sums).mean() * world_size() / count}
        if self.grounding:
            found, known = self.pooler.locate(patches, texts, seen)[mask], boxes[mask]
            distance = (found - to_centres(known)).abs().sum() + (1 - overlaps(to_corners(found), known)[1]).sum()
            losses["grounding"] = self.grounding * distance * world_size() / count
        return losses
