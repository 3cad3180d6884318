"""The term of UniME: contrast with the most similar images and texts that do not match."""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ...distributed import world_size
from .rows import sum_of_rows
from .views import Views


class HardNegatives(nn.Module):
    """
    The loss of UniME's stage 2 (https://arxiv.org/abs/2504.17432): cross entropy of the match of an image or text
    against its hardest negatives in the batch of all processes. A negative that is more similar than the match by more
    than `margin` is probably a match too, and is left out.

    The loss is averaged over the directions, over short and long texts, and over samples. UniME has one direction.

    Args:
        number (`int`, *optional*, defaults to 8): Number of negatives.
        margin (`float`, *optional*, defaults to 0.1): Largest lead of a negative's cosine over that of the match.
        temperature (`float`, *optional*, defaults to 0.02): Divisor of the cosines, instead of the logit scale.
        directions (`str`, *optional*, defaults to `"both"`): `"image"` contrasts each image with texts, `"text"` each
            text with images.
    """

    needs = frozenset({"image_embeds", "text_embeds"})

    def __init__(
        self,
        number: int = 8,
        margin: float = 0.1,
        temperature: float = 0.02,
        directions: Literal["both", "image", "text"] = "both",
    ) -> None:
        super().__init__()
        if number < 1 or temperature <= 0:
            raise ValueError(f"`number` and `temperature` must be above 0, got {number} and {temperature}.")
        self.number, self.margin, self.temperature = number, margin, temperature
        self.directions = ("image", "text") if directions == "both" else (directions,)

    def forward(self, views: Views) -> torch.Tensor:
        sums = []
        for number in range(views["text_embeds"].shape[1]):
            for direction in self.directions:
                if direction == "image":
                    queries, keys = views["image_embeds"], views.all("text_embeds")[:, number]
                else:
                    queries, keys = views["text_embeds"][:, number], views.all("image_embeds")
                sums.append(sum_of_rows(self.loss, [queries], [keys], views.own.start))
        return torch.stack(sums).mean() * world_size() / views.num_samples

    def loss(self, cosines: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Returns the loss of rows of cosines [r, N], summed; `own` marks the match of each row."""
        matches = (cosines * own).sum(1, keepdim=True)
        negatives = cosines.masked_fill(own | (cosines > matches + self.margin), -torch.inf)
        hardest = negatives.topk(min(self.number, negatives.shape[1]), dim=1).values
        logits = torch.cat([matches, hardest], dim=1) / self.temperature
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long), reduction="sum")
