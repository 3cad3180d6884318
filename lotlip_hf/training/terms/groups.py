"""The term of CLIPPINGS: records of one group are near in the space of pooled embeddings."""

import torch
from torch import nn
from torch.nn import functional as F

from ...distributed import world_size
from .rows import sum_of_rows
from .views import Views


class Groups(nn.Module):
    """
    The loss with which CLIPPINGS (https://arxiv.org/abs/2304.03464) links records that have a picture and a text:
    supervised contrast (https://arxiv.org/abs/2004.11362, equation 2) of the pooled embeddings of the batch of all
    processes ([`pool`]). The positives of a record are the other records with its `group`. Records without one in the
    batch are negatives of others alone; the loss is averaged over the others, and over the texts of a step.

    Args:
        image_weight (`float`, *optional*, defaults to 0.3): Weight of the image in the pooled embedding.
        temperature (`float`, *optional*, defaults to 0.1): Divisor of the cosines, instead of the logit scale.
        hard_negatives (`int`, *optional*, defaults to 0): Number of negatives of a record, those with the highest
            cosines. With 0 all records of the batch count.

    Raises:
        `ValueError`: If a number is out of range.
    """

    needs = frozenset({"image_embeds", "text_embeds", "groups"})

    def __init__(self, image_weight: float = 0.3, temperature: float = 0.1, hard_negatives: int = 0) -> None:
        super().__init__()
        if not 0 <= image_weight <= 1 or temperature <= 0 or hard_negatives < 0:
            raise ValueError(
                "`image_weight` must be in [0, 1], `temperature` above 0 and `hard_negatives` at least 0, got "
                f"{image_weight}, {temperature} and {hard_negatives}."
            )
        self.image_weight, self.temperature, self.hard_negatives = image_weight, temperature, hard_negatives

    def forward(self, views: Views) -> torch.Tensor:
        groups, texts = views.all("groups"), views.all("text_embeds").unbind(1)
        kinds = [pool(views.all("image_embeds"), each, self.image_weight) for each in texts]
        _, numbers, sizes = groups.unique(return_inverse=True, return_counts=True)
        count = (sizes[numbers] > 1).sum().clamp(min=1)

        def of_rows(cosines: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
            equal = groups[own.int().argmax(1)].unsqueeze(1) == groups
            positives = equal & ~own
            least = torch.finfo(cosines.dtype).min
            logits = (cosines / self.temperature).masked_fill(own, least)
            compared = logits
            if self.hard_negatives:
                number = min(self.hard_negatives, logits.shape[1])
                hardest = logits.masked_fill(equal, least).topk(number, dim=1).values
                compared = torch.cat([logits.masked_fill(~positives, least), hardest], 1)
            sums = (compared.logsumexp(1, keepdim=True) - logits).masked_fill(~positives, 0).sum(1)
            return (sums / positives.sum(1).clamp(min=1)).sum()

        sums = [sum_of_rows(of_rows, [each[views.own]], [each], views.own.start) for each in kinds]
        return torch.stack(sums).mean() * world_size() / count


def pool(images: torch.Tensor, texts: torch.Tensor, image_weight: float) -> torch.Tensor:
    """Returns the pooled embeddings [n, dim] of images and texts [n, dim]: their weighted mean, normalised."""
    return F.normalize(image_weight * images + (1 - image_weight) * texts, dim=-1)
