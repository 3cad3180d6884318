"""The term of GA-DMS: the distribution of similarities is that of the matches, also within a group of records."""

import torch
from torch.nn import functional as F

from ...distributed import gather
from .pairs import Pairs, Sets
from .rows import sum_of_rows
from .views import Views

EPSILON = 1e-8  # GA-DMS's share of an image or text that does not match


class Distribution(Pairs):
    """
    Similarity distribution matching, with which GA-DMS (https://arxiv.org/abs/2509.09118) and IRRA train: the
    Kullback-Leibler divergence of the softmax over the texts of an image, and over the images of a text, from the even
    distribution over the matches. Images and texts match if their records have the same `group`, such as one person;
    a record without a group matches only itself. Use it instead of [`InfoNCE`].

    The sum of both directions is averaged over the samples of all processes.

    Args:
        short_loss_weight, long_loss_weight (`float`, *optional*, defaults to 1.0): See [`Pairs`].
    """

    needs = Pairs.needs | {"groups"}

    def sums(self, image_sets: Sets, text_sets: Sets, positives: Sets, views: Views) -> torch.Tensor:
        groups, own, sums = views.all("groups"), views.own, []
        for images, texts in zip(image_sets, text_sets, strict=True):
            of_images = sum_of_rows(divergence, [images[own]], [gather(texts)], own.start, groups)
            sums.append(of_images + sum_of_rows(divergence, [texts], [images], own.start, groups))
        return torch.stack(sums)


def divergence(logits: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """Returns the divergence of rows of logits [r, N] from their matches, summed."""
    logs, targets = logits.log_softmax(1), F.normalize(matches.to(logits.dtype), p=1, dim=1)
    return (logs.exp() * (logs - (targets + EPSILON).log())).sum()
