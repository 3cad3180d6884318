"""The term of HQ-CLIP: an image is nearer to its texts than to captions that were written to be wrong."""

import torch
from torch import nn

from ...distributed import sum_over_ranks, world_size
from .views import Views


class Negatives(nn.Module):
    """
    The hard negative identification of HQ-CLIP (https://arxiv.org/abs/2507.22431): cross entropy of a text of an image
    against the `negatives` of its record. The texts are the long ones, or the short one in steps without long texts.
    The loss is averaged over the long texts, and over those samples of all processes that have negatives.
    """

    needs = frozenset({"image_embeds", "text_embeds", "negative_embeds", "negative_mask"})

    def forward(self, views: Views) -> torch.Tensor:
        texts, images = views["text_embeds"], (views.logit_scale * views["image_embeds"]).unsqueeze(2)
        texts = texts[:, 1:] if texts.shape[1] > 1 else texts
        matches = texts @ images  # [b, P, 1]
        others = (views["negative_embeds"] @ images).squeeze(2).masked_fill(~views["negative_mask"], -torch.inf)
        logits = torch.cat([matches, others.unsqueeze(1).expand(-1, texts.shape[1], -1)], dim=2)
        # Without negatives the match is the only logit, and the loss of the sample is 0.
        losses = (logits.logsumexp(2) - matches.squeeze(2)).mean(1)
        count = sum_over_ranks(views["negative_mask"].any(1).sum())
        return losses.sum() * world_size() / count.clamp(min=1)
