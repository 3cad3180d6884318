"""The term of GRAIN: queries find the boxes of the regions of an image, and the texts of these regions."""

import torch
from torch import nn

from ...distributed import sum_over_ranks, world_size
from ...regions import RegionQueries, match, overlaps, to_centres, to_corners
from .rows import sum_of_matches
from .views import PATCHES, Views, mask_of_patches

COSTS = 5.0, 2.0  # of the matching: of L1, and of the generalised intersection over union
TIE = 1e-3


class Regions(nn.Module):
    """
    The losses of GRAIN (https://arxiv.org/abs/2412.04429) on the `regions` of records.
    [`~lotlip_hf.regions.RegionQueries`] predicts boxes with embeddings, and each region of the record is matched with
    one of them, by its box. The parts are `l1`, the distance of the centres and sizes of matched boxes, `giou`, 1 -
    their generalised intersection over union, and `description`, the cross entropy of the embeddings of matched boxes
    against the texts of the regions of all processes, without other texts that are equal. Each is averaged over the
    regions of all processes.

    GRAIN compares the texts of one process, and trains the image embedding as one of its queries. Here the head shapes
    the patches, and the image embedding is that of the model.

    Args:
        queries (`int`, *optional*, defaults to 5): Number of boxes, at least that of regions in a step.
        layers (`int`, *optional*, defaults to 6): Number of layers of the head.
        width (`int`, *optional*, defaults to 512): Width of the head.
        l1, giou, description (`float`, *optional*, defaults to 1.0): Weights of the parts. GRAIN's code trains with
            1.5, 1.5 and 1.
        projection_dim (`int`, *optional*, defaults to 512): Size of the embeddings.

    Raises:
        `ValueError`: If a number is out of range.
    """

    needs = frozenset({"patch_embeds", "region_embeds", "region_keys", "boxes", "box_mask", *PATCHES})

    def __init__(
        self,
        queries: int = 5,
        layers: int = 6,
        width: int = 512,
        l1: float = 1.0,
        giou: float = 1.0,
        description: float = 1.0,
        projection_dim: int = 512,
    ) -> None:
        super().__init__()
        if min(l1, giou, description) < 0:
            raise ValueError(f"`l1`, `giou` and `description` must be at least 0, got {l1}, {giou} and {description}.")
        self.weights = {"l1": l1, "giou": giou, "description": description}
        self.head = RegionQueries(projection_dim, queries, layers, width)

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        boxes, embeds = self.head(views["patch_embeds"], mask_of_patches(views))
        return self.losses(boxes, embeds, views)

    def losses(self, boxes: torch.Tensor, embeds: torch.Tensor, views: Views) -> dict[str, torch.Tensor]:
        """Returns the weighted parts, given boxes [b, Q, 4] (centre, width, height) and embeddings [b, Q, dim]."""
        mask, known = views["box_mask"], views["boxes"].to(boxes.dtype)
        distances, ious = _compare(boxes.unsqueeze(2), known.unsqueeze(1))  # [b, Q, R]
        costs = (COSTS[0] * distances - COSTS[1] * ious).detach()
        # Regions with the same box would be matched by rounding errors, which differ between numbers of processes.
        numbers = (torch.arange(size, device=boxes.device) / size for size in costs.shape[1:])
        costs = costs + TIE * torch.outer(*numbers)
        # What is no region takes one of the queries that are left.
        chosen = match(costs.masked_fill(~mask.unsqueeze(1), 0.0))  # [b, R]
        rows = torch.arange(len(chosen), device=chosen.device).unsqueeze(1)
        distances, ious = _compare(boxes[rows, chosen][mask], known[mask])
        sums = {
            "l1": distances.sum(),
            "giou": (1 - ious).sum(),
            "description": sum_of_matches(
                embeds[rows, chosen][mask], views["region_embeds"][mask], views["region_keys"][mask], views.logit_scale
            ),
        }
        count = sum_over_ranks(mask.sum()).clamp(min=1)
        return {name: self.weights[name] * value * world_size() / count for name, value in sums.items()}


def _compare(boxes: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the distance of boxes (centre, width, height) from others (corners), and their generalised overlap."""
    return (boxes - to_centres(known)).abs().sum(-1), overlaps(to_corners(boxes), known)[1]
