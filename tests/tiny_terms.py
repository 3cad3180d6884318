"""A term with weights of its own."""

import torch
from torch import nn

from lotlip_hf.distributed import world_size
from lotlip_hf.training.terms.views import Views


class Guess(nn.Module):
    """The squared distance of the short texts from what a matrix makes of the images, weighted by `tags`, if any."""

    needs = frozenset({"image_embeds", "text_embeds", "tags"})

    def __init__(self, projection_dim: int = 5, power: int = 2) -> None:
        super().__init__()
        self.map = nn.Linear(projection_dim, projection_dim, bias=False)
        self.power = power

    def forward(self, views: Views) -> torch.Tensor:
        images = views.all("image_embeds")
        guesses = self.map(views["image_embeds"] - images.mean(0))
        distances = (guesses - views["text_embeds"][:, 0]).abs().pow(self.power).sum(1)
        return (views.get("tags", 1) * distances).sum() * world_size() / len(images)
